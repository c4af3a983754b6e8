#include <cstdint>
#include <gtest/gtest.h>
#include <optional>
#include <sys/mman.h>

import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;

namespace {

constexpr std::uint64_t bytes = 64 * page_size;
constexpr GuestAddress output(8 * page_size);

/// Adopted memory whose page for answers the embedder has protected.
class InaccessibleOutput : public testing::TestWithParam<bool> {
protected:
  void SetUp() override {
    host = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(host, MAP_FAILED);
    memory.replace(*MemoryMap::make({*Region::adopt(GuestAddress(0), {host, bytes, Backing::anonymous, -1, 0})}));
    if (GetParam()) guard.emplace(*FaultGuard::install());
    protect(PROT_NONE);
  }
  void TearDown() override {
    memory.replace({});
    munmap(host, bytes);
  }
  void protect(int protection) const {
    ASSERT_EQ(mprotect(static_cast<std::byte*>(host) + output.value(), page_size, protection), 0);
  }

  void* host = nullptr;
  GuestMemory memory;
  std::optional<FaultGuard> guard;
};

INSTANTIATE_TEST_SUITE_P(Guard, InaccessibleOutput, testing::Bool(),
                         [](const auto& info) { return info.param ? "guarded" : "by_kernel"; });

TEST_P(InaccessibleOutput, IsAnInvalidParameter) {
  auto hypercalls = ExtendedHypercalls::create(memory);
  ASSERT_TRUE(hypercalls);
  for (const auto code : {HvCallCode::ext_query_capabilities, HvCallCode::ext_get_boot_zeroed_memory}) {
    const auto refused = hypercalls->handle({.control = static_cast<std::uint64_t>(code), .output = output});
    ASSERT_TRUE(refused);
    EXPECT_EQ(*refused, static_cast<std::uint64_t>(HvStatus::invalid_parameter));
  }
  protect(PROT_READ | PROT_WRITE);
  const auto answered = hypercalls->handle(
      {.control = static_cast<std::uint64_t>(HvCallCode::ext_get_boot_zeroed_memory), .output = output});
  EXPECT_EQ(answered, HypercallResult(0));
}

} // namespace
