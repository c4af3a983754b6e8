#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <latch>
#include <random>
#include <semaphore>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "support/held.hpp"

import cppvmm.guest_memory;

// Marks by hand: what is marked stays marked until it is taken back, whoever marks at the same time and whatever
// becomes of the map.

using namespace cppvmm;

namespace {

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

// Marks are kept in parts of so many pages.
constexpr std::uint64_t leaf = std::uint64_t{1} << 15;
constexpr std::uint64_t node = std::uint64_t{1} << 28;
constexpr std::uint64_t all_pages = guest_space_end / page_size;
constexpr std::uint64_t gib_pages = (std::uint64_t{1} << 30) / page_size;

/// 8 GiB of RAM, in the middle of which a part of 1 TiB begins.
class MarksInRam : public testing::Test {
protected:
  static constexpr std::uint64_t first = node - 4 * gib_pages;
  static constexpr std::uint64_t count = 8 * gib_pages;

  GuestMemory memory{*MemoryMap::make({*Region::anonymous(pages(first, 1).start_address(), count* page_size)})};
};

Touchers some_touchers(std::uint64_t random) { return Touchers::from_bits(static_cast<std::uint8_t>(random % 15 + 1)); }

TEST_F(MarksInRam, AreAsTheyWereMade) {
  std::mt19937_64 random(5);
  TouchedMap expected;
  for (int i = 0; i < 3000; ++i) {
    // A few pages around where a word, a leaf or a node begins, or up to a gibibyte.
    constexpr std::uint64_t units[] = {1, 8, leaf, node};
    const std::uint64_t unit = units[random() % 4];
    const std::uint64_t middle = (first + random() % count) / unit * unit;
    const std::uint64_t from = std::max(first, middle) - (middle > first + 40 ? random() % 40 : 0);
    const std::uint64_t wanted = random() % 50 == 0 ? random() % gib_pages : random() % 80;
    const PageRange range = pages(from, std::min(wanted, first + count - from));
    if (random() % 3 == 0) {
      memory.clear_marks(range);
      expected.clear(range);
    } else {
      const Touchers by = some_touchers(random());
      memory.mark_touched(range, by);
      expected.mark(range, by);
    }
    if (i % 100 == 0) {
      ASSERT_EQ(memory.marks(), expected) << i;
    }
  }
  EXPECT_EQ(memory.marks(), expected);
  const Survey survey = memory.survey();
  EXPECT_EQ(survey.touched, expected.pages());
  EXPECT_EQ(survey.touchers.entries(), expected.entries());
  memory.clear_marks(pages(0, all_pages));
  EXPECT_TRUE(memory.marks().empty());
  EXPECT_EQ(memory.survey().zeroed().page_count(), count);
}

TEST_F(MarksInRam, OfAllMemoryComeApartWhereSomeAreTakenBack) {
  memory.mark_touched(pages(0, all_pages), Toucher::device);
  memory.mark_touched(pages(first + 7, 1), Toucher::host);
  TouchedMap expected;
  expected.mark(pages(0, all_pages), Toucher::device);
  expected.mark(pages(first + 7, 1), Toucher::host);
  // A word, a leaf, a node, and parts of each; where there is RAM and where there is none.
  for (const PageRange& gap :
       {pages(first + 16, 16), pages(node, leaf), pages(first + 100, 3), pages(node + leaf + 5, 1),
        pages(4 * node, node), pages(7 * node + 3, 5 * node), pages(all_pages - 9, 9)}) {
    memory.clear_marks(gap);
    expected.clear(gap);
    ASSERT_EQ(memory.marks(), expected);
  }
  ASSERT_TRUE(memory.discard(pages(first + 1000, 2 * leaf)));
  expected.clear(pages(first + 1000, 2 * leaf));
  EXPECT_EQ(memory.marks(), expected);
  PageSet zeroed = expected.pages();
  PageSet ram(pages(first, count));
  ram.remove(zeroed);
  EXPECT_EQ(memory.survey().zeroed(), ram);
}

TEST_F(MarksInRam, OfSeveralThreadsAreAllThere) {
  constexpr std::uint64_t threads = 4;
  constexpr std::uint64_t each = 100'000;
  constexpr Toucher whose[threads] = {Toucher::host, Toucher::guest, Toucher::device, Toucher::unknown};
  for (int round = 0; round < 3; ++round) {
    TouchedMap expected;
    const std::uint64_t from = first + static_cast<std::uint64_t>(round) * gib_pages;
    for (std::uint64_t i = 0; i < threads; ++i) {
      expected.mark(pages(from, each), whose[i]);
      expected.mark(pages(from + 2 * each, leaf * 2), whose[i]);
    }
    std::latch begin(threads);
    {
      std::vector<std::jthread> marking;
      marking.reserve(threads);
      for (std::uint64_t i = 0; i < threads; ++i)
        marking.emplace_back([&, i] {
          begin.arrive_and_wait();
          // In the same words all the time, from both ends, and as a whole.
          for (std::uint64_t page = 0; page < each; ++page)
            memory.mark_touched(pages(from + (i % 2 == 0 ? page : each - 1 - page), 1), whose[i]);
          memory.mark_touched(pages(from + 2 * each, leaf * 2), whose[i]);
        });
    }
    EXPECT_EQ(memory.marks(), expected);
    memory.clear_marks(pages(first, count));
  }
}

TEST_F(MarksInRam, AreNotTakenBackWithTheirNeighbours) {
  constexpr std::uint64_t rounds = 20'000;
  constexpr std::uint64_t other = 2 * leaf; // pages from here on are marked as a whole, too
  memory.mark_touched(pages(first, 4 * leaf), Toucher::host);
  std::atomic<bool> is_over = false;
  std::latch begin(2);
  std::jthread taking([&] {
    begin.arrive_and_wait();
    for (std::uint64_t i = 0; !is_over; ++i) {
      memory.clear_marks(pages(first + 2 * (i % rounds), 1));
      EXPECT_TRUE(memory.discard(pages(first + other + 2 * (i % rounds) + 1, 1)));
      memory.mark_touched(pages(first, leaf), Toucher::host);
    }
  });
  begin.arrive_and_wait();
  for (std::uint64_t i = 0; i < rounds; ++i) {
    memory.mark_touched(pages(first + 2 * i + 1, 1), Toucher::device);
    memory.mark_touched(pages(first + other + 2 * i, 1), Toucher::device);
  }
  is_over = true;
  taking.join();
  const TouchedMap marks = memory.marks();
  for (std::uint64_t i = 0; i < rounds; ++i) {
    ASSERT_EQ(marks.at(PageNumber(first + 2 * i + 1)), Touchers(Toucher::host) | Toucher::device) << i;
    ASSERT_EQ(marks.at(PageNumber(first + other + 2 * i)), Touchers(Toucher::host) | Toucher::device) << i;
  }
}

TEST_F(MarksInRam, MadeDuringADiscardStay) {
  const Region region = memory.snapshot()->regions().front();
  const auto* const byte = static_cast<volatile std::byte*>(region.host_address());
  const PageRange some = pages(first, gib_pages / 16);
  const PageRange page = pages(first, 1);
  for (int round = 0; round < 20; ++round) {
    for (std::uint64_t at = 0; at < some.count(); ++at)
      static_cast<volatile std::byte*>(region.host_address())[at * page_size] = std::byte{1};
    memory.mark_touched(some, Toucher::device);
    std::jthread discarding([&] { EXPECT_TRUE(memory.discard(some)); });
    // The page has been discarded: a device may write it anew.
    while (*byte != std::byte{0})
      std::this_thread::yield();
    memory.mark_touched(page, Toucher::device);
    discarding.join();
    ASSERT_EQ(memory.marks().pages(), PageSet(page)) << round;
    ASSERT_FALSE(memory.survey().zeroed().contains(page.first())) << round;
    memory.clear_marks(some);
  }
}

TEST_F(MarksInRam, AreBackAfterADiscardThatFails) {
  TouchedMap expected;
  expected.mark(pages(first - 2, 4), Toucher::device);
  expected.mark(pages(first, 1), Toucher::guest);
  expected.mark(pages(node, leaf), Toucher::host);
  for (const auto& [range, by] : expected.entries())
    memory.mark_touched(range, by);
  EXPECT_FALSE(memory.discard(pages(first - 1, gib_pages * 5)));
  EXPECT_EQ(memory.marks(), expected);
}

// Whoever sees that a page's mark is gone sees that its content is gone.
TEST_F(MarksInRam, AreNotMissedDuringADiscard) {
  // It takes a while until the last page is found to be no RAM.
  std::vector<PageRange> ranges;
  ranges.reserve(20'001);
  for (std::uint64_t i = 0; i < 20'000; ++i)
    ranges.push_back(pages(first + 2 * i, 1));
  ranges.push_back(pages(first + count, 1));
  const PageSet not_ram = PageSet::of(std::move(ranges));
  const PageSet marked(pages(first, 64));
  memory.mark_touched(pages(first, 64), Toucher::device);
  // One after the other on its own would keep who waits for it from a processor, where there is but one.
  constexpr int discards = 50;
  std::counting_semaphore<discards> asked_for(0);
  std::atomic<int> done = 0;
  std::jthread discarding([&] {
    for (int i = 0; i < discards; ++i) {
      asked_for.acquire();
      EXPECT_FALSE(memory.discard(not_ram));
      ++done;
    }
  });
  for (int i = 0; i < discards; ++i) {
    asked_for.release();
    do {
      EXPECT_FALSE(memory.survey().zeroed().intersects(pages(first, 64)));
      EXPECT_EQ(memory.marks().pages(), marked);
    } while (done <= i);
  }
}

TEST(MarksOfAnyMap, StayWhateverHappensToTheMap) {
  GuestMemory memory;
  const auto ram = [](std::uint64_t start) {
    return *Region::anonymous(pages(start, 1).start_address(), 64 * page_size);
  };
  memory.mark_touched(pages(5, 1), Toucher::device); // no memory there
  memory.replace(*MemoryMap::make({ram(0), ram(leaf)}));
  memory.mark_touched(pages(leaf + 6, 2), Toucher::guest);
  TouchedMap expected;
  expected.mark(pages(5, 1), Toucher::device);
  expected.mark(pages(leaf + 6, 2), Toucher::guest);
  EXPECT_EQ(memory.survey().touched, expected.pages());
  ASSERT_TRUE(memory.remove_region(GuestAddress(0)));
  memory.replace({});
  EXPECT_EQ(memory.marks(), expected);
  EXPECT_TRUE(memory.survey().touched.empty());
  memory.replace(*MemoryMap::make({ram(0)}));
  EXPECT_EQ(memory.survey().touched, PageSet(pages(5, 1)));
  ASSERT_TRUE(memory.add_region(ram(leaf)));
  EXPECT_EQ(memory.survey().touched, expected.pages());
  ASSERT_TRUE(memory.reset());
  EXPECT_TRUE(memory.marks().empty());
}

TEST(MarksOfAnyMap, AreBesideEvidenceThatCrossesRegions) {
  constexpr std::uint64_t each = 64;
  std::vector<Region> regions;
  regions.reserve(3);
  for (std::uint64_t i = 0; i < 3; ++i)
    regions.push_back(*Region::anonymous(pages(i * each, 1).start_address(), each * page_size));
  GuestMemory memory(*MemoryMap::make(regions));
  PageSet touched(pages(each - 2, each + 5));
  for (const std::uint64_t page : {each - 2, each - 1, each, 2 * each, 2 * each + 1, 2 * each + 2})
    ASSERT_TRUE(memory.write_value(pages(page, 1).start_address(), std::uint8_t{1}));
  for (std::uint64_t page = each + 1; page < 2 * each; ++page)
    ASSERT_TRUE(memory.write_value(pages(page, 1).start_address(), std::uint8_t{1}));
  for (const std::uint64_t page :
       {std::uint64_t{0}, each - 1, each + 9, 2 * each + 2, 2 * each + 7, 3 * each, 10 * each}) {
    memory.mark_touched(pages(page, 1), Toucher::device);
    if (page < 3 * each) touched.add(pages(page, 1));
  }
  EXPECT_EQ(memory.survey().touched, touched);
}

TEST(MarksOfAnyMap, OfNobodyAreOfSomebodyUnknown) {
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), 16 * page_size)}));
  memory.mark_touched(pages(3, 1), Touchers());
  memory.mark_touched(pages(5, 2), static_cast<Toucher>(0x10));
  TouchedMap expected;
  expected.mark(pages(3, 1), Toucher::unknown);
  expected.mark(pages(5, 2), Toucher::unknown);
  EXPECT_EQ(memory.marks(), expected);
  EXPECT_EQ(memory.survey().touched, expected.pages());
}

