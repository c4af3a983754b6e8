#include <atomic>
#include <chrono>
#include <cstdint>
#include <expected>
#include <gtest/gtest.h>
#include <latch>
#include <span>
#include <stop_token>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <vector>

#include "support/machine_facts.hpp"
#include "support/surveyed_memory.hpp"

import cppvmm.guest_memory;

// Surveys that several threads ask for at once, and surveys that end early.

using namespace cppvmm;
using test::MemoryKind;

namespace {

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }
PageRange page(std::uint64_t number) { return pages(number, 1); }

class SharedSurvey : public testing::Test {
protected:
  static constexpr std::uint64_t count = 2048;

  SharedSurvey() {
    const Region region = *Region::anonymous(GuestAddress(0), count * page_size);
    madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
    memory.replace(*MemoryMap::make({region}));
  }

  GuestMemory memory;
};

// Each thread has pages of its own: one that it writes before each call, and one that it leaves out.
TEST_F(SharedSurvey, NeverReportsWhatWasWrittenBeforeTheCall) {
  constexpr std::uint64_t threads = 6;
  constexpr std::uint64_t calls = 1500;
  std::latch begin(threads);
  std::vector<std::jthread> asking;
  asking.reserve(threads);
  for (std::uint64_t i = 0; i < threads; ++i)
    asking.emplace_back([&, i] {
      const PageRange own = page(8 * i + 1);
      SurveyOptions options;
      options.leave_out.add(page(1000 + 2 * i));
      PageSet others;
      for (std::uint64_t other = 0; other < threads; ++other)
        if (other != i) others.add(page(1000 + 2 * other));
      begin.arrive_and_wait();
      for (std::uint64_t call = 0; call < calls; ++call) {
        ASSERT_TRUE(memory.write_value(own.start_address(), call + 1));
        const Survey survey = memory.survey(options);
        ASSERT_FALSE(survey.zeroed().intersects(own)) << "thread " << i << ", call " << call;
        ASSERT_FALSE(survey.zeroed().intersects(options.leave_out.ranges().front()));
        PageSet missing = others;
        missing.remove(survey.zeroed());
        ASSERT_TRUE(missing.empty());
        ASSERT_TRUE(memory.discard(own));
      }
    });
}

/// A survey that waits in the middle until it is told to go on, with no other beside it.
class OccupiedSurvey : public SharedSurvey {
protected:
  OccupiedSurvey() {
    memory.set_most_surveys(1);
    EXPECT_TRUE(memory.begin_write_log({.collect =
                                            [this](PageRange, std::span<std::uint64_t>) {
                                              if (++collected == 1) {
                                                is_inside.count_down();
                                                goes_on.wait();
                                              }
                                              return MemoryResult<void>();
                                            },
                                        .by = Toucher::guest}));
    occupying = std::jthread([this] { EXPECT_EQ(memory.survey().zeroed().page_count(), count); });
    is_inside.wait();
  }
  void TearDown() override {
    if (occupying.joinable()) let_go();
  }
  void let_go() {
    goes_on.count_down();
    occupying.join();
  }

  std::atomic<int> collected = 0;
  std::latch is_inside{1};
  std::latch goes_on{1};
  std::jthread occupying;
};

void expect_nothing_known(const Survey& survey) {
  EXPECT_TRUE(survey.zeroed().empty());
  EXPECT_EQ(survey.touched, survey.ram);
  EXPECT_EQ(survey.ram.page_count(), 2048U);
  ASSERT_FALSE(survey.regions.empty());
  for (const RegionSurvey& region : survey.regions) {
    ASSERT_TRUE(region.error);
    EXPECT_EQ(region.error->code, MemoryErrc::stopped);
    EXPECT_EQ(region.zeroed_pages, 0U);
  }
}

TEST_F(OccupiedSurvey, IsNotWaitedForByOneThatIsStopped) {
  std::stop_source stop;
  std::jthread asking([&] { expect_nothing_known(memory.survey({.stop = stop.get_token()})); });
  expect_nothing_known(memory.survey({.max_time = std::chrono::milliseconds(1)}));
  stop.request_stop();
  asking.join();
  EXPECT_EQ(collected, 1);
}

TEST_F(OccupiedSurvey, IsNotSharedByWhoAskedSince) {
  ASSERT_TRUE(memory.write_value(GuestAddress(0), 1));
  std::jthread asking([&] { EXPECT_EQ(memory.survey().zeroed(), PageSet(pages(1, count - 1))); });
  let_go();
  asking.join();
  EXPECT_EQ(collected, 2);
}

