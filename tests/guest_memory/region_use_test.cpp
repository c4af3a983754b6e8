#include <chrono>
#include <cstdint>
#include <expected>
#include <gtest/gtest.h>
#include <optional>
#include <span>
#include <stop_token>
#include <sys/mman.h>
#include <thread>
#include <utility>

import cppvmm.guest_memory;

// When memory that was taken out of the map may go.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::chrono::nanoseconds at_once{0};

TEST(RegionUse, LastsAsLongAsAMapHasTheRegion) {
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), mib)}));
  auto before = memory.snapshot();
  const auto use = memory.remove_region(GuestAddress(0));
  ASSERT_TRUE(use);
  EXPECT_FALSE(use->is_over());
  EXPECT_FALSE(use->wait_for(at_once));
  EXPECT_TRUE(before->write_value(GuestAddress(0), std::uint64_t{1}));
  before.reset();
  EXPECT_TRUE(use->is_over());
  EXPECT_TRUE(use->wait_for(at_once));
  use->wait();
}

TEST(RegionUse, IsWaitedForForAnyTime) {
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), mib)}));
  auto before = memory.snapshot();
  const auto use = memory.remove_region(GuestAddress(0));
  ASSERT_TRUE(use);
  std::jthread user([held = std::move(before)]() mutable { held.reset(); });
  EXPECT_TRUE(use->wait_for(std::chrono::nanoseconds::max()));
}

TEST(RegionUse, LastsAsLongAsACopyOfTheRegion) {
  std::optional<Region> region(*Region::anonymous(GuestAddress(0), mib));
  const RegionUse use = region->use();
  {
    const Region copy = *region;
    region.reset();
    EXPECT_FALSE(use.is_over());
  }
  EXPECT_TRUE(use.is_over());
}

TEST(RegionUse, EndsWhenTheMapIsReplaced) {
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), mib)}));
  const RegionUse use = memory.snapshot()->find(GuestAddress(0))->use();
  EXPECT_FALSE(use.is_over());
  memory.replace(MemoryMap());
  EXPECT_TRUE(use.is_over());
}

TEST(RegionUse, OfARegionThatIsNotThereIsNone) {
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), mib)}));
  EXPECT_EQ(memory.remove_region(GuestAddress(0x1000)).error().code, MemoryErrc::not_backed);
}

TEST(RegionUse, OfMemoryThatIsLoggedOrMarkedEndsToo) {
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), mib)}));
  memory.mark_touched(*PageRange::make(PageNumber(3), 2), Toucher::device);
  ASSERT_TRUE(memory.begin_write_log(
      {.collect = [](PageRange, std::span<std::uint64_t>) { return MemoryResult<void>(); }, .by = Toucher::guest}));
  const auto use = memory.remove_region(GuestAddress(0));
  ASSERT_TRUE(use);
  EXPECT_TRUE(use->is_over());
}

// Surveys that read all of it, and accesses, while it is plugged and unplugged; then it is gone for good: a store of
// zeros to it, or a look at it, would be at memory that is nobody's.
TEST(RegionUse, IsOverBeforeMemoryThatWasAdoptedIsUnmapped) {
  GuestMemory memory;
  const auto again_and_again = [&](auto use) {
    return std::jthread([&memory, use](const std::stop_token& stop) {
      while (!stop.stop_requested())
        use(memory);
    });
  };
  const std::jthread surveys = again_and_again([](const GuestMemory& used) {
    SurveyOptions options;
    options.content_check.emplace();
    static_cast<void>(used.survey(options));
  });
  const std::jthread accesses = again_and_again([](const GuestMemory& used) {
    static_cast<void>(used.write_value(GuestAddress(5 * page_size), std::uint64_t{1}).has_value());
  });
  for (int i = 0; i < 50; ++i) {
    void* const mapped = mmap(nullptr, 4 * mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(mapped, MAP_FAILED);
    {
      auto region =
          Region::adopt(GuestAddress(0), {.host_address = mapped, .bytes = 4 * mib, .backing = Backing::anonymous});
      ASSERT_TRUE(region) << region.error().message();
      ASSERT_TRUE(memory.add_region(std::move(*region)));
    }
    ASSERT_TRUE(memory.write_value(GuestAddress(page_size), std::uint64_t{1}));
    const auto use = memory.remove_region(GuestAddress(0));
    ASSERT_TRUE(use);
    use->wait();
    ASSERT_EQ(memory.snapshot()->find(GuestAddress(0)), nullptr);
    munmap(mapped, 4 * mib);
  }
}

TEST(MemoryErrors, IsThrownWithItsMessage) {
  const MemoryError error{.code = MemoryErrc::os, .address = 0x1000, .length = 1, .os_error = 12, .operation = "mmap"};
  EXPECT_EQ(value_or_throw(std::expected<int, MemoryError>(5)), 5);
  value_or_throw(std::expected<void, MemoryError>());
  try {
    value_or_throw(std::expected<void, MemoryError>(std::unexpected(error)));
    FAIL() << "nothing was thrown";
  } catch (const MemoryException& thrown) {
    EXPECT_EQ(thrown.what(), error.message());
    EXPECT_EQ(thrown.error(), error);
  }
}

} // namespace