TEST(MarksOfAnyMap, WhereThereIsNoRamAreNotLost) {
  GuestMemory memory;
  // More than there are parts for.
  std::vector<PageRange> marked;
  for (std::uint64_t i = 0; i < 40; ++i)
    for (std::uint64_t j = 0; j < 10; ++j)
      marked.push_back(pages(i * node + 11 * j * leaf + 3, 1));
  for (const PageRange& range : marked)
    memory.mark_touched(range, Toucher::device);
  PageSet lost = PageSet::of(marked);
  const PageSet kept = memory.marks().pages();
  lost.remove(kept);
  EXPECT_TRUE(lost.empty());
  EXPECT_TRUE(kept.contains(pages(39 * node, node)));
  EXPECT_FALSE(kept.contains(pages(0, leaf)));
  EXPECT_FALSE(kept.intersects(pages(leaf, leaf)));
  // RAM has parts of its own.
  ASSERT_TRUE(memory.add_region(*Region::anonymous(pages(100 * node, 1).start_address(), 64 * page_size)));
  memory.mark_touched(pages(100 * node + 1, 1), Toucher::device);
  EXPECT_EQ(memory.survey().touched, PageSet(pages(100 * node + 1, 1)));
  memory.clear_marks(pages(0, all_pages));
  EXPECT_TRUE(memory.marks().empty());
}

// A guest that moves memory about, as a window of a device, does not make the host keep marks of every place.
TEST(MarksOfAnyMap, WhereRamComesAndGoesTakeNoMoreMemory) {
  constexpr std::uint64_t places = 2000;
  GuestMemory memory;
  const std::size_t before = test::heap_now();
  for (std::uint64_t place = 0; place < places; ++place) {
    const GuestAddress start(place * leaf * page_size);
    ASSERT_TRUE(memory.add_region(*Region::anonymous(start, 16 * page_size)));
    memory.mark_touched(pages(place * leaf + 3, 1), Toucher::device);
    EXPECT_FALSE(memory.survey().zeroed().contains(PageNumber(place * leaf + 3)));
    ASSERT_TRUE(memory.remove_region(start));
  }
  EXPECT_LT(test::heap_now(), before + (std::size_t{8} << 20));
  for (std::uint64_t place = 0; place < places; ++place)
    EXPECT_TRUE(memory.marks().pages().contains(PageNumber(place * leaf + 3)));
}

} // namespace