TEST_F(SharedSurvey, ThatIsToStopAtOnceKnowsNothing) {
  std::stop_source stop;
  stop.request_stop();
  expect_nothing_known(memory.survey({.stop = stop.get_token()}));
  expect_nothing_known(memory.survey({.max_time = std::chrono::nanoseconds(0)}));
  expect_nothing_known(memory.survey({.max_time = std::chrono::nanoseconds::min()}));
  EXPECT_EQ(memory.survey({.max_time = std::chrono::hours(1)}).zeroed().page_count(), count);
}

TEST_F(SharedSurvey, ThatIsStoppedDuringALookAtContentReadsNoMore) {
  constexpr std::uint64_t large = (std::uint64_t{32} << 20) / page_size;
  const Region region = *Region::anonymous(pages(count, 1).start_address(), large * page_size);
  ASSERT_TRUE(region.populate());
  ASSERT_TRUE(memory.add_region(region));
  std::stop_source stop;
  SurveyOptions options{.stop = stop.get_token()};
  options.content_check =
      ContentCheckOptions{.executor = [&](const auto&) { stop.request_stop(); }, .parallel_tasks = 1};
  const Survey survey = memory.survey(options);
  EXPECT_EQ(survey.zeroed(), PageSet(pages(0, count)));
  ASSERT_TRUE(survey.regions.back().content);
  EXPECT_EQ(survey.regions.back().content->checked_pages, 0U);
  EXPECT_EQ(survey.regions.back().content->unchecked_pages, large);
}

// What may end early looks at page tables in pieces, from one multiple of 16 GiB of host addresses to the next.
TEST(SurveyInPieces, FindsTheSame) {
  constexpr std::uint64_t gib = std::uint64_t{1} << 30;
  constexpr std::uint64_t bytes = 52 * gib;
  const Region region = *Region::anonymous(GuestAddress(gib), bytes);
  madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
  const auto host = reinterpret_cast<std::uintptr_t>(region.host_address());
  PageSet touched;
  const auto touch = [&](std::uint64_t at) {
    *reinterpret_cast<volatile char*>(host + at) = 1;
    touched.add(page((gib + at) / page_size));
  };
  touch(0);
  touch(bytes - page_size);
  for (std::uint64_t edge = 16 * gib - host % (16 * gib); edge < bytes; edge += 16 * gib)
    for (const std::uint64_t at : {edge - page_size, edge, edge + 5 * page_size})
      if (at < bytes) touch(at);
  // More than one call returns.
  for (std::uint64_t i = 0; i < 5000; ++i)
    touch(5 * gib + 2 * i * page_size);
  GuestMemory memory(*MemoryMap::make({region}));
  std::stop_source stop;
  EXPECT_EQ(memory.survey({.stop = stop.get_token()}).touched, touched);
  EXPECT_EQ(memory.survey().touched, touched);
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << "this kernel has no write watch";
  ASSERT_TRUE(memory.arm_write_watch(region.start()));
  EXPECT_EQ(memory.survey({.max_time = std::chrono::hours(1)}).touched, touched);
}

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

class StoppedSurveyOf : public test::SurveyedMemory, public testing::WithParamInterface<MemoryKind> {
protected:
  [[nodiscard]] MemoryKind kind() const override { return GetParam(); }
};

INSTANTIATE_TEST_SUITE_P(Kinds, StoppedSurveyOf, testing::ValuesIn(kinds),
                         [](const auto& info) { return std::string(info.param.name); });

// Whenever it is stopped, what it reports is zero.
TEST_P(StoppedSurveyOf, ReportsNothingThatItDoesNotKnow) {
  const Survey whole = memory.survey(options());
  ASSERT_FALSE(whole.touched.empty());
  constexpr int parts = 200;
  for (int i = 0; i <= parts; ++i) {
    SurveyOptions some = options();
    some.max_time = whole.cost * i / parts;
    const Survey survey = memory.survey(some);
    PageSet unknown = survey.zeroed();
    unknown.remove(whole.zeroed());
    ASSERT_TRUE(unknown.empty()) << i;
    PageSet both = survey.zeroed();
    both.add(survey.touched);
    ASSERT_EQ(both, survey.ram) << i;
    for (const RegionSurvey& region : survey.regions)
      if (region.error) {
        ASSERT_EQ(region.error->code, MemoryErrc::stopped) << region.error->message();
        ASSERT_FALSE(survey.zeroed().intersects(region.pages)) << i;
      }
    if (i == 0) {
      ASSERT_TRUE(survey.zeroed().empty());
    }
  }
  SurveyOptions all = options();
  all.max_time = std::chrono::hours(1);
  EXPECT_EQ(memory.survey(all).zeroed(), whole.zeroed());
}

} // namespace
