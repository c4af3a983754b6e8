#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <new>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

#include "support/failing_allocations.hpp"

#include "../../guest_memory/memory/extents.hpp"
#include "support/surveyed_memory.hpp"

import cppvmm.guest_memory;

// A process that has no memory left: a guest can ask again and again, so each call that throws must leave nothing
// behind. Every allocation of a call is failed in its turn.

using namespace cppvmm;
using test::MemoryKind;

namespace {

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

constexpr MemoryKind kinds[] = {
    {"anonymous", Backing::anonymous},
    {"anonymous_legacy", Backing::anonymous, EvidenceSource::legacy},
    {"memfd", Backing::memfd},
    {"memfd_legacy", Backing::memfd, EvidenceSource::legacy},
    {"shared_anonymous", Backing::shared_anonymous},
    {"hugetlb", Backing::hugetlb},
    {"hugetlb_memfd", Backing::hugetlb_memfd},
    {"private_file", Backing::private_file},
    {"shared_file", Backing::shared_file},
};

class OutOfMemory : public test::SurveyedMemory, public testing::WithParamInterface<MemoryKind> {
protected:
  [[nodiscard]] MemoryKind kind() const override { return GetParam(); }

  static void expect_nothing_left(const std::function<void()>& call) {
    test::expect_nothing_left([&] {
      call();
      return false;
    });
  }
};

INSTANTIATE_TEST_SUITE_P(Kinds, OutOfMemory, testing::ValuesIn(kinds),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(OutOfMemory, ASurveyLeavesNothingBehindAndTheNextIsRight) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  const PageSet touched = memory.survey(options()).touched;
  EXPECT_TRUE(touched.contains(PageNumber(5)));
  expect_nothing_left([this] { static_cast<void>(memory.survey(options())); });
  EXPECT_EQ(memory.survey(options()).touched, touched);
}

TEST_P(OutOfMemory, ALookAtTheContentLeavesNothingBehind) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  SurveyOptions looking = options();
  // Tasks are run by the caller itself, and the executor may run out too.
  looking.content_check = ContentCheckOptions{.executor = [](const std::function<void()>& task) { task(); }};
  const PageSet touched = memory.survey(looking).touched;
  EXPECT_TRUE(touched.contains(PageNumber(5)));
  expect_nothing_left([&] { static_cast<void>(memory.survey(looking)); });
  EXPECT_EQ(memory.survey(looking).touched, touched);
}

TEST_P(OutOfMemory, AWatchThatCouldNotBeArmedLeavesNothingBehind) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  const WriteWatchOptions promise{.written_through_this_mapping_only = true};
  if (!memory.arm_write_watch(GuestAddress(0), promise)) GTEST_SKIP() << "this memory, or kernel, has no write watch";
  memory.disarm_write_watch(GuestAddress(0));
  expect_nothing_left([&] {
    static_cast<void>(memory.arm_write_watch(GuestAddress(0), promise));
    memory.disarm_write_watch(GuestAddress(0));
  });
  EXPECT_FALSE(memory.survey(options()).zeroed().contains(PageNumber(5)));
}

TEST_P(OutOfMemory, ARegionThatCouldNotBeMadeLeavesNothingBehind) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  expect_nothing_left([this] { static_cast<void>(make()); });
}

TEST_P(OutOfMemory, ADiscardLeavesNothingBehind) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  if (backing() == Backing::hugetlb && !test::machine_facts().hugetlb_dontneed)
    GTEST_SKIP() << "this kernel discards no huge pages of private memory";
  expect_nothing_left([this] { static_cast<void>(memory.discard(pages(0, 512))); });
  EXPECT_EQ(*memory.read_value<char>(GuestAddress(5 * page_size)), 0);
}

TEST(OutOfMemoryMarks, AreNotLost) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  constexpr std::uint64_t leaf = std::uint64_t{1} << 15;
  for (long allowed = 0; allowed <= 4; ++allowed) {
    GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), 4 * leaf * page_size)}));
    test::allocations_left = allowed;
    memory.mark_touched(pages(5, 1), Toucher::device);
    memory.mark_touched(pages(leaf + 5, 2 * leaf), Toucher::guest);
    test::allocations_left = -1;
    const TouchedMap marks = memory.marks();
    EXPECT_TRUE(marks.at(PageNumber(5)).has(Toucher::device)) << allowed;
    EXPECT_TRUE(marks.pages().contains(pages(leaf + 5, 2 * leaf))) << allowed;
    EXPECT_FALSE(memory.survey().zeroed().contains(PageNumber(5))) << allowed;
    EXPECT_EQ(allowed < 4, marks.pages().contains(pages(3 * leaf, leaf))) << allowed;
    memory.clear_marks(pages(0, 4 * leaf));
    EXPECT_TRUE(memory.survey().touched.empty()) << allowed;
  }
}

