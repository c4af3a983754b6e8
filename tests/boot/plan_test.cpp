#include "tests/guests/zeroing/plan.hpp"

#include <cstdint>
#include <gtest/gtest.h>
#include <random>
#include <vector>

namespace {

using namespace cppvmm::zeroing;

std::vector<Pages> plan_for(const std::vector<Pages>& ram, std::vector<Pages> cuts) {
  std::vector<Pages> out(ram.size() + cuts.size());
  out.resize(subtract(ram.data(), ram.size(), cuts.data(), cuts.size(), out.data()));
  return out;
}

std::vector<bool> pages_of(const std::vector<Pages>& ranges, std::size_t limit) {
  std::vector<bool> set(limit);
  for (const auto& range : ranges)
    for (std::uint64_t page = range.first; page < clamped_end(range) && page < limit; ++page)
      set[page] = true;
  return set;
}

TEST(ZeroingPlan, WithoutAnAnswerIsAllRamButWhatTheGuestLivesIn) {
  const auto plan = plan_for({{0, 100}, {200, 50}}, {{16, 4}});
  ASSERT_EQ(plan.size(), 3U);
  EXPECT_EQ(plan[0].first, 0U);
  EXPECT_EQ(plan[0].count, 16U);
  EXPECT_EQ(plan[1].first, 20U);
  EXPECT_EQ(plan[1].count, 80U);
  EXPECT_EQ(plan[2].first, 200U);
  EXPECT_EQ(plan[2].count, 50U);
}

TEST(ZeroingPlan, IsEmptyWhenEverythingIsReported) {
  EXPECT_TRUE(plan_for({{0, 100}, {200, 50}}, {{0, UINT64_MAX}}).empty());
  EXPECT_TRUE(plan_for({{0, 100}, {200, 50}}, {{150, 100}, {0, 40}, {40, 60}}).empty());
}

TEST(ZeroingPlan, TakesRangesThatTheHostMadeUp) {
  // Empty, wrapping, beyond the address space, and where there is no RAM.
  const auto plan = plan_for({{0, 100}}, {{UINT64_MAX, 1},
                                          {UINT64_MAX, UINT64_MAX},
                                          {50, 0},
                                          {page_number_end, 5},
                                          {100, 1000},
                                          {90, UINT64_MAX},
                                          {std::uint64_t{1} << 63, std::uint64_t{1} << 63}});
  ASSERT_EQ(plan.size(), 1U);
  EXPECT_EQ(plan[0].first, 0U);
  EXPECT_EQ(plan[0].count, 90U);
}

TEST(ZeroingPlan, IsRamLessTheUnionOfTheCutsWhateverTheirOrder) {
  std::mt19937_64 random(20250101);
  const auto below = [&](std::uint64_t bound) { return random() % bound; };
  constexpr std::size_t limit = 3000;
  for (int round = 0; round < 2000; ++round) {
    std::vector<Pages> ram;
    for (std::uint64_t at = below(50); ram.size() < max_ram_ranges && at < limit - 400;) {
      ram.push_back({at, 1 + below(400)});
      at += ram.back().count + below(3) * below(200);
    }
    std::vector<Pages> cuts(below(max_reported_ranges + max_lives_in_ranges + 1));
    for (auto& cut : cuts)
      cut = {below(limit + 100), below(round % 2 == 0 ? 8 : 300)};

    const auto plan = plan_for(ram, cuts);

    ASSERT_LE(plan.size(), max_planned_ranges);
    auto expected = pages_of(ram, limit);
    const auto cut_pages = pages_of(cuts, limit);
    for (std::size_t page = 0; page < limit; ++page)
      expected[page] = expected[page] && !cut_pages[page];
    ASSERT_EQ(pages_of(plan, limit), expected) << "round " << round;
    for (std::size_t i = 0; i < plan.size(); ++i) {
      ASSERT_NE(plan[i].count, 0U);
      if (i != 0) {
        ASSERT_GE(plan[i].first, plan[i - 1].first + plan[i - 1].count) << "a page planned twice";
      }
    }
  }
}

TEST(ZeroingPlan, SeesOverlaps) {
  EXPECT_TRUE(overlap({10, 5}, {14, 1}));
  EXPECT_FALSE(overlap({10, 5}, {15, 1}));
  EXPECT_FALSE(overlap({10, 5}, {12, 0}));
  EXPECT_TRUE(overlap({0, UINT64_MAX}, {14, 1}));
  EXPECT_FALSE(overlap({UINT64_MAX, UINT64_MAX}, {0, 10}));
}

} // namespace
