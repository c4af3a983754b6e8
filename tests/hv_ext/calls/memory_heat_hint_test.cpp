#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <gtest/gtest.h>
#include <latch>
#include <mutex>
#include <new>
#include <optional>
#include <random>
#include <span>
#include <sys/mman.h>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "support/huge_pages.hpp"
#include "support/huge_pages_test.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_calls;

// What the guest says of its pages: which of them are given back, which never are, and what it costs.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t query = 0x8001;
constexpr std::uint64_t boot_zeroed = 0x8002;
constexpr std::uint64_t hint = 0x8003;
constexpr auto cold = HvMemoryHeat::cold;
constexpr auto hot = HvMemoryHeat::hot;
constexpr auto discard = HvMemoryHeat::cold_discard;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

// As they are on the wire.
constexpr std::uint64_t small(std::uint64_t first, std::uint64_t count) { return first << 12 | (count - 1); }
constexpr std::uint64_t of_2_mib(std::uint64_t first, std::uint64_t count) {
  return first << 21 | 1 << 11 | (count - 1);
}
constexpr std::uint64_t of_1_gib(std::uint64_t first, std::uint64_t count) {
  return first << 30 | 1 << 12 | 1 << 11 | (count - 1);
}

constexpr std::uint64_t reps(std::uint64_t count, std::uint64_t start = 0) { return count << 32 | start << 48; }

TEST(GpaPageRanges, AreOfSmallOrLargePages) {
  constexpr std::uint64_t last = (guest_space_end >> page_shift) - 1;
  const std::pair<std::uint64_t, std::optional<PageRange>> ranges[] = {
      {small(0, 1), pages(0, 1)},
      {small(5, 2048), pages(5, 2048)},
      {small(last, 1), pages(last, 1)},
      {small(last, 2), std::nullopt},
      {of_2_mib(1, 1), pages(512, 512)},
      {of_2_mib(3, 2048), pages(3 * 512, 2048 * 512)},
      {of_1_gib(1, 2), pages(1 << 18, 2 << 18)},
      {of_1_gib(1, 1) | 1 << 21, std::nullopt}, // in the middle of a page of 1 GiB
      {of_2_mib(1, 1) | 1 << 13, std::nullopt}, // reserved bits
      {of_2_mib(1, 1) | 1 << 20, std::nullopt},
      {of_2_mib((last >> 9), 2), std::nullopt},
      {~std::uint64_t{0}, std::nullopt},
  };
  for (const auto& [value, expected] : ranges)
    EXPECT_EQ(HvGpaPageRange{value}.pages(), expected) << std::hex << value;
}

/// RAM of 16 MiB with data in each page, a hole, ROM at 24 MiB, RAM at 32 MiB. Lists are in page 0.
class Hints : public testing::Test {
protected:
  static constexpr std::uint64_t ram_pages = 16 * mib / page_size;

  Hints() {
    const Region low = *Region::anonymous(GuestAddress(0), 16 * mib);
    const Region high = *Region::memfd(GuestAddress(32 * mib), 4 * mib);
    for (const Region& region : {low, high})
      madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
    memory.replace(*MemoryMap::make({low, *Region::memfd(GuestAddress(24 * mib), mib, RegionKind::rom), high}));
    for (std::uint64_t page = 0; page < 36 * mib / page_size; ++page)
      static_cast<void>(memory.load(GuestAddress(page * page_size + 8), std::as_bytes(std::span(&page, 1))));
  }

  [[nodiscard]] HvOptions options() { return {.memory_heat = {.policy = standard_heat_policy(memory)}}; }
  [[nodiscard]] ExtendedHypercalls make() { return *ExtendedHypercalls::create(memory, options()); }

  [[nodiscard]] HvCall list(std::uint64_t heat, const std::vector<std::uint64_t>& ranges, std::uint64_t start = 0,
                            std::uint64_t at = 0) const {
    EXPECT_TRUE(memory.write_value(GuestAddress(at), heat));
    EXPECT_TRUE(memory.write(GuestAddress(at + 8), std::as_bytes(std::span(ranges))));
    return {.control = hint | reps(ranges.size(), start), .input = GuestAddress(at)};
  }
  [[nodiscard]] HvCall list(HvMemoryHeat heat, const std::vector<std::uint64_t>& ranges,
                            std::uint64_t start = 0) const {
    return list(static_cast<std::uint64_t>(heat), ranges, start);
  }