TEST(OutOfMemoryMarks, AreNotLostByADiscardThatThrows) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  constexpr std::uint64_t leaf = std::uint64_t{1} << 15;
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), 4 * leaf * page_size)}));
  memory.mark_touched(pages(0, 4 * leaf), Toucher::device);
  const PageSet some(pages(7, leaf));
  test::fail_each_allocation([&] {
    try {
      if (!memory.discard(some)) return true;
    } catch (const std::bad_alloc&) {
      EXPECT_TRUE(memory.marks().pages().contains(pages(0, 4 * leaf)));
      return true;
    }
    return false;
  });
  TouchedMap expected;
  expected.mark(pages(0, 4 * leaf), Toucher::device);
  // What could not be told apart stays.
  EXPECT_TRUE(memory.marks().at(PageNumber(6)).has(Toucher::device));
  EXPECT_TRUE(memory.marks().pages().contains(pages(leaf + 7, 3 * leaf - 7)));
  ASSERT_TRUE(memory.discard(some));
  expected.clear(pages(7, leaf));
  EXPECT_EQ(memory.marks(), expected);
}

TEST(OutOfMemoryMarks, TakeBoundedMemoryWhereThereIsNoRam) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  constexpr std::uint64_t leaf = std::uint64_t{1} << 15;
  constexpr std::uint64_t all = guest_space_end / page_size;
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), 4 * leaf * page_size)}));
  const std::size_t before = test::bytes_held;
  for (std::uint64_t page = 9; page < all; page += 64 * leaf)
    memory.mark_touched(pages(page, 1), Toucher::device);
  EXPECT_LT(test::bytes_held, before + (std::size_t{8} << 20));
  const PageSet marked = memory.marks().pages();
  for (std::uint64_t page = 9; page < all; page += 64 * leaf)
    ASSERT_TRUE(marked.contains(PageNumber(page))) << page;
}

/// Why pages of the memory are touched.
struct TouchedBy {
  const char* name;
  bool is_written = true;
  bool is_marked = false;
  bool may_have_huge_pages = false; ///< It is looked at twice then.
};

constexpr TouchedBy touched_by[] = {
    {.name = "Stores"},
    {.name = "StoresLookedAtTwice", .may_have_huge_pages = true},
    {.name = "Marks", .is_written = false, .is_marked = true},
    {.name = "StoresAndMarks", .is_marked = true},
};

class MemoryOfASurvey : public testing::TestWithParam<TouchedBy> {};

INSTANTIATE_TEST_SUITE_P(By, MemoryOfASurvey, testing::ValuesIn(touched_by),
                         [](const auto& info) { return std::string(info.param.name); });

// The second region has most extents, as the RAM above 4 GiB has.
TEST_P(MemoryOfASurvey, FollowsTheExtentsOfAllRegionsTogether) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  constexpr std::uint64_t extents[] = {4000, 20'000, 8000};
  std::vector<Region> regions;
  PageSet touched;
  std::uint64_t start = 0;
  for (const std::uint64_t each : extents) {
    const std::uint64_t region_bytes = 2 * each * page_size;
    regions.push_back(*Region::anonymous(GuestAddress(start), region_bytes));
    auto* const host = static_cast<volatile char*>(regions.back().host_address());
    madvise(regions.back().host_address(), region_bytes, MADV_NOHUGEPAGE);
    for (std::uint64_t i = 0; i < each; ++i) {
      if (GetParam().is_written) host[2 * i * page_size] = 1;
      touched.add(pages(start / page_size + 2 * i, 1));
    }
    if (GetParam().may_have_huge_pages) madvise(regions.back().host_address(), region_bytes, MADV_HUGEPAGE);
    start += region_bytes;
  }
  GuestMemory memory(*MemoryMap::make(std::move(regions)));
  std::uint64_t number = 0;
  if (GetParam().is_marked)
    for (const PageRange& range : touched.ranges())
      memory.mark_touched(range, ++number % 2 == 0 ? Toucher::device : Toucher::host);
  static_cast<void>(memory.survey());
  const std::size_t before = test::bytes_held;
  test::most_bytes_held = before;
  const Survey survey = memory.survey();
  EXPECT_LE(test::most_bytes_held - before, touched.range_count() * 24 + (std::size_t{32} << 10));
  PageSet missing = touched;
  missing.remove(survey.touched);
  EXPECT_TRUE(missing.empty());
  EXPECT_LE(survey.touched.range_count(), touched.range_count());
  EXPECT_EQ(survey.touchers.pages(), GetParam().is_marked ? touched : PageSet());
}

