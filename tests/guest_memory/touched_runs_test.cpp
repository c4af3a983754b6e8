#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <random>
#include <utility>
#include <vector>

import cppvmm.guest_memory;

// Who wrote which pages, in order: the same as the interval map of Boost.ICL says.

using namespace cppvmm;

namespace {

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

using Entries = std::vector<TouchedRange>;

struct Drawn {
  TouchedRuns runs;
  TouchedMap map; ///< The same.
};

/// Ranges in ascending order, some side by side, some far away or large.
Drawn draw(std::mt19937_64& random, std::size_t most) {
  Drawn drawn;
  std::uint64_t page = 0;
  for (std::size_t i = random() % (most + 1); i > 0; --i) {
    page += random() % 3 == 0 ? 0 : random() % 20 + (random() % 30 == 0 ? std::uint64_t{1} << random() % 40 : 0);
    const std::uint64_t count = random() % 9 + (random() % 30 == 0 ? std::uint64_t{1} << random() % 40 : 0);
    if (page + count > guest_space_end / page_size) break;
    const Touchers by = Touchers::from_bits(static_cast<std::uint8_t>(random() % 16));
    drawn.runs.add(pages(page, count), by);
    drawn.map.mark(pages(page, count), by);
    page += count;
  }
  return drawn;
}

TEST(TouchedRuns, AreJoinedWhereTheyTouchAndHaveTheSameTouchers) {
  TouchedRuns runs;
  EXPECT_TRUE(runs.empty());
  runs.add(pages(3, 2), Toucher::host);
  runs.add(pages(5, 1), Toucher::host);
  runs.add(pages(6, 1), Toucher::guest);
  runs.add(pages(9, 0), Toucher::device);
  runs.add(pages(9, 1), Touchers());
  runs.add(pages(10, 1), Toucher::guest);
  EXPECT_EQ(runs.entry_count(), 3U);
  EXPECT_EQ(runs.entries(),
            (Entries{{pages(3, 3), Toucher::host}, {pages(6, 1), Toucher::guest}, {pages(10, 1), Toucher::guest}}));
  PageSet all(pages(3, 4));
  all.add(pages(10, 1));
  EXPECT_EQ(runs.pages(), all);
}

TEST(TouchedRuns, TakePagesBehindAllOthersAlone) {
  TouchedRuns runs;
  runs.add(pages(10, 5), Toucher::host);
  runs.add(pages(2, 3), Toucher::guest);
  runs.add(pages(12, 3), Toucher::guest);
  runs.add(pages(12, 4), Toucher::guest);
  EXPECT_EQ(runs.entries(), (Entries{{pages(10, 5), Toucher::host}, {pages(15, 1), Toucher::guest}}));
}

TEST(TouchedRuns, AreUnitedAsInAnIntervalMap) {
  std::mt19937_64 random(20261201);
  for (int round = 0; round < 3000; ++round) {
    const auto [left, left_map] = draw(random, 60);
    const auto [right, right_map] = draw(random, 60);
    ASSERT_EQ(left.entries(), left_map.entries()) << "round " << round;
    ASSERT_EQ(left.entry_count(), left_map.entry_count());
    ASSERT_EQ(TouchedMap(left), left_map);
    TouchedMap expected = left_map;
    for (const TouchedRange& range : right_map.entries())
      expected.mark(range.pages, range.by);
    const TouchedRuns united = TouchedRuns::united(left, right);
    ASSERT_EQ(united.entries(), expected.entries()) << "round " << round;
    ASSERT_EQ(united.entry_count(), expected.entry_count());
    ASSERT_EQ(united.pages(), expected.pages());
    ASSERT_EQ(TouchedRuns::united(right, left), united);
  }
}

TEST(TouchedRuns, AreValues) {
  TouchedRuns runs;
  runs.add(pages(1, 1), Toucher::host);
  TouchedRuns copy = runs;
  copy.add(pages(5, 1), Toucher::device);
  EXPECT_EQ(runs.entry_count(), 1U);
  const TouchedRuns moved = std::move(copy);
  EXPECT_EQ(moved.entry_count(), 2U);
  copy = runs;
  EXPECT_EQ(copy, runs);
  EXPECT_NE(copy, moved);
  TouchedRuns behind;
  behind.add(pages(2, 1), Toucher::host);
  behind.add(pages(4, 1), Toucher::guest);
  copy.add(behind);
  EXPECT_EQ(copy.entries(), (Entries{{pages(1, 2), Toucher::host}, {pages(4, 1), Toucher::guest}}));
}

TEST(TouchedRuns, ForgetNothingOfARangeThatGoesOn) {
  TouchedRuns runs(4);
  for (std::uint64_t i = 0; i < 4; ++i)
    runs.add(pages(1000 * i, 100), Toucher::guest);
  runs.add(pages(5000, 90), Toucher::guest);
  runs.add(pages(5090, 3910), Toucher::guest);
  EXPECT_LE(runs.entry_count(), 4U);
  EXPECT_EQ(runs.entries().back(), (TouchedRange{pages(5000, 4000), Toucher::guest}));

  TouchedRuns left(4);
  for (std::uint64_t i = 0; i < 3; ++i)
    left.add(pages(1000 * i, 100), Toucher::host);
  left.add(pages(5000, 4000), Toucher::host);
  TouchedRuns right(4);
  right.add(pages(900, 1), Toucher::host);
  right.add(pages(5090, 1), Toucher::host);
  const TouchedRuns united = TouchedRuns::united(left, right);
  EXPECT_LE(united.entry_count(), 4U);
  EXPECT_EQ(united.entries().back(), (TouchedRange{pages(5000, 4000), Toucher::host}));
}

TEST(TouchedRuns, HaveRoomForTwoAtLeast) {
  TouchedRuns runs(0);
  for (std::uint64_t i = 0; i < 10; ++i)
    runs.add(pages(10 * i, i == 3 ? 9 : 1), Toucher::guest);
  EXPECT_LE(runs.entry_count(), 2U);
  EXPECT_EQ(runs.entries().front().pages, pages(30, 9));
}

TEST(TouchedRuns, KeepTheLargestWhereThereAreTooMany) {
  constexpr std::size_t limit = 1000;
  std::mt19937_64 random(7);
  TouchedRuns runs(limit);
  Entries added;
  std::uint64_t page = 0;
  for (int i = 0; i < 20'000; ++i) {
    page += 1 + random() % 5;
    const std::uint64_t count = 1 + random() % 50 + (random() % 100 == 0 ? 1000 : 0);
    added.push_back({pages(page, count), random() % 2 == 0 ? Toucher::guest : Toucher::device});
    runs.add(added.back().pages, added.back().by);
    ASSERT_LE(runs.entry_count(), limit);
    page += count;
  }
  const Entries kept = runs.entries();
  EXPECT_GE(kept.size(), limit / 2);
  EXPECT_TRUE(std::ranges::is_sorted(kept, {}, [](const TouchedRange& range) { return range.pages.first(); }));
  for (const TouchedRange& range : kept)
    ASSERT_TRUE(std::ranges::find(added, range) != added.end());
  std::ranges::sort(added, std::ranges::greater(), [](const TouchedRange& range) { return range.pages.count(); });
  // Of those that are as large as the last of them, some may be missing.
  const std::uint64_t least = added[limit / 2 - 1].pages.count();
  for (const TouchedRange& range : added) {
    if (range.pages.count() == least) break;
    ASSERT_TRUE(std::ranges::find(kept, range) != kept.end()) << range.pages.count();
  }
}

} // namespace
