#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <iterator>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../../guest_memory/memory/extents.hpp"

// Extents that are kept as bytes come out as they would of a vector of them, whoever decides what they are.

namespace {

using cppvmm::Extent;
using cppvmm::ExtentList;

static_assert(std::forward_iterator<ExtentList::Iterator>);

constexpr std::uint64_t all_pages = std::uint64_t{1} << 40;
constexpr std::uint64_t largest = std::numeric_limits<std::uint64_t>::max();

/// The same by a vector, extent by extent.
struct Model {
  explicit Model(std::size_t most = ExtentList::default_limit) : limit(most) {}

  std::size_t limit;
  std::vector<Extent> extents = {};
  std::uint64_t pages = 0;
  std::uint64_t given_up = 0;

  void add(Extent extent) {
    if (extent.count == 0) return;
    if (extents.empty() || extent.first > extents.back().end()) {
      extents.push_back(extent);
      pages += extent.count;
      if (extents.size() > limit) give_up();
      return;
    }
    // What comes out of order takes all that is behind its start with it.
    auto from = std::ranges::find_if(extents, [&](const Extent& each) { return each.end() >= extent.first; });
    for (auto each = std::next(from); each != extents.end(); ++each)
      given_up += each->first - std::prev(each)->end();
    const std::uint64_t first = std::min(from->first, extent.first);
    const std::uint64_t end = std::max(extents.back().end(), extent.end());
    pages += (from->first - first) + (end - extents.back().end());
    *from = {first, end - first};
    extents.erase(std::next(from), extents.end());
  }

  /// The largest gaps stay, of equals the first.
  void give_up() {
    const std::size_t keep = std::max<std::size_t>(limit / 2, 1);
    std::vector<std::pair<std::uint64_t, std::size_t>> gaps; // inverted, so that the largest comes first
    for (std::size_t i = 1; i < extents.size(); ++i)
      gaps.emplace_back(~(extents[i].first - extents[i - 1].end()), i);
    if (gaps.size() <= keep) return;
    std::ranges::sort(gaps);
    std::vector<bool> is_kept(extents.size());
    for (const auto& gap : std::span(gaps).first(keep))
      is_kept[gap.second] = true;
    std::vector<Extent> joined = {extents.front()};
    for (std::size_t i = 1; i < extents.size(); ++i) {
      if (is_kept[i]) {
        joined.push_back(extents[i]);
        continue;
      }
      given_up += extents[i].first - joined.back().end();
      joined.back().count = extents[i].end() - joined.back().first;
    }
    extents = std::move(joined);
  }
};

void expect_same(const ExtentList& list, const Model& model, const std::string& what) {
  ASSERT_EQ(list.to_vector(), model.extents) << what;
  ASSERT_EQ(list.size(), model.extents.size()) << what;
  ASSERT_EQ(list.empty(), model.extents.empty()) << what;
  ASSERT_EQ(list.page_count(), model.pages) << what;
  ASSERT_EQ(list.given_up_pages(), model.given_up) << what;
}

/// The one that comes next, by the last: mostly behind it, with numbers of all sizes.
class Draw {
public:
  explicit Draw(std::uint64_t seed) : random_(seed) {}

  std::uint64_t below(std::uint64_t bound) { return random_() % bound; }
  /// As likely of one size in bits as of another.
  std::uint64_t of_any_size(unsigned most_bits) { return random_() >> (63 - below(most_bits)); }

  Extent next(const Model& model, unsigned most_bits, unsigned unordered_of_100) {
    const Extent last = model.extents.empty() ? Extent{} : model.extents.back();
    const std::uint64_t count = of_any_size(most_bits) + (below(50) == 0 ? 0 : 1);
    if (below(100) >= unordered_of_100) return {last.end() + of_any_size(most_bits), count};
    if (model.extents.empty() || below(2) == 0) return {below(last.end() + 1), count};
    // At the edges of one that is there, or beside them.
    const Extent at = model.extents[below(model.extents.size())];
    const std::uint64_t edge = below(2) == 0 ? at.first : at.end();
    return {std::max<std::uint64_t>(edge + below(3), 1) - 1, count};
  }

private:
  std::mt19937_64 random_;
};

TEST(ExtentList, AgreesWithAVector) {
  for (std::uint64_t seed = 0; seed < 600; ++seed) {
    Draw draw(seed);
    const std::size_t limit = seed % 3 == 0 ? ExtentList::default_limit : draw.below(40);
    const unsigned most_bits = seed % 2 == 0 ? 9 : 44; // 44: over all the guest-physical space in the end
    const unsigned unordered_of_100 = seed % 5 == 0 ? 0 : static_cast<unsigned>(draw.below(30));
    ExtentList list(limit);
    Model model(limit);
    for (int step = 0; step < 400; ++step) {
      const Extent extent = draw.next(model, most_bits, unordered_of_100);
      list.add(extent);
      model.add(extent);
      if (step % 16 != 0) continue;
      ASSERT_NO_FATAL_FAILURE(expect_same(list, model, "seed " + std::to_string(seed)));
    }
    ASSERT_NO_FATAL_FAILURE(expect_same(list, model, "seed " + std::to_string(seed)));
  }
}

// What lies in many blocks comes out of order, again and again.
TEST(ExtentList, AgreesWithAVectorOverManyBlocks) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    Draw draw(1000 + seed);
    ExtentList list;
    Model model;
    for (int round = 0; round < 12; ++round) {
      for (std::uint64_t more = draw.below(6000); more > 0; --more) {
        const Extent extent = draw.next(model, seed % 2 == 0 ? 8 : 34, 0);
        list.add(extent);
        model.add(extent);
      }
      const Extent back = draw.next(model, 10, 100);
      list.add(back);
      model.add(back);
      ASSERT_NO_FATAL_FAILURE(expect_same(list, model, "seed " + std::to_string(seed)));
    }
  }
}

