#include "draw.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"

#include <cstdint>
#include <cstdlib>
#include <gtest/gtest.h>
#include <iostream>
#include <optional>
#include <string>
#include <unistd.h>

#include "session.hpp"

// Random maps, random writers, and an answer that is sound and misses nothing without a reason. A failing case prints
// its seed and its script; see Plan for how it is replayed.

using namespace cppvmm;
using namespace cppvmm::oracle;

namespace {

void expect_that_cases_hold(std::uint64_t cases, const Profile& profile) {
  auto oracle = Oracle::start();
  ASSERT_TRUE(oracle) << oracle.error();
  const Plan what = plan(cases);
  std::cout << "seed " << what.seed << std::endl;
  const Session session = run_cases(*oracle, what, profile);
  std::cout << summary(session.figures) << std::flush;
  if (session.failure) FAIL() << session.failure->report;
  EXPECT_EQ(session.figures.cases, what.cases);
  EXPECT_EQ(session.figures.unsound, 0U);
  EXPECT_EQ(session.figures.unexplained(), 0U);
}

/// Regions of files where the folder for temporary files tells the truth about them.
bool files_fit() {
  const bool fit = test::machine_facts().files.tell_the_truth();
  if (!fit)
    std::cout
        << "no regions of files: the folder for temporary files does not tell holes, or fstat and /proc/self/maps "
           "name its files differently\n";
  return fit;
}

TEST(Oracle, FindsEveryAnswerSoundAndComplete) { expect_that_cases_hold(1500, {.files = files_fit()}); }

TEST(Oracle, FindsThemSoWithHugePages) {
  const auto pool = test::HugePagePool::take(64);
  if (!pool) GTEST_SKIP() << pool.error();
  expect_that_cases_hold(300, {.huge_pages = true, .files = false});
}

TEST(Oracle, FindsThemSoWithSwap) {
  const auto swap = test::SwapSpace::take();
  if (!swap) GTEST_SKIP() << swap.error();
  expect_that_cases_hold(300, {.swap = true, .files = files_fit()});
}

} // namespace
