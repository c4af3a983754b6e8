#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <random>
#include <set>
#include <utility>
#include <vector>
import cppvmm.guest_memory;

using namespace cppvmm;

namespace {

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

/// The set, page by page.
std::set<std::uint64_t> each(const PageSet& set) {
  std::set<std::uint64_t> result;
  for (const PageRange& range : set.ranges())
    for (std::uint64_t page = range.first().value(); page < range.end().value(); ++page)
      result.insert(page);
  return result;
}

TEST(PageSet, JoinsRangesThatTouch) {
  PageSet set;
  set.add(pages(10, 5));
  set.add(pages(20, 5));
  EXPECT_EQ(set.range_count(), 2U);
  set.add(pages(15, 5));
  EXPECT_EQ(PageSet(set).ranges(), std::vector{pages(10, 15)});
  set.add(pages(0, 0));
  EXPECT_EQ(set.page_count(), 15U);
}

TEST(PageSet, IsMadeOfRangesInAnyOrder) {
  EXPECT_EQ(PageSet::of({pages(30, 5), pages(0, 4), pages(2, 6), pages(35, 1), pages(50, 0)}).ranges(),
            (std::vector{pages(0, 8), pages(30, 6)}));
  EXPECT_TRUE(PageSet::of({}).empty());
}

TEST(PageSet, HoldsTheWholeGuestPhysicalSpace) {
  constexpr std::uint64_t all = guest_space_end >> page_shift;
  PageSet set(pages(0, all));
  EXPECT_EQ(set.page_count(), all);
  set.remove(pages(all - 1, 1));
  EXPECT_FALSE(set.contains(PageNumber(all - 1)));
  EXPECT_TRUE(set.contains(PageNumber(all - 2)));
}

TEST(PageSet, GivesTheLargestFirstAndOfEqualsTheLowest) {
  PageSet set;
  set.add(pages(100, 3));
  set.add(pages(0, 3));
  set.add(pages(50, 7));
  set.add(pages(200, 1));
  EXPECT_EQ(set.largest(3), (std::vector{pages(50, 7), pages(0, 3), pages(100, 3)}));
  EXPECT_EQ(set.largest(0), std::vector<PageRange>{});
  EXPECT_EQ(set.largest(99).size(), 4U);
}

TEST(PageSet, GivesTheLargestOfWhatIsLeftWithoutOthers) {
  std::mt19937 random(2550);
  for (int round = 0; round < 300; ++round) {
    const auto drawn = [&] {
      std::vector<PageRange> ranges(random() % 12);
      for (PageRange& range : ranges)
        range = pages(random() % 60, 1 + random() % 9);
      return PageSet::of(std::move(ranges));
    };
    const PageSet set = drawn();
    const PageSet without = drawn();
    PageSet left = set;
    left.remove(without);
    std::vector<PageRange> expected = std::move(left).ranges();
    std::ranges::sort(expected, {}, [](const PageRange& range) { return std::pair(~range.count(), range.first()); });
    for (const std::size_t count : {0U, 1U, 3U, 99U})
      EXPECT_EQ(set.largest(count, without),
                std::vector(expected.begin(),
                            expected.begin() +
                                std::min<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(count), std::ssize(expected))));
  }
}

// No choice of so many ranges, whole ones of the set or parts of them, has more pages than the largest.
TEST(PageSet, GivesTheMostPagesThatSoManyRangesCanHave) {
  constexpr unsigned universe = 12;
  const auto runs = [](unsigned mask) { return std::popcount(mask & ~(mask << 1)); };
  std::mt19937 random(255);
  for (int round = 0; round < 100; ++round) {
    const unsigned mask = random() % (1U << universe);
    PageSet set;
    for (unsigned page = 0; page < universe; ++page)
      if ((mask >> page & 1) != 0) set.add(pages(page, 1));
    for (int count = 0; count <= 6; ++count) {
      int best = 0;
      for (unsigned choice = mask;; choice = (choice - 1) & mask) {
        if (runs(choice) <= count) best = std::max(best, std::popcount(choice));
        if (choice == 0) break;
      }
      std::uint64_t sum = 0;
      const auto chosen = set.largest(static_cast<std::size_t>(count));
      for (const PageRange& range : chosen) {
        EXPECT_TRUE(set.contains(range));
        sum += range.count();
      }
      EXPECT_LE(chosen.size(), static_cast<std::size_t>(count));
      ASSERT_EQ(sum, static_cast<std::uint64_t>(best)) << "set " << mask << ", " << count << " ranges";
    }
  }
}

