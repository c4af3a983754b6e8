#include "examples/boot/host_peak.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <optional>
#include <sys/mman.h>

namespace {

using namespace cppvmm::boot;

constexpr std::uint64_t mib = std::uint64_t{1} << 20;
// The kernel counts in batches for each processor.
constexpr std::uint64_t slack = 4 * mib;

/// What a process has at most for so many bytes that it writes: the thread sanitizer's shadow is twice as much.
constexpr std::uint64_t with_shadow(std::uint64_t bytes) {
#if __has_feature(thread_sanitizer)
  return 3 * bytes;
#elif __has_feature(address_sanitizer)
  return bytes + bytes / 8;
#else
  return bytes;
#endif
}

/// Present once and gone again.
void take_and_give_back(std::size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  std::memset(memory, 1, bytes);
  ASSERT_EQ(munmap(memory, bytes), 0);
}

TEST(HostPeak, KeepsWhatWasGivenBack) {
  const auto peak = HostPeak::begin();
  if (!peak) GTEST_SKIP() << "/proc/self/clear_refs cannot be written";
  take_and_give_back(64 * mib);
  const auto growth = peak->growth();
  ASSERT_TRUE(growth);
  EXPECT_GE(*growth, 64 * mib - slack);
  EXPECT_LE(*growth, with_shadow(64 * mib) + slack);
}

TEST(HostPeak, ForgetsWhatWasBeforeIt) {
  take_and_give_back(64 * mib);
  const auto peak = HostPeak::begin();
  if (!peak) GTEST_SKIP() << "/proc/self/clear_refs cannot be written";
  take_and_give_back(16 * mib);
  const auto growth = peak->growth();
  ASSERT_TRUE(growth);
  EXPECT_GE(*growth, 16 * mib - slack);
  EXPECT_LE(*growth, with_shadow(16 * mib) + slack);
}

TEST(HostPeak, IsReadFromTheKernelsWords) {
  const char* const status = "Name:\tVmHWM:\nVmHWMs:\t  1 kB\nVmHWM:\t    1234 kB\nVmRSS:\t      17 kB\nThreads:\t1\n";
  EXPECT_EQ(status_bytes(status, "VmHWM"), 1234U << 10);
  EXPECT_EQ(status_bytes(status, "VmRSS"), 17U << 10);
  for (const char* field : {"VmSwap", "Threads", "Name", "Vm", ""})
    EXPECT_EQ(status_bytes(status, field), std::nullopt) << field;
  for (const char* bad : {"", "VmHWM", "VmHWM:", "VmHWM:\t", "VmHWM: x kB", "VmHWM: 1", "VmHWM: 1 MB",
                          "VmHWM: 99999999999999999999 kB", "VmHWM: 18014398509481984 kB"})
    EXPECT_EQ(status_bytes(bad, "VmHWM"), std::nullopt) << bad;
}

} // namespace
