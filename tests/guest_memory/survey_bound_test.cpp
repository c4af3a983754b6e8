#include <cstddef>
#include <cstdint>
#include <fstream>
#include <gtest/gtest.h>
#include <optional>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

import cppvmm.guest_memory;

// What a survey keeps is bounded whatever a guest scatters, however many regions there are and whatever is marked.

using namespace cppvmm;

namespace {

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

constexpr std::uint64_t most = 1 << 18; // ranges of a survey

/// Regions that lie side by side. Every other page is touched, more of them than a survey keeps, but in none of the
/// regions alone; every thousandth gap is larger. Each region ends with a gap that goes on in the next one.
class ScatteredOverRegions : public testing::Test {
protected:
  static constexpr std::uint64_t regions = 8;
  static constexpr std::uint64_t extents = most / regions + 500;
  static constexpr std::uint64_t region_pages = 2 * extents + 12'000;

  ScatteredOverRegions() {
    std::vector<Region> all;
    for (std::uint64_t i = 0; i < regions; ++i) {
      all.push_back(*Region::anonymous(GuestAddress(i * region_pages * page_size), region_pages * page_size));
      scatter(all.back(), i);
    }
    zero = PageSet(pages(0, regions * region_pages));
    zero.remove(touched);
    memory.replace(*MemoryMap::make(std::move(all)));
  }

  void scatter(const Region& region, std::uint64_t number) {
    madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
    std::uint64_t page = 3;
    for (std::uint64_t i = 0; i < extents; ++i) {
      static_cast<volatile char*>(region.host_address())[page * page_size] = 1;
      touched.add(pages(number * region_pages + page, 1));
      page += i % 1000 == 999 ? 3 + number + i / 1000 : 2;
    }
  }