// What throws has added nothing, and what is called again is as if nothing had been thrown.
TEST(OutOfMemoryTouchedRuns, AreNotLost) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  for (const std::size_t limit : {std::size_t{60}, TouchedRuns::default_limit}) {
    TouchedRuns runs(limit);
    TouchedRuns expected(limit);
    std::size_t failures = 0;
    for (std::uint64_t i = 0; i < 4000; ++i) {
      const TouchedRange range{pages(20 * i, 1 + i * i % 19), i % 5 == 0 ? Toucher::guest : Toucher::device};
      TouchedRange last;
      if (!runs.empty()) last = runs.entries().back();
      for (long allowed = 0;; ++allowed) {
        ASSERT_LT(allowed, 100);
        test::allocations_left = allowed;
        bool is_added = true;
        try {
          runs.add(range.pages, range.by);
        } catch (const std::bad_alloc&) {
          is_added = false;
        }
        test::allocations_left = -1;
        if (is_added) break;
        ++failures;
        ASSERT_TRUE(runs.empty() || runs.entries().back() == last);
      }
      expected.add(range.pages, range.by);
      ASSERT_EQ(runs.entry_count(), expected.entry_count());
      ASSERT_LE(runs.entry_count(), limit);
    }
    EXPECT_EQ(runs, expected);
    EXPECT_GT(failures, limit < 4000 ? 400U : 10U);
  }
}

// What throws has either added the extent or changed nothing.
TEST(OutOfMemoryExtents, AreNotLost) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  std::vector<Extent> added;
  for (std::uint64_t page = 0; added.size() < 4000; page += 2 + added.size() * added.size() % 37)
    added.push_back({page, 1});
  ExtentList list(60);
  std::size_t failures = 0;
  for (std::size_t i = 0; i < added.size(); ++i) {
    // Now and then all behind an earlier one becomes one.
    const bool goes_back = i % 900 == 899;
    for (bool is_added = false; !is_added;) {
      const std::vector<Extent> before = list.to_vector();
      test::allocations_left = static_cast<long>((i + failures) % 12);
      try {
        list.add(goes_back ? added[i - 50] : added[i]);
        is_added = true;
      } catch (const std::bad_alloc&) {
        ++failures;
      }
      test::allocations_left = -1;
      if (is_added) break;
      std::vector<Extent> after = list.to_vector();
      is_added = after != before;
      if (is_added) {
        ASSERT_EQ(after.back(), added[i]);
        after.pop_back();
        ASSERT_EQ(after, before);
      }
    }
    if (goes_back) list.add(added[i]);
    ASSERT_EQ(list.page_count(), i + 1);
  }
  EXPECT_GT(failures, 20U);
  EXPECT_LE(list.size(), 60U);
  std::uint64_t pages_there = 0;
  for (const Extent extent : list)
    pages_there += extent.count;
  EXPECT_EQ(pages_there, list.page_count() + list.given_up_pages());
  for (const Extent& extent : added)
    ASSERT_TRUE(std::ranges::any_of(list, [&](const Extent& each) {
      return each.first <= extent.first && extent.end() <= each.end();
    })) << extent.first;
}

TEST(OutOfMemoryExtents, TakeAsManyBytesAsTheirNumbersNeed) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  constexpr std::size_t many = 100'000;
  const auto most_bytes = [&](std::uint64_t gap, std::uint64_t count) {
    const std::size_t before = test::bytes_held;
    test::most_bytes_held = before;
    ExtentList list;
    for (std::uint64_t i = 0; i < many; ++i)
      list.add({i * (gap + count), count});
    EXPECT_EQ(list.size(), many);
    return test::most_bytes_held - before;
  };
  EXPECT_LT(most_bytes(127, 127), many * 21 / 10);
  EXPECT_LT(most_bytes(128, 127), many * 31 / 10);
  // As far apart as so many can be.
  EXPECT_LT(most_bytes((std::uint64_t{1} << 63) / many, (std::uint64_t{1} << 63) / many), many * 15);
  const std::size_t before = test::bytes_held;
  {
    ExtentList few;
    few.add({5, 1});
    EXPECT_EQ(test::bytes_held, before);
    for (std::uint64_t i = 0; i < 16; ++i)
      few.add({100 + 3 * i, 1});
    EXPECT_LT(test::bytes_held, before + 200);
    for (std::uint64_t i = 0; i < many; ++i)
      few.add({200 + 3 * i, 1});
    few.add({0, 1});
    // But for where the blocks were.
    EXPECT_LT(test::bytes_held, before + 4096);
  }
  EXPECT_EQ(test::bytes_held, before);
}

} // namespace
