#include "page_state.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <memory>
#include <sched.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <vector>

import cppvmm.guest_memory;

// Surveys while everyone writes: host threads, another process through the memfd, threads that discard, and a map that
// is replaced again and again. A page that held data before the call began, and was not discarded since, is never
// reported. Each page has a state that its writer publishes with a release store after the page was written, and before
// it is discarded; whoever asks reads the states first, then asks.

using namespace cppvmm;
using oracle::Child;
using oracle::held_data;
using oracle::PageState;
using oracle::SharedMapping;

namespace {

constexpr std::uint64_t pages = 512;
constexpr unsigned surveys = 80;
constexpr unsigned rounds =
    100'000; ///< How often each writer fills and empties its pages at most; it is stopped long before.

struct Shared {
  std::array<PageState, pages> states;
  std::atomic<bool> stop = false;
  std::atomic<std::uint64_t> allowed = 0; ///< How many pages the other process may have written.
};

enum class Kind { anonymous, memfd };

class UnderFire : public testing::TestWithParam<std::tuple<Kind, EvidenceSource>> {
protected:
  void SetUp() override {
    halves = {make(GuestAddress(0), pages / 2), make(GuestAddress(pages / 2 * page_size), pages / 2)};
    memory.replace(*MemoryMap::make({*halves[0], *halves[1]}));
  }

  static bool is_shared() { return std::get<Kind>(GetParam()) == Kind::memfd; }

  static std::unique_ptr<Region> make(GuestAddress start, std::uint64_t count) {
    auto region = is_shared() ? Region::memfd(start, count * page_size) : Region::anonymous(start, count * page_size);
    madvise(region.value().host_address(), count * page_size, MADV_NOHUGEPAGE);
    return std::make_unique<Region>(*region);
  }

  [[nodiscard]] std::byte* host(std::uint64_t page) const {
    const std::uint64_t half = pages / 2;
    return static_cast<std::byte*>(halves[page / half]->host_address()) + page % half * page_size;
  }