  PageSet touched;
  PageSet zero;
  GuestMemory memory;
};

TEST_F(ScatteredOverRegions, TheLargestRangesOfAllAreKept) {
  const Survey survey = memory.survey();
  EXPECT_LE(survey.zeroed().range_count(), most);
  EXPECT_LE(survey.touched.range_count(), most + 1);
  EXPECT_EQ(survey.zeroed().largest(255), zero.largest(255));
  PageSet missing = touched;
  missing.remove(survey.touched);
  EXPECT_TRUE(missing.empty());
  PageSet both = survey.touched;
  both.add(survey.zeroed());
  EXPECT_EQ(both, survey.ram);
}

TEST_F(ScatteredOverRegions, EachRegionSaysWhatWasGivenUp) {
  const Survey survey = memory.survey();
  std::uint64_t given_up = 0;
  for (const RegionSurvey& region : survey.regions) {
    PageSet kept = survey.zeroed();
    kept.intersect(region.pages);
    EXPECT_EQ(region.zeroed_pages, kept.page_count());
    EXPECT_EQ(region.touched_pages + region.given_up_pages + region.zeroed_pages, region_pages);
    given_up += region.given_up_pages;
  }
  EXPECT_GT(given_up, 0U);
  EXPECT_EQ(survey.zeroed().page_count() + given_up, zero.page_count());
}

/// The same, with marks in place of all stores, or of every other one.
class MarkedOverRegions : public ScatteredOverRegions, public testing::WithParamInterface<bool> {
protected:
  MarkedOverRegions() {
    const auto map = memory.snapshot();
    for (const Region& region : map->regions())
      EXPECT_TRUE(region.discard(region.pages()));
    std::uint64_t number = 0;
    for (const PageRange& range : touched.ranges())
      if (++number % 2 == 0 || GetParam())
        memory.mark_touched(range, number % 3 == 0 ? Toucher::device : Toucher::host);
      else
        EXPECT_TRUE(memory.write_value(range.start_address(), std::uint8_t{1}));
  }
};

INSTANTIATE_TEST_SUITE_P(Marks, MarkedOverRegions, testing::Values(true, false),
                         [](const auto& info) { return info.param ? "Alone" : "BesideEvidence"; });

TEST_P(MarkedOverRegions, TheLargestRangesOfAllAreKept) {
  const Survey survey = memory.survey();
  EXPECT_LE(survey.zeroed().range_count(), most);
  EXPECT_LE(survey.touched.range_count(), most + 1);
  EXPECT_LE(survey.touchers.entry_count(), most);
  EXPECT_GE(survey.touchers.entry_count(), most / 2);
  PageSet unmarked = survey.touchers.pages();
  unmarked.remove(memory.marks().pages());
  EXPECT_TRUE(unmarked.empty());
  EXPECT_EQ(survey.zeroed().largest(255), zero.largest(255));
  PageSet missing = touched;
  missing.remove(survey.touched);
  EXPECT_TRUE(missing.empty());
  PageSet both = survey.touched;
  both.add(survey.zeroed());
  EXPECT_EQ(both, survey.ram);
  std::uint64_t given_up = 0;
  for (const RegionSurvey& region : survey.regions)
    given_up += region.given_up_pages;
  EXPECT_GT(given_up, 0U);
  EXPECT_EQ(survey.zeroed().page_count() + given_up, zero.page_count());
}

// More marks than a survey keeps ranges are in two regions of three; what is touched by evidence goes over their
// border.
TEST(MarksOfManyRegions, AreAddedWhereTheSurveyIsBoundedBeforeItsEnd) {
  constexpr std::uint64_t marks = most / 2 + 1000;
  constexpr std::uint64_t region_pages = 2 * marks + 300'000;
  constexpr std::uint64_t rom_pages = 16;
  const std::uint64_t starts[] = {0, region_pages, 2 * region_pages + rom_pages};
  std::vector<Region> regions;
  for (const std::uint64_t start : starts)
    regions.push_back(*Region::anonymous(GuestAddress(start * page_size), region_pages * page_size));
  for (const Region& region : regions)
    madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
  regions.push_back(
      *Region::anonymous(GuestAddress(2 * region_pages * page_size), rom_pages * page_size, RegionKind::rom));
  GuestMemory memory(*MemoryMap::make(std::move(regions)));
  PageSet touched;
  std::uint64_t number = 0;
  for (const std::uint64_t start : starts) {
    std::uint64_t page = start;
    for (std::uint64_t i = 0; i < marks; ++i) {
      touched.add(pages(page, 1));
      memory.mark_touched(pages(page, 1), i % 2 == 0 ? Toucher::device : Toucher::host);
      // Each of the larger gaps has a size of its own.
      page += 2 + (i % 400 == 399 ? ++number : 0);
    }
    ASSERT_LT(page, start + region_pages - 2);
  }
  const PageRange over_the_border = pages(region_pages - 2, 5);
  for (std::uint64_t page = over_the_border.first().value(); page < over_the_border.end().value(); ++page)
    ASSERT_TRUE(memory.write_value(GuestAddress(page * page_size), std::uint8_t{1}));
  touched.add(over_the_border);

  const Survey survey = memory.survey();
  PageSet zero = survey.ram;
  EXPECT_EQ(zero.page_count(), 3 * region_pages);
  zero.remove(touched);
  PageSet missing = touched;
  missing.remove(survey.touched);
  EXPECT_TRUE(missing.empty());
  PageSet both = survey.touched;
  both.add(survey.zeroed());
  EXPECT_EQ(both, survey.ram);
  EXPECT_LE(survey.zeroed().range_count(), most);
  EXPECT_EQ(survey.zeroed().largest(255), zero.largest(255));
  ASSERT_EQ(survey.regions.size(), 4U);
  std::uint64_t given_up = 0;
  for (const RegionSurvey& region : survey.regions) {
    if (region.kind == RegionKind::ram) {
      EXPECT_EQ(region.touched_pages + region.given_up_pages + region.zeroed_pages, region_pages);
    }
    given_up += region.given_up_pages;
  }
  EXPECT_GT(given_up, 0U);
  EXPECT_EQ(survey.zeroed().page_count() + given_up, zero.page_count());
  EXPECT_LE(survey.touchers.entry_count(), most);
  EXPECT_GE(survey.touchers.entry_count(), most / 2);
}

/// As much RAM as is marked here, none of it touched.
class Marks : public testing::Test {
protected:
  static constexpr std::uint64_t marks = 3 * GuestMemory::most_marks;
  static constexpr std::uint64_t all = 4 * marks;