TEST(ExtentList, LosesNoPageThatWasAdded) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Draw draw(seed);
    ExtentList list(2 + draw.below(10));
    std::vector<bool> added(4096);
    for (int step = 0; step < 60; ++step) {
      const std::uint64_t first = draw.below(added.size());
      const std::uint64_t count = std::min<std::uint64_t>(draw.below(8), added.size() - first);
      list.add({first, count});
      std::fill_n(added.begin() + static_cast<std::ptrdiff_t>(first), count, true);
    }
    std::uint64_t covered = 0;
    for (const Extent extent : list) {
      covered += extent.count;
      std::fill_n(added.begin() + static_cast<std::ptrdiff_t>(extent.first), extent.count, false);
    }
    EXPECT_EQ(std::ranges::count(added, true), 0) << "seed " << seed;
    EXPECT_EQ(list.page_count() + list.given_up_pages(), covered) << "seed " << seed;
  }
}

TEST(ExtentList, JoinsWhatTouchesAndOverlaps) {
  ExtentList list;
  list.add({10, 5});
  list.add({15, 1});
  list.add({12, 10});
  list.add({13, 2});
  list.add({30, 0});
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{10, 12}}));
  EXPECT_EQ(list.page_count(), 12U);
  list.add({23, 1});
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{10, 12}, {23, 1}}));
  EXPECT_EQ(list.given_up_pages(), 0U);
}

TEST(ExtentList, MakesOneOfAllBehindWhatComesOutOfOrder) {
  ExtentList list;
  for (const std::uint64_t first : {10U, 20U, 30U, 40U})
    list.add({first, 2});
  list.add({25, 1});
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{10, 2}, {20, 2}, {25, 17}}));
  EXPECT_EQ(list.given_up_pages(), 8U);
  list.add({0, 1});
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{0, 42}}));
  list.add({50, 1});
  list.shift_up(7);
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{7, 42}, {57, 1}}));
}

TEST(ExtentList, KeepsNumbersOfAllSizes) {
  std::vector<std::uint64_t> numbers = {1, largest / 2};
  for (unsigned bits = 1; bits < 52; ++bits)
    for (const std::uint64_t less : {1U, 0U})
      numbers.push_back((std::uint64_t{1} << bits) - less);
  for (const std::uint64_t gap : numbers)
    for (const std::uint64_t count : numbers) {
      if (count > largest / 2 - 10 || gap > largest / 2 - 10) continue;
      const std::vector<Extent> extents = {{3, count}, {3 + count + gap, 1}, {3 + count + gap + 3, 2}};
      ExtentList list;
      for (const Extent& extent : extents)
        list.add(extent);
      ASSERT_EQ(list.to_vector(), extents) << gap << ", " << count;
      // Read from behind, too.
      list.add({3 + count + gap + 1, 1});
      ASSERT_EQ(list.to_vector(), (std::vector<Extent>{{3, count}, {3 + count + gap, 5}})) << gap << ", " << count;
      list.add({3 + count, 1});
      ASSERT_EQ(list.to_vector(), (std::vector<Extent>{{3, count + gap + 5}})) << gap << ", " << count;
    }
}

TEST(ExtentList, EndsWithTheLargestNumber) {
  ExtentList list;
  list.add({0, 1});
  list.add({largest - 5, largest});
  list.add({largest, 1}); // there is no such page
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{0, 1}, {largest - 5, 5}}));
  list.add({2, largest});
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{0, 1}, {2, largest - 2}}));
  list.add({0, largest});
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{0, largest}}));
  EXPECT_EQ(list.page_count() + list.given_up_pages(), largest);
}

