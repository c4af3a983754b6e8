#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <random>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>
import cppvmm.guest_memory;

// What a survey reports is made of three sets when it is asked for, and comes out as if they were subtracted one by
// one.

using namespace cppvmm;

namespace {

constexpr std::uint64_t all = guest_space_end >> page_shift;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

Survey survey_of(PageSet ram, PageSet touched, PageSet left_out) {
  Survey survey;
  survey.ram = std::move(ram);
  survey.touched = std::move(touched);
  survey.left_out = std::move(left_out);
  return survey;
}

/// By all its ways, beside one subtraction after the other.
void expect_same(const Survey& survey, const PageSet& without, const std::string& what) {
  PageSet expected = survey.ram;
  expected.remove(survey.touched);
  expected.remove(survey.left_out);
  EXPECT_EQ(survey.zeroed(), expected) << what;
  expected.remove(without);
  std::vector<PageRange> seen;
  survey.for_each_zeroed(without, [&](const PageRange& range) { seen.push_back(range); });
  EXPECT_EQ(seen, PageSet(expected).ranges()) << what;
  for (const std::size_t count : {0U, 1U, 2U, 5U, 255U})
    EXPECT_EQ(survey.largest_zeroed(count, without), expected.largest(count))
        << what << ", the " << count << " largest";
}

PageSet drawn(std::mt19937& random, std::uint64_t universe, std::uint64_t most_ranges, std::uint64_t most_pages) {
  std::vector<PageRange> ranges(random() % (most_ranges + 1));
  for (PageRange& range : ranges) {
    const std::uint64_t first = random() % universe;
    range = pages(first, std::min(1 + random() % most_pages, universe - first));
  }
  return PageSet::of(std::move(ranges));
}

TEST(ZeroedRanges, AreWhatSubtractionLeaves) {
  std::mt19937 random(4711);
  for (int round = 0; round < 4000; ++round) {
    const std::uint64_t universe = 1 + random() % 120;
    const auto draw = [&] { return drawn(random, universe, 1 + random() % 20, 1 + random() % 30); };
    const PageSet ram = draw();
    PageSet touched = draw();
    // A survey's are RAM; nothing depends on it.
    if (round % 2 == 0) touched.intersect(ram);
    const Survey survey = survey_of(ram, std::move(touched), draw());
    expect_same(survey, draw(), "round " + std::to_string(round));
    if (HasFailure()) return;
  }
}

TEST(ZeroedRanges, AreNoneWithoutRamAndAllOfItWithoutAnythingElse) {
  const PageSet some(pages(3, 4));
  expect_same(survey_of({}, {}, {}), {}, "nothing");
  expect_same(survey_of({}, some, some), some, "no RAM");
  expect_same(survey_of(some, {}, {}), {}, "RAM alone");
  EXPECT_EQ(survey_of(some, {}, {}).zeroed(), some);
  EXPECT_TRUE(Survey().largest_zeroed(255).empty());
}

TEST(ZeroedRanges, LeaveOutWhatReachesOverManyOfThem) {
  PageSet ram;
  PageSet touched;
  for (std::uint64_t i = 0; i < 200; ++i) {
    ram.add(pages(10 * i, 8));
    touched.add(pages(10 * i + 3, 1));
  }
  const PageSet over_all(pages(0, 2000));
  expect_same(survey_of(ram, touched, over_all), {}, "all left out");
  EXPECT_TRUE(survey_of(ram, touched, over_all).zeroed().empty());
  expect_same(survey_of(ram, touched, {}), over_all, "all of it without");
  expect_same(survey_of(ram, touched, pages(105, 1000)), pages(700, 900), "from the midst of one to that of another");
  expect_same(survey_of(ram, touched, pages(1998, 50)), pages(2500, 5), "behind all");
  expect_same(survey_of(ram, ram, ram), ram, "the same four times");
}

TEST(ZeroedRanges, MayLieAnywhereInTheGuestPhysicalSpace) {
  PageSet ram(pages(0, all));
  expect_same(survey_of(ram, {}, {}), {}, "all the space");
  expect_same(survey_of(ram, pages(0, 1), pages(all - 1, 1)), {}, "but for its ends");
  expect_same(survey_of(ram, pages(all / 2, all / 2), {}), {}, "the lower half");
  expect_same(survey_of(ram, pages(0, all), {}), pages(all - 1, 1), "none of it");
  expect_same(survey_of(pages(all - 1, 1), {}, {}), pages(all - 2, 1), "the last page");
}

TEST(ZeroedRanges, OfEqualSizeTheLowestAreTheLargest) {
  PageSet touched;
  for (std::uint64_t page = 4; page < 100; page += 5)
    touched.add(pages(page, 1));
  const Survey survey = survey_of(pages(0, 100), touched, {});
  EXPECT_EQ(survey.largest_zeroed(3), (std::vector{pages(0, 4), pages(5, 4), pages(10, 4)}));
  EXPECT_EQ(survey.largest_zeroed(2, pages(0, 6)), (std::vector{pages(10, 4), pages(15, 4)}));
}

TEST(ZeroedRanges, HaveNothingOfWhatWasLeftOut) {
  const Region region = *Region::anonymous(GuestAddress(0), 1000 * page_size);
  // A huge page would be touched as a whole. A kernel without them refuses, and has none.
  madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
  const GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_TRUE(memory.write_value(GuestAddress(500 * page_size), std::uint8_t{1}));
  // Of no RAM too.
  PageSet left_out(pages(10, 5));
  left_out.add(pages(990, 100));
  const Survey survey = memory.survey({.leave_out = left_out});
  EXPECT_EQ(survey.left_out, left_out);
  EXPECT_FALSE(survey.zeroed().intersects(pages(10, 5)));
  EXPECT_FALSE(survey.zeroed().intersects(pages(990, 100)));
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(500)));
  EXPECT_TRUE(survey.zeroed().contains(pages(0, 10)));
  expect_same(survey, pages(0, 3), "of memory");
}

} // namespace