  GuestMemory memory{*MemoryMap::make({*Region::anonymous(GuestAddress(0), all* page_size)})};
};

TEST_F(Marks, OfTooManyNeighboursAreJoinedAndNoneIsLost) {
  PageSet marked;
  for (std::uint64_t i = 0; i < marks; ++i) {
    // Behind every hundredth, the gap is larger.
    const std::uint64_t page = 2 * i + i / 100;
    memory.mark_touched(pages(page, 1), i % 2 == 0 ? Toucher::device : Toucher::guest);
    marked.add(pages(page, 1));
    if (i % 10'000 == 0) {
      ASSERT_LE(memory.marks().entry_count(), GuestMemory::most_marks);
    }
  }
  const TouchedMap kept = memory.marks();
  EXPECT_LE(kept.entry_count(), GuestMemory::most_marks);
  PageSet lost = marked;
  lost.remove(kept.pages());
  EXPECT_TRUE(lost.empty());
  const Survey survey = memory.survey();
  EXPECT_EQ(survey.touched, marked);
  EXPECT_EQ(survey.touchers.pages(), marked);
  // What is behind the last one is larger than any gap.
  EXPECT_EQ(survey.zeroed().largest(1).front().end(), PageNumber(all));
  EXPECT_FALSE(kept.at(PageNumber(0)).empty());
  EXPECT_TRUE(kept.at(PageNumber(0)).has(Toucher::device));

  memory.clear_marks(pages(0, all));
  EXPECT_TRUE(memory.marks().empty());
  EXPECT_EQ(memory.survey().zeroed().page_count(), all);
}

TEST_F(Marks, AreBoundedWhereTheyAreTakenBackToo) {
  memory.mark_touched(pages(0, all), Toucher::device);
  for (std::uint64_t i = 0; i < GuestMemory::most_marks + 10; ++i)
    memory.clear_marks(pages(2 * i, 1));
  EXPECT_LE(memory.marks().entry_count(), GuestMemory::most_marks);
  PageSet holes;
  for (std::uint64_t i = 0; i < GuestMemory::most_marks + 100; ++i)
    holes.add(pages(2 * i, 1));
  ASSERT_TRUE(memory.discard(holes));
  EXPECT_LE(memory.marks().entry_count(), GuestMemory::most_marks);
  EXPECT_TRUE(memory.marks().at(PageNumber(1)).has(Toucher::device));
}

TEST(TouchedMap, JoinsTheNeighboursThatAreClosest) {
  TouchedMap map;
  map.mark(pages(10, 1), Toucher::host);
  map.mark(pages(13, 1), Toucher::guest);
  map.mark(pages(14, 2), Toucher::device);
  map.mark(pages(30, 1), Toucher::host);
  map.mark(pages(40, 1), Toucher::host);
  EXPECT_EQ(map.entry_count(), 5U);
  const TouchedMap before = map;
  map.join_neighbours(5);
  EXPECT_EQ(map, before);
  map.join_neighbours(3);
  EXPECT_EQ(map.entries(),
            (std::vector<TouchedMap::Entry>{{pages(10, 6), Touchers(Toucher::host) | Toucher::guest | Toucher::device},
                                            {pages(30, 1), Toucher::host},
                                            {pages(40, 1), Toucher::host}}));
  map.join_neighbours(0);
  EXPECT_EQ(map.entries().size(), 1U);
  EXPECT_EQ(map.entries().front().pages, pages(10, 31));
}

} // namespace