  void discard(std::uint64_t page) const {
    const std::uint64_t half = pages / 2;
    if (is_shared())
      EXPECT_EQ(fallocate(halves[page / half]->file_descriptor(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          static_cast<off_t>(page % half * page_size), page_size),
                0);
    else
      EXPECT_EQ(madvise(host(page), page_size, MADV_DONTNEED), 0);
  }

  void publish_written(std::uint64_t page) const { shared->states[page].publish_written(); }
  void publish_discard(std::uint64_t page) const { shared->states[page].publish_discard(); }

  /// Fills every `writers`th page from `number` on, then empties them, again and again; the last time they stay.
  void write_and_discard(unsigned number, unsigned writers) const {
    for (unsigned round = 0; round < rounds && !shared->stop.load(std::memory_order_relaxed); ++round) {
      for (std::uint64_t page = number; page < pages; page += writers) {
        if (round > 0) {
          publish_discard(page);
          discard(page);
        }
        *static_cast<volatile std::byte*>(host(page) + 8 * round % page_size) = std::byte{1};
        publish_written(page);
      }
    }
  }

  [[nodiscard]] std::vector<std::uint32_t> states() const {
    std::vector<std::uint32_t> result;
    for (const PageState& state : shared->states)
      result.push_back(state.now());
    return result;
  }

  /// One survey; whether it was sound.
  void expect_sound() {
    const auto before = states();
    const PageSet zeroed = memory.survey({.leave_out = {}, .source = std::get<EvidenceSource>(GetParam())}).zeroed();
    const auto after = states();
    for (std::uint64_t page = 0; page < pages; ++page) {
      if (!held_data(before[page], after[page])) continue;
      ++checked;
      EXPECT_FALSE(zeroed.contains(PageNumber(page))) << "page " << page << " holds data, and is reported";
    }
    reported += zeroed.page_count();
  }

  /// Until enough pages held data meanwhile: a survey takes less time than a thread may take to start.
  void make_surveys() {
    for (unsigned i = 0; (i < surveys || checked < std::uint64_t{surveys} * pages / 8) && !HasFailure(); ++i)
      expect_sound();
  }

  SharedMapping<Shared> shared;
  std::array<std::unique_ptr<Region>, 2> halves;
  GuestMemory memory;
  std::uint64_t checked = 0;
  std::uint64_t reported = 0;
};

TEST_P(UnderFire, HoldsWhileThreadsWriteAndDiscard) {
  std::vector<std::jthread> writers;
  for (unsigned number = 0; number < 3; ++number)
    writers.emplace_back([this, number] { write_and_discard(number, 4); }); // a quarter stays untouched
  make_surveys();
  shared->stop = true;
  writers.clear();
  // Nothing moves any more: the untouched quarter is all that is reported.
  expect_sound();
  EXPECT_GT(checked, 0U);
  EXPECT_GT(reported, 0U);
}

/// The kind that another process can have.
class UnderAnotherProcess : public UnderFire {};

TEST_P(UnderAnotherProcess, HoldsWhileItWrites) {
  const Child child([this] {
    // A mapping of its own, so that nothing of it shows in this process's page tables.
    std::array<std::byte*, 2> views{};
    for (std::size_t i = 0; i < views.size(); ++i) {
      void* const view =
          mmap(nullptr, pages / 2 * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, halves[i]->file_descriptor(), 0);
      if (view == MAP_FAILED) {
        shared->stop = true;
        return;
      }
      views[i] = static_cast<std::byte*>(view);
    }
    for (std::uint64_t i = 0; i < pages; ++i) {
      while (i >= shared->allowed.load(std::memory_order_acquire))
        sched_yield();
      const std::uint64_t page = i * 37 % pages;
      *static_cast<volatile std::byte*>(views[page / (pages / 2)] + page % (pages / 2) * page_size) = std::byte{1};
      publish_written(page);
    }
    for (;;)
      pause();
  });
  ASSERT_TRUE(child.started());
  // Until it has written everything: some pages during each survey, most of them before it.
  std::uint64_t written = 0;
  do {
    shared->allowed.fetch_add(16, std::memory_order_release);
    written = 0;
    for (const std::uint32_t state : states())
      written += state;
    expect_sound();
  } while (written < pages && !HasFailure() && !shared->stop);
  ASSERT_FALSE(shared->stop) << "the other process could not map the memfd";
  EXPECT_GE(checked, pages);
}

TEST_P(UnderFire, HoldsWhileTheMapIsReplaced) {
  std::vector<std::jthread> threads;
  for (unsigned number = 0; number < 2; ++number)
    threads.emplace_back([this, number] { write_and_discard(number, 3); });
  threads.emplace_back([this] {
    // With another region more, and less.
    const MemoryMap both = *memory.snapshot();
    for (unsigned i = 0; i < 2000 && !shared->stop; ++i) {
      memory.replace(*both.with(*make(GuestAddress(pages * page_size), 4)));
      memory.replace(both);
    }
  });
  make_surveys();
  shared->stop = true;
  threads.clear();
  expect_sound();
  EXPECT_GT(checked, 0U);
}

std::string name_of(const testing::TestParamInfo<std::tuple<Kind, EvidenceSource>>& info) {
  const auto [kind, source] = info.param;
  return std::string(kind == Kind::memfd ? "memfd" : "anonymous") +
         (source == EvidenceSource::automatic ? "_newest" : "_legacy");
}

const auto sources = testing::Values(EvidenceSource::automatic, EvidenceSource::legacy);
INSTANTIATE_TEST_SUITE_P(Surveys, UnderFire, testing::Combine(testing::Values(Kind::anonymous, Kind::memfd), sources),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Surveys, UnderAnotherProcess, testing::Combine(testing::Values(Kind::memfd), sources),
                         name_of);

} // namespace
