#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <gtest/gtest.h>
#include <latch>
#include <memory>
#include <optional>
#include <stdexcept>
#include <stop_token>
#include <thread>
#include <vector>

#include "../../guest_memory/survey/shared_runs.hpp"

// Who shares what when several ask for the same at once.

namespace {

using Runs = cppvmm::SharedRuns<int, int>;
using Given = Runs::Given;
constexpr auto never = Runs::Clock::time_point::max();
constexpr std::optional<int> alone = std::nullopt;

template <class Run>
std::optional<int> get(Runs& runs, std::optional<int> key, Run run) {
  return runs.get(key, std::stop_token(), never, run);
}

/// One run at a time, of which the first does not end before it is told to.
class SharedRuns : public testing::Test {
protected:
  void occupy() {
    occupying = std::jthread([this] {
      EXPECT_EQ(get(runs, alone,
                    [this] {
                      is_occupied.count_down();
                      goes_on.wait();
                      return Given{0};
                    }),
                0);
    });
    is_occupied.wait();
  }
  void wait_until_waiting(std::size_t callers) const {
    while (runs.waiting() != callers)
      std::this_thread::yield();
  }
  void let_go() {
    goes_on.count_down();
    occupying.join();
  }

  Runs runs{1};
  std::latch is_occupied{1};
  std::latch goes_on{1};
  std::jthread occupying;
};

TEST_F(SharedRuns, WhoeverWaitsSharesTheNextOne) {
  occupy();
  std::atomic<int> made = 0;
  {
    std::vector<std::jthread> threads;
    threads.reserve(8);
    for (int i = 0; i < 8; ++i)
      threads.emplace_back([&] { EXPECT_EQ(get(runs, 1, [&] { return Given{++made}; }), 1); });
    wait_until_waiting(8);
    let_go();
  }
  EXPECT_EQ(made, 1);
  EXPECT_EQ(get(runs, 1, [&] { return Given{++made}; }), 2);
}

TEST_F(SharedRuns, OnlyTheSameIsShared) {
  occupy();
  std::atomic<int> made = 0;
  {
    std::vector<std::jthread> threads;
    threads.reserve(5);
    for (const std::optional<int> key : {std::optional(1), std::optional(2), alone, alone, std::optional(2)})
      threads.emplace_back([&, key] {
        EXPECT_EQ(get(runs, key,
                      [&] {
                        ++made;
                        return Given{key.value_or(7)};
                      }),
                  key.value_or(7));
      });
    wait_until_waiting(5);
    let_go();
  }
  EXPECT_EQ(made, 4);
}

TEST_F(SharedRuns, WhoeverWaitedForOneThatThrewAsksAgain) {
  occupy();
  std::atomic<int> made = 0;
  std::atomic<int> thrown = 0;
  std::atomic<int> got = 0;
  {
    std::vector<std::jthread> threads;
    threads.reserve(5);
    for (int i = 0; i < 5; ++i)
      threads.emplace_back([&] {
        try {
          const auto result = get(runs, 1, [&] {
            if (++made == 1) throw std::runtime_error("the first one");
            return Given{3};
          });
          EXPECT_EQ(result, 3);
          ++got;
        } catch (const std::runtime_error&) {
          ++thrown;
        }
      });
    wait_until_waiting(5);
    let_go();
  }
  EXPECT_EQ(thrown, 1);
  EXPECT_EQ(got, 4);
  EXPECT_EQ(runs.waiting(), 0U);
}

TEST_F(SharedRuns, AllEndIfEachThrows) {
  occupy();
  std::atomic<int> thrown = 0;
  {
    std::vector<std::jthread> threads;
    threads.reserve(8);
    for (int i = 0; i < 8; ++i)
      threads.emplace_back([&] {
        try {
          static_cast<void>(get(runs, 1, []() -> Given { throw std::runtime_error("all"); }));
        } catch (const std::runtime_error&) {
          ++thrown;
        }
      });
    wait_until_waiting(8);
    let_go();
  }
  EXPECT_EQ(thrown, 8);
  EXPECT_EQ(get(runs, 1, [] { return Given{1}; }), 1);
}

TEST_F(SharedRuns, WhatMayNotBeSharedIsNot) {
  occupy();
  std::atomic<int> made = 0;
  std::atomic<int> partial = 0;
  {
    std::vector<std::jthread> threads;
    threads.reserve(4);
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&] {
        const auto result = get(runs, 1, [&] {
          const bool is_first = ++made == 1;
          return Given{.result = is_first ? 1 : 2, .may_be_shared = !is_first};
        });
        if (result == 1) ++partial;
      });
    wait_until_waiting(4);
    let_go();
  }
  EXPECT_EQ(partial, 1);
}