  /// The pages that read zero where something was put, but for that of the lists.
  [[nodiscard]] PageSet zeros() const {
    PageSet zeros;
    for (const Region& region : memory.snapshot()->regions())
      for (std::uint64_t i = 0; i < region.pages().count(); ++i) {
        const std::uint64_t page = region.pages().first().value() + i;
        const auto value = *memory.read_value<std::uint64_t>(GuestAddress(page * page_size + 8));
        if (value == 0 && page != 0)
          zeros.add(pages(page, 1));
        else if (page != 0)
          EXPECT_EQ(value, page);
      }
    return zeros;
  }

  [[nodiscard]] PageSet answered(ExtendedHypercalls& hypercalls) const {
    EXPECT_EQ(*hypercalls.handle({.control = boot_zeroed, .output = GuestAddress(0)}), 0U);
    PageSet set;
    const auto count = *memory.read_value<std::uint64_t>(GuestAddress(0));
    for (std::uint64_t i = 0; i < std::min<std::uint64_t>(count, 255); ++i)
      set.add(pages(*memory.read_value<std::uint64_t>(GuestAddress(8 + 16 * i)),
                    *memory.read_value<std::uint64_t>(GuestAddress(16 + 16 * i))));
    return set;
  }

  GuestMemory memory;
};

