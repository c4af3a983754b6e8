#include <cstdint>
#include <gtest/gtest.h>
import cppvmm.guest_memory;

using namespace cppvmm;

namespace {

constexpr std::uint64_t last_page = (guest_space_end >> page_shift) - 1;

TEST(GuestAddress, AddsUpToTheEndOfTheSpaceAndNoFurther) {
  EXPECT_EQ(GuestAddress(0x1000).checked_add(0x234)->value(), 0x1234U);
  EXPECT_EQ(GuestAddress(guest_space_end - 1).checked_add(1)->value(), guest_space_end);
  EXPECT_FALSE(GuestAddress(guest_space_end - 1).checked_add(2));
  EXPECT_FALSE(GuestAddress(0x1000).checked_add(UINT64_MAX));
  EXPECT_FALSE(GuestAddress(UINT64_MAX).checked_add(0));
  EXPECT_FALSE(GuestAddress(UINT64_MAX).checked_add(1));
}

TEST(PageRange, RefusesWhatLeavesTheSpace) {
  EXPECT_TRUE(PageRange::make(PageNumber(last_page), 1));
  EXPECT_TRUE(PageRange::make(PageNumber(last_page + 1), 0));
  const auto beyond = PageRange::make(PageNumber(last_page), 2);
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code, MemoryErrc::out_of_range);
  EXPECT_EQ(beyond.error().address, last_page);
  EXPECT_EQ(beyond.error().length, 2U);
  EXPECT_FALSE(PageRange::make(PageNumber(UINT64_MAX), 1));
  EXPECT_FALSE(PageRange::make(PageNumber(1), UINT64_MAX));
}

TEST(PageRange, CoversEveryPageThatBytesTouch) {
  EXPECT_EQ(*PageRange::covering(GuestAddress(0x1FFF), 1), *PageRange::make(PageNumber(1), 1));
  EXPECT_EQ(*PageRange::covering(GuestAddress(0x1FFF), 2), *PageRange::make(PageNumber(1), 2));
  EXPECT_EQ(PageRange::covering(GuestAddress(0x1FFF), 0)->count(), 0U);
  EXPECT_EQ(PageRange::covering(GuestAddress(0), guest_space_end)->count(), last_page + 1);
  EXPECT_FALSE(PageRange::covering(GuestAddress(guest_space_end), 1));
  EXPECT_FALSE(PageRange::covering(GuestAddress(UINT64_MAX), 1));
}

TEST(PageRange, KnowsWhatItHoldsAndOverlaps) {
  const auto range = *PageRange::make(PageNumber(16), 4);
  EXPECT_FALSE(range.contains(PageNumber(15)));
  EXPECT_TRUE(range.contains(PageNumber(16)));
  EXPECT_TRUE(range.contains(GuestAddress(0x13FFF)));
  EXPECT_FALSE(range.contains(PageNumber(20)));
  EXPECT_TRUE(range.overlaps(*PageRange::make(PageNumber(19), 9)));
  EXPECT_FALSE(range.overlaps(*PageRange::make(PageNumber(20), 9)));
  EXPECT_FALSE(range.overlaps(*PageRange::make(PageNumber(0), 16)));
}

} // namespace