TEST_F(SharedRuns, AWaitEndsWhenItIsToldTo) {
  occupy();
  const auto unexpected = [] {
    ADD_FAILURE() << "it began";
    return Given{1};
  };
  EXPECT_EQ(runs.get(9, std::stop_token(), Runs::Clock::now(), unexpected), std::nullopt);
  std::stop_source stop;
  std::jthread stopped([&] { EXPECT_EQ(runs.get(1, stop.get_token(), never, unexpected), std::nullopt); });
  wait_until_waiting(1);
  stop.request_stop();
  stopped.join();
  EXPECT_EQ(runs.waiting(), 0U);
  // Those who stay get theirs.
  std::stop_source another;
  std::jthread leaving([&] { EXPECT_EQ(runs.get(1, another.get_token(), never, unexpected), std::nullopt); });
  wait_until_waiting(1);
  std::jthread staying([&] { EXPECT_EQ(get(runs, 1, [] { return Given{5}; }), 5); });
  wait_until_waiting(2);
  another.request_stop();
  leaving.join();
  let_go();
  staying.join();
  EXPECT_EQ(get(runs, alone, [] { return Given{6}; }), 6);
}

TEST_F(SharedRuns, MoreMayBegin) {
  occupy();
  std::jthread waiting([&] { EXPECT_EQ(get(runs, 1, [] { return Given{2}; }), 2); });
  wait_until_waiting(1);
  runs.set_most(2);
  waiting.join();
  let_go();
}

TEST(SharedResults, AreNotCopiedAndAreInProgressUntilAllHaveUsedThem) {
  struct Only {
    int value = 0;
  };
  cppvmm::SharedRuns<int, std::unique_ptr<Only>> results(1);
  using Result = std::unique_ptr<Only>;
  std::latch both_use_it(2);
  std::atomic<int> made = 0;
  std::atomic<const Only*> seen[2] = {};
  const auto run = [&] { return cppvmm::SharedRuns<int, Result>::Given{std::make_unique<Only>(Only{++made})}; };
  std::latch first_runs(1);
  std::latch first_ends(1);
  std::jthread first([&] {
    EXPECT_TRUE(results.use(alone, std::stop_token(), never, run, [&](Result& result, bool is_last) {
      EXPECT_TRUE(is_last);
      EXPECT_EQ(result->value, 1);
      first_runs.count_down();
      first_ends.wait();
    }));
  });
  first_runs.wait();
  std::jthread pair[2];
  for (int i = 0; i < 2; ++i)
    pair[i] = std::jthread([&, i] {
      EXPECT_TRUE(results.use(1, std::stop_token(), never, run, [&](Result& result, bool) {
        seen[i] = result.get();
        both_use_it.arrive_and_wait();
        EXPECT_EQ(result->value, 2);
      }));
    });
  while (results.waiting() != 2)
    std::this_thread::yield();
  // The first is used still.
  EXPECT_EQ(made, 1);
  first_ends.count_down();
  for (std::jthread& each : pair)
    each.join();
  EXPECT_EQ(made, 2);
  EXPECT_EQ(seen[0].load(), seen[1].load());
}

TEST_F(SharedRuns, WhoeverThrowsWhenUsingAResultLeavesItToTheOthers) {
  occupy();
  std::atomic<int> used = 0;
  {
    std::vector<std::jthread> threads;
    threads.reserve(4);
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&] {
        try {
          EXPECT_TRUE(runs.use(
              1, std::stop_token(), never, [] { return Given{3}; },
              [&](int& result, bool) {
                EXPECT_EQ(result, 3);
                if (++used == 2) throw std::runtime_error("one of them");
              }));
        } catch (const std::runtime_error&) {
        }
      });
    wait_until_waiting(4);
    let_go();
  }
  EXPECT_EQ(used, 4);
  EXPECT_EQ(get(runs, alone, [] { return Given{6}; }), 6);
}

// Each caller has counted before it calls: what it gets has seen that.
TEST(SharedRunsOfManyThreads, BeginAfterEachCallAndNeverMoreThanSoMany) {
  for (const std::size_t most : {1U, 2U, 3U}) {
    Runs runs(most);
    std::atomic<int> counted = 0;
    std::atomic<std::size_t> inside = 0;
    std::atomic<std::size_t> most_inside = 0;
    std::latch begin(6);
    {
      std::vector<std::jthread> threads;
      threads.reserve(6);
      for (int i = 0; i < 6; ++i)
        threads.emplace_back([&, i] {
          begin.arrive_and_wait();
          for (int call = 0; call < 2000; ++call) {
            const int own = ++counted;
            const auto seen = get(runs, i == 5 ? alone : std::optional(i % 2), [&] {
              const int now = counted;
              const std::size_t together = ++inside;
              for (std::size_t before = most_inside;
                   before < together && !most_inside.compare_exchange_weak(before, together);) {
              }
              std::this_thread::yield();
              --inside;
              return Given{now};
            });
            ASSERT_GE(seen, own);
          }
        });
    }
    EXPECT_LE(most_inside, most);
    EXPECT_EQ(runs.waiting(), 0U);
  }
}

} // namespace