// The largest gaps stay wherever they are, and no number of extents takes more than its limit.
TEST(ExtentList, GivesUpTheSmallestGapsPastItsLimit) {
  constexpr std::size_t limit = 1000;
  ExtentList list(limit);
  std::vector<std::uint64_t> starts; // of what is behind a large gap
  std::uint64_t page = 0;
  std::uint64_t added = 0;
  for (std::uint64_t i = 0; i < 100'000; ++i) {
    const bool is_large = i % 400 == 399; // 250 of them
    page += is_large ? 1000 + i : 1 + i % 7;
    if (is_large) starts.push_back(page);
    list.add({page, 2});
    added += 2;
    page += 2;
    ASSERT_LE(list.size(), limit);
  }
  std::vector<std::uint64_t> kept;
  for (const Extent extent : list)
    kept.push_back(extent.first);
  for (const std::uint64_t start : starts)
    EXPECT_TRUE(std::ranges::binary_search(kept, start)) << start;
  EXPECT_EQ(list.page_count(), added);
  EXPECT_GT(list.given_up_pages(), 0U);
}

// Each takes back what was added before, or nearly so: what that costs must not grow with what is there.
TEST(ExtentList, TakesAHostileOrderInItsStride) {
  constexpr std::uint64_t many = 200'000;
  ExtentList list;
  for (std::uint64_t i = 0; i < many; ++i)
    list.add({(std::uint64_t{1} << 40) + 3 * i, 1});
  for (std::uint64_t i = 0; i < 10 * many; ++i) {
    list.add({(std::uint64_t{1} << 41) + 3 * i, 1});
    list.add({(std::uint64_t{1} << 41) + 3 * i - 1, 1});
  }
  ExtentList descending;
  for (std::uint64_t i = 10 * many; i > 0; --i)
    descending.add({3 * i, 1});
  EXPECT_EQ(descending.to_vector(), (std::vector<Extent>{{3, 30 * many - 2}}));
  EXPECT_LE(list.size(), ExtentList::default_limit);
  list.add({0, 1});
  EXPECT_EQ(list.size(), 1U);
}

TEST(ExtentList, MovesToAnotherStart) {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    Draw draw(seed);
    ExtentList list;
    Model model;
    for (int step = 0; step < 100; ++step) {
      const std::uint64_t by = draw.of_any_size(40);
      const bool is_up = model.extents.empty() || model.extents.front().first < by || draw.below(2) == 0;
      if (is_up)
        list.shift_up(by);
      else
        list.shift_down(by);
      for (Extent& extent : model.extents)
        extent.first = is_up ? extent.first + by : extent.first - by;
      const Extent extent = draw.next(model, 20, 10);
      list.add(extent);
      model.add(extent);
      ASSERT_NO_FATAL_FAILURE(expect_same(list, model, "seed " + std::to_string(seed)));
    }
  }
}

TEST(ExtentList, IsAValue) {
  ExtentList original(100);
  Model model(100);
  Draw draw(7);
  const auto add_to = [&](ExtentList& list, Model& beside) {
    for (int i = 0; i < 90; ++i) {
      const Extent extent = draw.next(beside, 30, 3);
      list.add(extent);
      beside.add(extent);
    }
  };
  add_to(original, model);
  ExtentList copy = original;
  Model copied = model;
  add_to(copy, copied);
  ASSERT_NO_FATAL_FAILURE(expect_same(original, model, "the original"));
  ASSERT_NO_FATAL_FAILURE(expect_same(copy, copied, "the copy"));
  ExtentList moved = std::move(copy);
  ASSERT_NO_FATAL_FAILURE(expect_same(moved, copied, "what it was moved to"));
  EXPECT_TRUE(copy.empty()); // NOLINT(bugprone-use-after-move): it is a list like any other
  EXPECT_TRUE(copy.begin() == copy.end());
  EXPECT_EQ(copy.page_count(), 0U);
  copy = original;
  add_to(copy, model);
  ASSERT_NO_FATAL_FAILURE(expect_same(copy, model, "assigned"));
  original = std::move(moved);
  ASSERT_NO_FATAL_FAILURE(expect_same(original, copied, "assigned by moving"));
  const ExtentList& itself = original;
  original = itself;
  ASSERT_NO_FATAL_FAILURE(expect_same(original, copied, "assigned to itself"));
}

TEST(ExtentList, IsIteratedAsOftenAsWanted) {
  ExtentList list;
  EXPECT_TRUE(list.begin() == list.end());
  for (std::uint64_t i = 0; i < 5000; ++i)
    list.add({i * 1000, 1 + i % 300});
  auto at = list.begin();
  for (std::uint64_t i = 0; i < 5000; ++i) {
    const auto here = at++;
    ASSERT_EQ(*here, (Extent{i * 1000, 1 + i % 300}));
    ASSERT_TRUE(here != at);
  }
  EXPECT_TRUE(at == list.end());
  EXPECT_EQ(std::ranges::distance(list), 5000);
}

TEST(ExtentList, HoldsTheWholeGuestPhysicalSpace) {
  ExtentList list;
  for (std::uint64_t i = 0; i < 64; ++i)
    list.add({all_pages / 64 * i, all_pages / 64 - 1});
  EXPECT_EQ(list.size(), 64U);
  EXPECT_EQ(list.page_count(), all_pages - 64);
  list.add({0, all_pages});
  EXPECT_EQ(list.to_vector(), (std::vector<Extent>{{0, all_pages}}));
}

} // namespace