TEST_F(Hints, AreOfferedWhereThereIsAPolicy) {
  const auto capabilities = [&](HvOptions options) {
    auto hypercalls = *ExtendedHypercalls::create(memory, std::move(options));
    EXPECT_EQ(*hypercalls.handle({.control = query, .output = GuestAddress(0)}), 0U);
    return *memory.read_value<std::uint64_t>(GuestAddress(0));
  };
  EXPECT_EQ(capabilities(options()), 0x103U);
  EXPECT_EQ(capabilities({}), 0x1U);
  auto without_discard = options();
  without_discard.memory_heat.offers_cold_discard = false;
  EXPECT_EQ(capabilities(without_discard), 0x3U);
  auto refusing = *ExtendedHypercalls::create(memory, without_discard);
  EXPECT_EQ(refusing.handle(list(discard, {small(1, 1)})), hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(refusing.handle(list(cold, {small(1, 1)})), hv_result(HvStatus::success, 1));
  auto none = *ExtendedHypercalls::create(memory);
  EXPECT_EQ(none.handle(list(discard, {small(1, 1)})), hv_result(HvStatus::invalid_hypercall_code));
  auto contradiction = options();
  contradiction.extended_hypercalls = contradiction.boot_zeroed_memory = false;
  EXPECT_EQ(ExtendedHypercalls::create(memory, contradiction).error().code, HvErrc::invalid_options);
}

TEST_F(Hints, OfColdDiscardGiveMemoryBackAndTheNextAnswerHasIt) {
  auto told = options();
  PageSet named;
  HeatDone done;
  told.memory_heat.on_hint = [&](const HeatHinted& hinted) {
    EXPECT_EQ(hinted.heat, discard);
    EXPECT_EQ(hinted.vp_index, 3U);
    named.add(hinted.pages);
    done.freed_pages += hinted.done.freed_pages;
  };
  auto hypercalls = *ExtendedHypercalls::create(memory, told);
  EXPECT_TRUE(answered(hypercalls).empty());
  PageSet given(pages(10, 5));
  given.add(pages(512, 1024));
  given.add(pages(8192, 512)); // the other region
  HvCall call = list(discard, {small(10, 5), of_2_mib(1, 2), of_2_mib(16, 1)});
  call.vp_index = 3;
  EXPECT_EQ(hypercalls.handle(call), hv_result(HvStatus::success, 3));
  EXPECT_EQ(answered(hypercalls), given); // before anybody reads them: that touches pages of a memfd
  EXPECT_EQ(zeros(), given);
  EXPECT_EQ(named, given);
  EXPECT_EQ(done.freed_pages, given.page_count());
  EXPECT_EQ(hypercalls.heat_counts(),
            (HeatCounts{.discard_pages = given.page_count(), .done = {.freed_pages = given.page_count()}}));
  EXPECT_EQ(hypercalls.counts().memory_heat_hint, 1U);
}

TEST_F(Hints, ThatPagesAreColdOrHotLeaveWhatTheyHold) {
  auto hypercalls = make();
  for (const HvMemoryHeat heat : {cold, hot}) {
    EXPECT_EQ(hypercalls.handle(list(heat, {small(10, 100), of_2_mib(1, 1)})), hv_result(HvStatus::success, 2));
    EXPECT_TRUE(answered(hypercalls).empty());
    EXPECT_TRUE(zeros().empty());
  }
  EXPECT_EQ(hypercalls.heat_counts(),
            (HeatCounts{.cold_pages = 612, .hot_pages = 612, .done = {.advised_pages = 1224}}));
}

TEST_F(Hints, AreDoneUpToTheFirstThatIsRefused) {
  auto hypercalls = make();
  const std::uint64_t bad[] = {
      small(ram_pages, 1),                       // behind the end
      small(ram_pages - 1, 2),                   // across it
      small(24 * mib / page_size, 1),            // ROM
      small(guest_space_end / page_size - 1, 2), // beyond all
      of_1_gib(0, 1),                            // much more than RAM
      of_1_gib(2047, 2048),
      of_2_mib(1, 1) | 1 << 13,
      ~std::uint64_t{0},
  };
  std::uint64_t page = 100;
  PageSet given;
  for (const std::uint64_t range : bad) {
    const auto expected = hv_result(HvStatus::invalid_parameter, 2);
    const std::uint64_t next = page + 16;
    EXPECT_EQ(hypercalls.handle(list(discard, {small(page, 4), small(page + 8, 4), range, small(next, 4)})), expected)
        << std::hex << range;
    given.add(pages(page, 4));
    given.add(pages(page + 8, 4));
    page = next + 16;
    // What went before counts as done.
    EXPECT_EQ(hypercalls.handle(list(discard, {small(page, 4), small(page + 8, 4), range, small(page, 4)}, 2)),
              expected)
        << std::hex << range;
    EXPECT_EQ(zeros(), given);
  }
}

TEST_F(Hints, OfAHeatThatThereIsNoneOfAreRefused) {
  auto hypercalls = make();
  for (const std::uint64_t heat : {std::uint64_t{3}, std::uint64_t{4}, std::uint64_t{1} << 63 | 2})
    EXPECT_EQ(hypercalls.handle(list(heat, {small(1, 1)})), hv_result(HvStatus::invalid_parameter)) << heat;
  EXPECT_EQ(hypercalls.handle(list(3, {small(1, 1), small(2, 1)}, 1)), hv_result(HvStatus::invalid_parameter, 1));
  EXPECT_TRUE(zeros().empty());
}

TEST_F(Hints, LeaveAloneWhatIsInUse) {
  auto chosen = options();
  chosen.survey.leave_out = pages(50, 2);
  chosen.memory_heat.pinned = pages(60, 3);
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  hypercalls.set_hypercall_page(PageNumber(70));
  hypercalls.set_reference_tsc_page(PageNumber(72));
  EXPECT_EQ(hypercalls.handle(list(discard, {small(0, 100)})), hv_result(HvStatus::success, 1));
  PageSet given(pages(1, 99)); // but for the list itself
  for (const PageRange& kept : {pages(50, 2), pages(60, 3), pages(70, 1), pages(72, 1)})
    given.remove(kept);
  EXPECT_EQ(zeros(), given);
  EXPECT_EQ(hypercalls.heat_counts().done.kept_pages, 8U);
  EXPECT_EQ(hypercalls.heat_counts().discard_pages, 100U);
  // They are the guest's again.
  hypercalls.set_pinned({});
  EXPECT_EQ(hypercalls.handle(list(discard, {small(60, 1)})), hv_result(HvStatus::success, 1));
  given.add(pages(60, 1));
  EXPECT_EQ(zeros(), given);
  // Nothing of it is to be had, and nothing is wrong.
  EXPECT_EQ(hypercalls.handle(list(discard, {small(70, 1)})), hv_result(HvStatus::success, 1));
  EXPECT_EQ(zeros(), given);
}

TEST_F(Hints, LeaveAloneTheOutputsOfOtherCallsInProgress) {
  constexpr std::uint16_t slow_code = 0x00AB;
  std::latch begun(1);
  std::latch ends(1);
  auto chosen = options();
  chosen.calls.push_back({.code = slow_code, .output_bytes = 8, .handler = [&](const HvCheckedCall&) -> HvCallAnswer {
                            begun.count_down();
                            ends.wait();
                            return {};
                          }});
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  std::jthread other(
      [&] { EXPECT_EQ(hypercalls.handle({.control = slow_code, .output = GuestAddress(30 * page_size)}), 0U); });
  begun.wait();
  EXPECT_EQ(hypercalls.handle(list(discard, {small(20, 20)})), hv_result(HvStatus::success, 1));
  PageSet given(pages(20, 20));
  given.remove(pages(30, 1));
  EXPECT_EQ(zeros(), given);
  ends.count_down();
  other.join();
  EXPECT_EQ(hypercalls.handle(list(discard, {small(20, 20)})), hv_result(HvStatus::success, 1));
  EXPECT_EQ(zeros(), PageSet(pages(20, 20)));
}

TEST_F(Hints, HaveLetGoOfPagesThatArePinnedFromNowOn) {
  std::latch discards(1);
  std::latch pins(1);
  std::atomic<bool> is_discarding = false;
  auto chosen = options();
  chosen.memory_heat.policy = [&](HvMemoryHeat, const PageSet& set) -> MemoryResult<HeatDone> {
    is_discarding = true;
    discards.count_down();
    pins.wait();
    // Time to come as far as to wait, and to go on if it did not.
    for (int turns = 0; turns < 1000; ++turns)
      std::this_thread::yield();
    is_discarding = false;
    return HeatDone{.freed_pages = set.page_count()};
  };
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  std::jthread vcpu(
      [&] { EXPECT_EQ(hypercalls.handle(list(discard, {small(60, 1)})), hv_result(HvStatus::success, 1)); });
  discards.wait();
  std::jthread device([&] {
    pins.count_down();
    hypercalls.set_pinned(pages(60, 1));
    EXPECT_FALSE(is_discarding);
  });
}

TEST_F(Hints, OfNeighboursAreOneCallOfThePolicy) {
  auto chosen = options();
  std::vector<PageSet> asked;
  chosen.memory_heat.policy = [&](HvMemoryHeat, const PageSet& set) -> MemoryResult<HeatDone> {
    asked.push_back(set);
    return HeatDone{.freed_pages = set.page_count()};
  };
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  std::vector<std::uint64_t> ranges;
  for (std::uint64_t i = 0; i < 200; ++i)
    ranges.push_back(small(10 + (i ^ 1), 1));
  EXPECT_EQ(hypercalls.handle(list(discard, ranges)), hv_result(HvStatus::success, 200));
  EXPECT_EQ(asked, std::vector{PageSet(pages(10, 200))});
}

TEST_F(Hints, ThatTheHostFailsAtAreRefused) {
  auto chosen = options();
  std::function<MemoryResult<HeatDone>()> answer;
  chosen.memory_heat.policy = [&](HvMemoryHeat, const PageSet&) { return answer(); };
  std::vector<HeatDone> told;
  chosen.memory_heat.on_hint = [&](const HeatHinted& hinted) { told.push_back(hinted.done); };
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  const HvCall call = list(discard, {small(1, 1), small(2, 1)}, 1);
  const auto fails_with = [](MemoryErrc code, int os_error = 0) {
    return [=]() -> MemoryResult<HeatDone> { return std::unexpected(MemoryError{.code = code, .os_error = os_error}); };
  };
  answer = fails_with(MemoryErrc::not_backed); // of a map that was replaced meanwhile
  EXPECT_EQ(hypercalls.handle(call), hv_result(HvStatus::invalid_parameter, 1));
  answer = fails_with(MemoryErrc::os, 12);
  EXPECT_EQ(hypercalls.handle(call), hv_result(HvStatus::insufficient_memory, 1));
  answer = fails_with(MemoryErrc::os, 5);
  EXPECT_EQ(hypercalls.handle(call), hv_result(HvStatus::operation_denied, 1));
  answer = []() -> MemoryResult<HeatDone> { throw std::bad_alloc(); };
  EXPECT_EQ(hypercalls.handle(call), hv_result(HvStatus::insufficient_memory, 1));
  EXPECT_EQ(told, std::vector(3, HeatDone{.failed_pages = 1})) << "that some may be gone is to be known";
  EXPECT_EQ(hypercalls.heat_counts(), (HeatCounts{.discard_pages = 3, .done = {.failed_pages = 3}}));
  answer = []() -> MemoryResult<HeatDone> { return HeatDone{.kept_pages = 1}; };
  EXPECT_EQ(hypercalls.handle(call), hv_result(HvStatus::invalid_parameter, 1));
}

/// Hints that have no time: each step does one part. Which pages the policy was asked for, and how often.
class HintsWithoutTime : public Hints {
protected:
  HintsWithoutTime() {
    auto chosen = options();
    chosen.call_time = std::chrono::nanoseconds(0);
    chosen.memory_heat.policy = [this](HvMemoryHeat, const PageSet& set) -> MemoryResult<HeatDone> {
      const std::lock_guard lock(mutex);
      for (const PageRange& range : set.ranges())
        for (std::uint64_t i = 0; i < range.count(); ++i)
          ++asked[range.first().value() + i];
      return HeatDone{.freed_pages = set.page_count()};
    };
    chosen.trace = [this](const HvTraceEvent& event) {
      if (const auto* const call = std::get_if<HvCallEnded>(&event); call != nullptr && call->goes_on) ++goes_on;
    };
    hypercalls.emplace(*ExtendedHypercalls::create(memory, chosen));
    asked.resize(36 * mib / page_size);
  }

  /// Until it is done; how many steps that took.
  int run(HvCall call, std::uint64_t expected) {
    for (int steps = 1;; ++steps) {
      const auto progress = hypercalls->handle_some(call);
      EXPECT_TRUE(progress);
      if (!progress || steps > 1000) return -1;
      if (progress->is_done) {
        EXPECT_EQ(progress->value, expected);
        return steps;
      }
      const HvControl before{call.control};
      const HvControl after{progress->value};
      EXPECT_EQ(after.with_rep_start(0).value, before.with_rep_start(0).value);
      EXPECT_GE(after.rep_start(), before.rep_start());
      EXPECT_LT(after.rep_start(), after.rep_count());
      call.control = progress->value;
    }
  }

  std::mutex mutex;
  std::vector<int> asked;
  std::atomic<int> goes_on = 0;
  std::optional<ExtendedHypercalls> hypercalls;
};

TEST_F(HintsWithoutTime, GoOnUntilEachPageWasDoneOnce) {
  // 6 MiB in one range, and some small ones.
  const int steps = run(list(discard, {of_2_mib(1, 3), small(10, 7), small(30, 1), of_2_mib(5, 1), small(8192, 700)}),
                        hv_result(HvStatus::success, 5));
  EXPECT_GE(steps, 6);
  EXPECT_EQ(goes_on, steps - 1);
  PageSet given(pages(512, 1536));
  given.add(pages(10, 7));
  given.add(pages(30, 1));
  given.add(pages(2560, 512));
  given.add(pages(8192, 700));
  for (std::uint64_t page = 0; page < asked.size(); ++page)
    EXPECT_EQ(asked[page], given.contains(PageNumber(page)) ? 1 : 0) << page;
  EXPECT_EQ(hypercalls->counts().memory_heat_hint, static_cast<std::uint64_t>(steps));
}

TEST_F(HintsWithoutTime, GoOnOnSeveralVcpusAtOnce) {
  HvCall low = list(discard, {of_2_mib(1, 4)});
  HvCall high = low;
  high.vp_index = 1;
  int steps = 0;
  for (bool is_done = false; !is_done; ++steps) {
    for (HvCall* const call : {&low, &high}) {
      const auto progress = *hypercalls->handle_some(*call);
      is_done = progress.is_done;
      if (!is_done) call->control = progress.value;
    }
    ASSERT_LT(steps, 100);
  }
  EXPECT_EQ(steps, 4);
  for (std::uint64_t page = 512; page < 5 * 512; ++page)
    EXPECT_EQ(asked[page], 2) << page;
}

TEST_F(HintsWithoutTime, BeginAnewWhenTheGuestMadeAnotherCallMeanwhile) {
  const HvCall large = list(discard, {of_2_mib(1, 4)});
  EXPECT_FALSE(hypercalls->handle_some(large)->is_done);
  EXPECT_TRUE(hypercalls->handle_some(list(discard, {small(20, 1)}))->is_done);
  EXPECT_EQ(run(list(discard, {of_2_mib(1, 4)}), hv_result(HvStatus::success, 1)), 4);
  EXPECT_EQ(asked[512], 2);
  EXPECT_EQ(asked[1024], 1);
}

TEST_F(HintsWithoutTime, BeginAnewAfterAReset) {
  const HvCall large = list(discard, {of_2_mib(1, 4)});
  EXPECT_FALSE(hypercalls->handle_some(large)->is_done);
  hypercalls->reset();
  EXPECT_EQ(run(large, hv_result(HvStatus::success, 1)), 4);
  EXPECT_EQ(asked[512], 2);
  EXPECT_EQ(asked[1024], 1);
}

TEST_F(HintsWithoutTime, AreRefusedWhereTheyFailAfterSomeSteps) {
  EXPECT_EQ(run(list(discard, {of_2_mib(1, 2), small(ram_pages, 1), small(20, 1)}),
                hv_result(HvStatus::invalid_parameter, 1)),
            3);
  EXPECT_EQ(asked[20], 0);
}

TEST_F(Hints, AreDoneWholeByAVmmThatCannotGoOn) {
  auto chosen = options();
  chosen.call_time = std::chrono::nanoseconds(0);
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  EXPECT_EQ(hypercalls.handle(list(discard, {of_2_mib(1, 5), small(8192, 1024)})), hv_result(HvStatus::success, 2));
  EXPECT_EQ(zeros().page_count(), 5U * 512 + 1024);
}

TEST(HintedHugePages, AreGivenBackWhole) {
  auto pool = test::HugePagePool::take();
  if (!pool) GTEST_SKIP() << pool.error();
  const auto guard = FaultGuard::install();
  ASSERT_TRUE(guard);
  GuestMemory memory(*MemoryMap::make({*Region::hugetlb_memfd(GuestAddress(0), 8 * mib, HugePageSize::two_mib)}));
  for (std::uint64_t page = 0; page < 2048; ++page)
    ASSERT_TRUE(memory.write_value(GuestAddress(page * page_size), page + 1));
  auto chosen = HvOptions{.memory_heat = {.policy = standard_heat_policy(memory)}};
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  const auto hinted = [&](std::uint64_t range, HvMemoryHeat heat = discard) {
    EXPECT_TRUE(memory.write_value(GuestAddress(0), static_cast<std::uint64_t>(heat)));
    EXPECT_TRUE(memory.write_value(GuestAddress(8), range));
    return *hypercalls.handle({.control = hint | reps(1), .input = GuestAddress(0)});
  };
  const auto value = [&](std::uint64_t page) {
    return *memory.read_value<std::uint64_t>(GuestAddress(page * page_size));
  };
  // Linux tries larger blocks then.
  EXPECT_EQ(hinted(small(600, 100)), hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(value(600), 601U);
  EXPECT_EQ(hinted(of_2_mib(1, 1)), hv_result(HvStatus::success, 1));
  EXPECT_EQ(hinted(small(1000, 1024)), hv_result(HvStatus::success, 1)); // one whole page, and parts
  for (const std::uint64_t page : {512U, 1023U, 1024U, 1535U})
    EXPECT_EQ(value(page), 0U) << page;
  for (const std::uint64_t page : {511U, 1536U, 2023U})
    EXPECT_EQ(value(page), page + 1) << page;
  // The kernel takes no advice for them.
  EXPECT_EQ(hinted(of_2_mib(3, 1), cold), hv_result(HvStatus::success, 1));
}

// Others may take what a guest gives back, and a store there is a SIGBUS then.
TEST(HintedHugePages, AreKeptWhereNobodyMendsFaults) {
  auto pool = test::HugePagePool::take();
  if (!pool) GTEST_SKIP() << pool.error();
  GuestMemory memory(*MemoryMap::make({*Region::hugetlb_memfd(GuestAddress(0), 8 * mib, HugePageSize::two_mib),
                                       *Region::anonymous(GuestAddress(8 * mib), 2 * mib)}));
  auto hypercalls = *ExtendedHypercalls::create(memory, {.memory_heat = {.policy = standard_heat_policy(memory)}});
  constexpr GuestAddress input(8 * mib);
  for (std::uint64_t at = 0; at < 8 * mib; at += page_size)
    ASSERT_TRUE(memory.write_value(GuestAddress(at), std::uint64_t{1}));
  const auto hinted = [&](std::uint64_t range) {
    EXPECT_TRUE(memory.write_value(input, static_cast<std::uint64_t>(discard)));
    EXPECT_TRUE(memory.write_value(GuestAddress(input.value() + 8), range));
    return *hypercalls.handle({.control = hint | reps(1), .input = input});
  };
  EXPECT_EQ(hinted(of_2_mib(1, 2)), hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(hypercalls.heat_counts().done, HeatDone{.kept_pages = 1024});
  EXPECT_EQ(hinted(small(2049, 1)), hv_result(HvStatus::success, 1)) << "of no huge page";

  const auto guard = FaultGuard::install();
  ASSERT_TRUE(guard);
  EXPECT_EQ(hinted(of_2_mib(1, 1)), hv_result(HvStatus::success, 1));
  // All that the pool has.
  constexpr std::size_t most = 512;
  std::vector<Region> others;
  bool is_empty = false;
  while (others.size() < most) {
    auto other = Region::hugetlb(GuestAddress(0), 2 * mib, HugePageSize::two_mib);
    is_empty = !other;
    if (is_empty) break;
    others.push_back(*std::move(other));
    static_cast<volatile char*>(others.back().host_address())[0] = 1;
  }
  if (!is_empty) GTEST_SKIP() << "the pool has more pages than are taken for a test";
  EXPECT_EQ(*hypercalls.handle({.control = query, .output = GuestAddress(2 * mib)}),
            hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(*hypercalls.handle({.control = query, .output = GuestAddress(4 * mib)}), 0U);
}

TEST_F(Hints, AndAnswersAreDeniedBeyondTheRateLimit) {
  auto chosen = options();
  chosen.rate_limit = HvRateLimit{.time = std::chrono::nanoseconds(1), .period = std::chrono::hours(1)};
  for (const bool hint_is_first : {true, false}) {
    auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
    const HvCall two = list(discard, {small(1, 1), small(2, 1)}, 1);
    const HvCall answer{.control = boot_zeroed, .output = GuestAddress(0x5000)};
    if (hint_is_first)
      EXPECT_EQ(hypercalls.handle(two), hv_result(HvStatus::success, 2));
    else
      EXPECT_EQ(hypercalls.handle(answer), hv_result(HvStatus::success));
    EXPECT_EQ(hypercalls.handle(two), hv_result(HvStatus::operation_denied, 1));
    EXPECT_EQ(hypercalls.handle(answer), hv_result(HvStatus::operation_denied));
    EXPECT_EQ(hypercalls.handle({.control = query, .output = GuestAddress(0x5000)}), 0U);
    EXPECT_EQ(hypercalls.counts().memory_heat_hint, hint_is_first ? 2U : 1U);
  }
  chosen.rate_limit->period = {};
  EXPECT_EQ(ExtendedHypercalls::create(memory, chosen).error().code, HvErrc::invalid_options);
  // It comes back with time.
  chosen.rate_limit = HvRateLimit{.time = std::chrono::microseconds(1), .period = std::chrono::microseconds(100)};
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  int denied = 0;
  for (int allowed = 0; allowed < 3;) {
    const auto result = *hypercalls.handle(list(discard, {small(1, 1)}));
    ++(result == hv_result(HvStatus::success, 1) ? allowed : denied);
  }
  EXPECT_GT(denied, 0);
}

// A step that is denied was the last one.
TEST_F(HintsWithoutTime, BeginAnewAfterAStepThatWasRefused) {
  const HvCall large = list(discard, {of_2_mib(1, 4), small(9000, 1)});
  HvCall call = large;
  EXPECT_FALSE(hypercalls->handle_some(call)->is_done);
  call.input = GuestAddress(64 * mib); // no RAM
  EXPECT_EQ(hypercalls->handle_some(call)->value, hv_result(HvStatus::invalid_parameter));
  EXPECT_GT(run(large, hv_result(HvStatus::success, 2)), 0);
  EXPECT_EQ(asked[512], 2);
  EXPECT_EQ(asked[1024], 1);
  // And it is told how many were done.
  call = large;
  call.control |= std::uint64_t{1} << 48;
  call.input = GuestAddress(64 * mib);
  EXPECT_EQ(hypercalls->handle_some(call)->value, hv_result(HvStatus::invalid_parameter, 1));
}

// Where a list begins is the guest's to say: one that goes on is no other than one that begins.
TEST_F(Hints, ThatGoOnAreDeniedBeyondTheRateLimitToo) {
  auto chosen = options();
  chosen.call_time = {};
  chosen.rate_limit = HvRateLimit{.time = std::chrono::nanoseconds(1), .period = std::chrono::hours(1)};
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  HvCall call = list(discard, {of_2_mib(1, 1), of_2_mib(2, 1), of_2_mib(3, 1)});
  const auto first = hypercalls.handle_some(call);
  ASSERT_TRUE(first);
  ASSERT_FALSE(first->is_done);
  call.control = first->value;
  EXPECT_EQ(hypercalls.handle_some(call),
            HvCallProgress(HvCallStep{.value = hv_result(HvStatus::operation_denied, 1)}));
  EXPECT_EQ(zeros(), PageSet(pages(512, 512)));
}

// vCPUs that send the worst there is, while answers are made and the map changes: what is outside stays as it was, and
// no answer has a page with data.
TEST_F(Hints, OfHostileVcpusHarmNobody) {
  constexpr std::uint64_t fence = 0x5AFE'5AFE;
  const Region other = *Region::anonymous(GuestAddress(64 * mib), 2 * mib);
  const MemoryMap with_other = *memory.snapshot()->with(other);
  const MemoryMap without = *memory.snapshot();
  // Memory of the VMM's, beside the guest's.
  const Region own = *Region::anonymous(GuestAddress(0), 8 * mib);
  auto* const fenced = static_cast<volatile std::uint64_t*>(own.host_address());
  for (std::uint64_t i = 0; i < own.bytes() / 8; i += 512)
    fenced[i] = fence;
  auto chosen = options();
  chosen.call_time = std::chrono::microseconds(20);
  // Nobody gives these away.
  chosen.memory_heat.pinned = pages(2048, 1024);
  auto hypercalls = *ExtendedHypercalls::create(memory, chosen);
  std::atomic<bool> is_over = false;
  std::atomic<std::uint64_t> calls = 0;
  {
    std::vector<std::jthread> threads;
    for (std::uint32_t vcpu = 0; vcpu < 3; ++vcpu)
      threads.emplace_back([&, vcpu] {
        std::mt19937_64 random(vcpu);
        const std::uint64_t at = (8192 + vcpu) * page_size; // its list
        for (int round = 0; round < 150; ++round) {
          std::vector<std::uint64_t> ranges(1 + random() % 511);
          for (std::uint64_t& range : ranges) {
            const std::uint64_t kinds[] = {random(),
                                           small(random() % 5000, 1 + random() % 2048),
                                           of_2_mib(random() % 32, 1 + random() % 8),
                                           of_1_gib(0, 2048),
                                           of_2_mib(0, 2048),
                                           small(8200, 1)};
            range = kinds[random() % (round % 3 == 0 ? 6 : 3)];
          }
          if (round % 4 == 0) ranges.assign(511, of_2_mib(0, 8));
          HvCall call = list(random() % 4, ranges, random() % ranges.size(), at);
          call.vp_index = vcpu;
          for (int steps = 0; steps < 5000; ++steps) {
            const auto progress = hypercalls.handle_some(call);
            ++calls;
            if (!progress || progress->is_done) break;
            call.control = progress->value;
          }
        }
      });
    std::jthread survey([&] {
      while (!is_over) {
        const Survey seen = memory.survey();
        EXPECT_FALSE(seen.zeroed().intersects(pages(2048, 1024)));
        // The fourth vCPU's page: what it gets, no other writes.
        constexpr std::uint64_t output = 2200 * page_size;
        EXPECT_EQ(*hypercalls.handle({.control = boot_zeroed, .output = GuestAddress(output)}), 0U);
        const auto count = *memory.read_value<std::uint64_t>(GuestAddress(output));
        ASSERT_LE(count, 255U);
        for (std::uint64_t i = 0; i < count; ++i) {
          const PageRange reported = pages(*memory.read_value<std::uint64_t>(GuestAddress(output + 8 + 16 * i)),
                                           *memory.read_value<std::uint64_t>(GuestAddress(output + 16 + 16 * i)));
          EXPECT_FALSE(reported.overlaps(pages(2048, 1024)));
        }
      }
    });
    std::jthread mapper([&] {
      for (bool has_other = false; !is_over; has_other = !has_other)
        memory.replace(has_other ? without : with_other);
    });
    threads.clear();
    is_over = true;
  }
  EXPECT_GT(calls, 450U);
  for (std::uint64_t i = 0; i < own.bytes() / 8; i += 512)
    ASSERT_EQ(fenced[i], fence);
  memory.replace(without);
  for (std::uint64_t page = 2048; page < 3072; ++page)
    if (page != 2200) EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(page * page_size + 8)), page);
  for (std::uint64_t page = 24 * mib / page_size; page < 25 * mib / page_size; ++page)
    EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(page * page_size + 8)), page);
}

} // namespace
