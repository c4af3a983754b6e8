#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <mutex>
#include <optional>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <vector>

#include "support/each_system_call.hpp"
#include "support/failing_allocations.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_calls;

// What a guest's calls can use up: each allocation and each system call of a hypercall fails in turn, and many vCPUs
// call at once.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t query = 0x8001;
constexpr std::uint64_t boot_zeroed = 0x8002;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

TEST(Vcpus, HoldOneAnswerAtATime) {
  // Enough ranges that an answer takes some megabytes.
  constexpr std::uint64_t extents = 150'000;
  const Region region = *Region::anonymous(GuestAddress(0), (2 * extents + 2) * page_size);
  madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
  for (std::uint64_t page = 1; page < 2 * extents; page += 2)
    static_cast<volatile char*>(region.host_address())[page * page_size] = 1;
  const GuestMemory memory(*MemoryMap::make({region}));

  std::mutex mutex;
  std::condition_variable another;
  int inside = 0;
  int most_inside = 0;
  // Gives others the time to come in.
  const auto meet = [&](const BootZeroedAnswer&) {
    std::unique_lock lock(mutex);
    most_inside = std::max(most_inside, ++inside);
    another.notify_all();
    another.wait_for(lock, std::chrono::milliseconds(200), [&] { return inside > 1; });
    --inside;
  };
  auto hypercalls = *ExtendedHypercalls::create(memory, {.on_boot_zeroed = meet});
  const auto growth = [&](std::size_t vcpus) {
    const std::size_t before = test::bytes_held;
    test::most_bytes_held = before;
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < vcpus; ++i)
      threads.emplace_back([&, i] {
        EXPECT_EQ(*hypercalls.handle({.control = boot_zeroed, .output = GuestAddress((4 * i + 1) * page_size)}), 0U);
      });
    for (std::thread& thread : threads)
      thread.join();
    return test::most_bytes_held - before;
  };
  const std::size_t alone = growth(1);
  const std::size_t together = growth(8);
  EXPECT_EQ(most_inside, 1);
  EXPECT_GT(alone, std::size_t{4} << 20);
  EXPECT_LT(together, alone + alone / 4);
}

/// Two regions, with data in some pages; the output goes to page 0.
class Exhaustion : public testing::Test {
protected:
  Exhaustion() {
    const Region low = *Region::anonymous(GuestAddress(0), 2 * mib);
    const Region high = *Region::memfd(GuestAddress(4 * mib), 2 * mib);
    for (const Region& region : {low, high})
      madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
    memory.replace(*MemoryMap::make({low, high}));
    data.add(pages(0, 1));
    for (std::uint64_t page = 1; page < 2000; page += 7)
      if (memory.write_value(GuestAddress(page * page_size), std::uint64_t{1})) data.add(pages(page, 1));
  }

  std::uint64_t call(ExtendedHypercalls& hypercalls, std::uint64_t control) {
    return *hypercalls.handle({.control = control, .output = GuestAddress(0)});
  }

  /// The pages of the answer in page 0.
  [[nodiscard]] PageSet answered() const {
    PageSet set;
    const std::uint64_t count = *memory.read_value<std::uint64_t>(GuestAddress(0));
    EXPECT_LE(count, 255U);
    for (std::uint64_t i = 0; i < std::min<std::uint64_t>(count, 255); ++i)
      set.add(pages(*memory.read_value<std::uint64_t>(GuestAddress(8 + 16 * i)),
                    *memory.read_value<std::uint64_t>(GuestAddress(16 + 16 * i))));
    return set;
  }

  /// What the guest finds where there is no answer.
  static constexpr std::uint64_t nothing = 0x1234;
  void clear_output() { ASSERT_TRUE(memory.write_value(GuestAddress(0), nothing)); }

  void expect_right(std::uint64_t status, const PageSet& at_most) {
    if (status != 0) {
      EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0)), nothing);
      return;
    }
    PageSet more = answered();
    more.remove(at_most);
    EXPECT_TRUE(more.empty());
  }

  PageSet data;
  GuestMemory memory;
};

TEST_F(Exhaustion, EachAllocationMayFail) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  EXPECT_EQ(call(hypercalls, boot_zeroed), 0U);
  const PageSet clean = answered();
  EXPECT_FALSE(clean.empty());
  test::expect_nothing_left([&] {
    if (!memory.write_value(GuestAddress(0), nothing)) return false;
    const std::uint64_t status = call(hypercalls, boot_zeroed);
    const bool ran_out = status != 0;
    test::allocations_left = -1;
    if (ran_out) {
      EXPECT_EQ(status, hv_result(HvStatus::insufficient_memory));
    }
    expect_right(status, clean);
    return ran_out;
  });
  EXPECT_EQ(call(hypercalls, boot_zeroed), 0U);
  EXPECT_EQ(answered(), clean);
}

TEST_F(Exhaustion, EachSystemCallMayFail) {
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  test::keep_heap();
  auto hypercalls = *ExtendedHypercalls::create(memory);
  ASSERT_EQ(call(hypercalls, boot_zeroed), 0U);
  const PageSet clean = answered();
  PageSet unsound = clean;
  unsound.intersect(data);
  ASSERT_TRUE(unsound.empty());
  std::uint64_t status = 0;
  const std::size_t faults = test::fail_each_system_call({.prepare = [this] { clear_output(); },
                                                          .work = [&] { status = call(hypercalls, boot_zeroed); },
                                                          .check = [&] { expect_right(status, clean); }});
  EXPECT_GT(faults, 0U);
  ASSERT_EQ(call(hypercalls, boot_zeroed), 0U);
  EXPECT_EQ(answered(), clean);
}

// It asks the kernel nothing.
TEST_F(Exhaustion, TheCapabilitiesNeedNoSystemCall) {
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  auto hypercalls = *ExtendedHypercalls::create(memory);
  ASSERT_EQ(call(hypercalls, query), 0U);
  EXPECT_TRUE(test::record_system_calls([&] { static_cast<void>(call(hypercalls, query)); }).empty());
}

} // namespace