TEST(PageSet, IsAValue) {
  PageSet original(pages(1, 1));
  PageSet copy = original;
  copy.add(pages(5, 1));
  EXPECT_EQ(original.page_count(), 1U);
  original = copy;
  EXPECT_EQ(original, copy);
  const PageSet& itself = original;
  original = itself;
  EXPECT_EQ(original, copy);
  const PageSet moved = std::move(copy);
  EXPECT_EQ(moved, original);
}

// Random operations on a PageSet and on a std::set of pages come out the same.
TEST(PageSet, AgreesWithASetOfPages) {
  std::mt19937 random(20240521);
  const auto draw = [&](unsigned bound) { return std::uniform_int_distribution<unsigned>(0, bound)(random); };
  for (int round = 0; round < 200; ++round) {
    PageSet set;
    std::set<std::uint64_t> expected;
    for (int step = 0; step < 30; ++step) {
      const PageRange range = pages(draw(200), draw(20));
      PageSet other(pages(draw(200), draw(60)));
      for (unsigned more = draw(6); more > 0; --more)
        other.add(pages(draw(200), draw(30)));
      const auto other_pages = each(other);
      switch (draw(4)) {
      case 0:
        set.add(range);
        for (auto page = range.first().value(); page < range.end().value(); ++page)
          expected.insert(page);
        break;
      case 1:
        set.remove(range);
        for (auto page = range.first().value(); page < range.end().value(); ++page)
          expected.erase(page);
        break;
      case 2:
        set.add(other);
        expected.insert(other_pages.begin(), other_pages.end());
        break;
      case 3:
        set.remove(other);
        for (auto page : other_pages)
          expected.erase(page);
        break;
      default:
        set.intersect(other);
        std::erase_if(expected, [&](auto page) { return !other_pages.contains(page); });
        break;
      }
      ASSERT_EQ(each(set), expected);
      for (std::size_t i = 1; i < set.range_count(); ++i)
        ASSERT_LT(set.ranges()[i - 1].end(), set.ranges()[i].first()) << "ranges that touch are one";
      ASSERT_EQ(set.page_count(), expected.size());
      ASSERT_EQ(set.empty(), expected.empty());
      const auto lower = expected.lower_bound(range.first().value());
      ASSERT_EQ(set.intersects(range), lower != expected.end() && *lower < range.end().value());
      ASSERT_EQ(set.contains(range.first()), expected.contains(range.first().value()));
      std::uint64_t held = 0;
      for (auto page = range.first().value(); page < range.end().value(); ++page)
        held += expected.count(page);
      ASSERT_EQ(set.contains(range), held == range.count());
    }
  }
}

TEST(TouchedMap, UnitesTouchersPageByPage) {
  TouchedMap map;
  map.mark(pages(0, 10), Toucher::host);
  map.mark(pages(5, 10), Toucher::device);
  EXPECT_EQ(map.entries(), (std::vector<TouchedMap::Entry>{{pages(0, 5), Toucher::host},
                                                           {pages(5, 5), Touchers(Toucher::host) | Toucher::device},
                                                           {pages(10, 5), Toucher::device}}));
  EXPECT_TRUE(map.at(PageNumber(7)).has(Toucher::host));
  EXPECT_TRUE(map.at(PageNumber(7)).has(Toucher::device));
  EXPECT_FALSE(map.at(PageNumber(7)).has(Toucher::guest));
  EXPECT_TRUE(map.at(PageNumber(15)).empty());
  EXPECT_EQ(map.pages(), PageSet(pages(0, 15)));
}

TEST(TouchedMap, ForgetsWhatIsCleared) {
  TouchedMap map;
  map.mark(pages(0, 10), Toucher::guest);
  map.clear(pages(2, 3));
  EXPECT_EQ(map.entries(),
            (std::vector<TouchedMap::Entry>{{pages(0, 2), Toucher::guest}, {pages(5, 5), Toucher::guest}}));
  TouchedMap copy = map;
  copy.clear(pages(0, 100));
  EXPECT_TRUE(copy.empty());
  EXPECT_FALSE(map.empty());
}

} // namespace
