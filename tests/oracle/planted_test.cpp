#include "draw.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <iostream>
#include <span>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "session.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_ext;

// Surveyors with a bug each, and whether the oracle finds it: an oracle that cannot go red proves nothing.

using namespace cppvmm;
using namespace cppvmm::oracle;

namespace {

/// Writes the answer as the handler would.
Answered answer_with(const GuestMemory& memory, const PageSet& zeroed, GuestAddress output) {
  Answered answered;
  for (const PageRange& range : zeroed.ranges())
    answered.zeroed.push_back({range.first().value(), range.count()});
  const auto written = memory.write(output, encode_boot_zeroed(zeroed.largest(hv_boot_zeroed_max_ranges)));
  answered.status = written ? 0 : 5;
  return answered;
}

PageSet page(std::uint64_t number) { return PageRange::make(PageNumber(number), 1).value(); }

/// A survey that goes by mincore(2) for private memory: it forgets what is in swap.
Answered forgets_swap(const GuestMemory& memory, const SurveyOptions& options, GuestAddress output) {
  SurveyOptions kept = options;
  kept.leave_out.add(page(output.page().value()));
  PageSet zeroed = memory.survey(kept).zeroed();
  for (const Region& region : memory.snapshot()->regions()) {
    if (region.kind() != RegionKind::ram || region.backing() != Backing::anonymous) continue;
    std::vector<unsigned char> resident(region.pages().count());
    if (mincore(region.host_address(), region.bytes(), resident.data()) != 0) continue;
    for (std::size_t i = 0; i < resident.size(); ++i) {
      if ((resident[i] & 1) == 0) zeroed.add(page(region.pages().first().value() + i));
    }
  }
  zeroed.remove(memory.marks().pages());
  zeroed.remove(kept.leave_out);
  return answer_with(memory, zeroed, output);
}

/// A survey that goes by this process's page tables for a shared memfd: what others wrote is not there.
Answered trusts_own_tables(const GuestMemory& memory, const SurveyOptions& options, GuestAddress output) {
  SurveyOptions kept = options;
  kept.leave_out.add(page(output.page().value()));
  PageSet zeroed = memory.survey(kept).zeroed();
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  for (const Region& region : memory.snapshot()->regions()) {
    if (region.kind() != RegionKind::ram || region.backing() != Backing::memfd) continue;
    std::vector<std::uint64_t> entries(region.pages().count());
    const auto bytes = entries.size() * sizeof(std::uint64_t);
    const auto from = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(region.host_address()) / page_size * 8);
    if (pread(pagemap, entries.data(), bytes, from) != static_cast<ssize_t>(bytes)) continue;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if (entries[i] >> 62 == 0) zeroed.add(page(region.pages().first().value() + i));
    }
  }
  close(pagemap);
  zeroed.remove(memory.marks().pages());
  zeroed.remove(kept.leave_out);
  return answer_with(memory, zeroed, output);
}

/// A handler that forgets that it is about to write its answer.
Answered loses_its_own_page(const GuestMemory& memory, const SurveyOptions& options, GuestAddress output) {
  return answer_with(memory, memory.survey(options).zeroed(), output);
}

/// A look at content that reads the first half of each page.
Answered reads_half_pages(const GuestMemory& memory, const SurveyOptions& options, GuestAddress output) {
  SurveyOptions kept = options;
  kept.leave_out.add(page(output.page().value()));
  const Survey survey = memory.survey(kept);
  PageSet zeroed = survey.zeroed();
  for (const PageRange& pages : survey.touched.ranges()) {
    for (std::uint64_t i = 0; i < pages.count(); ++i) {
      std::array<std::byte, page_size / 2> half;
      const PageNumber number(pages.first().value() + i);
      if (!memory.read(GuestAddress(number.value() * page_size), half)) continue;
      if (std::ranges::all_of(half, [](std::byte byte) { return byte == std::byte{}; }))
        zeroed.add(page(number.value()));
    }
  }
  zeroed.remove(memory.marks().pages());
  zeroed.remove(kept.leave_out);
  return answer_with(memory, zeroed, output);
}

/// A write watch that asks which pages were written, where it should ask which were not: of shared memory, the entry of
/// a written page can be gone, and nothing tells then.
Answered believes_in_missing_entries(const GuestMemory& memory, const SurveyOptions& options, GuestAddress output) {
  SurveyOptions kept = options;
  kept.leave_out.add(page(output.page().value()));
  const Survey survey = memory.survey(kept);
  PageSet zeroed = survey.zeroed();
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  for (const RegionSurvey& report : survey.regions) {
    if (!report.watch || report.watch->error || report.backing != Backing::memfd) continue;
    const Region& region = *memory.snapshot()->find(report.pages.start_address());
    PageSet unwritten(region.pages());
    for (std::uint64_t i = 0; i < region.pages().count(); ++i) {
      const auto at = reinterpret_cast<std::uintptr_t>(region.host_address()) + i * page_size;
      std::uint64_t entry = 0;
      // Documentation/admin-guide/mm/pagemap.rst: bit 63, present; bit 57, write-protected by userfaultfd.
      if (pread(pagemap, &entry, sizeof entry, static_cast<off_t>(at / page_size * sizeof entry)) != sizeof entry ||
          (entry >> 63 == 1 && (entry >> 57 & 1) == 0))
        unwritten.remove(page(region.pages().first().value() + i));
    }
    zeroed.add(unwritten);
  }
  close(pagemap);
  zeroed.remove(memory.marks().pages());
  zeroed.remove(kept.leave_out);
  return answer_with(memory, zeroed, output);
}

/// The bug is found within so many cases, as unsoundness; and all those cases hold with the real survey.
void expect_that_it_is_found(const Surveyor& planted, std::uint64_t cases, const Profile& profile) {
  auto oracle = Oracle::start();
  ASSERT_TRUE(oracle) << oracle.error();
  Plan what = plan(cases);
  std::cout << "seed " << what.seed << std::endl;
  const Session red = run_cases(*oracle, what, profile, {}, planted);
  ASSERT_TRUE(red.failure) << "not found in " << red.figures.cases << " cases";
  EXPECT_GT(red.failure->outcome.figures.unsound, 0U) << red.failure->report;
  std::cout << "found in case " << red.figures.cases << "\n"
            << red.failure->report.substr(red.failure->report.find("the smallest")) << std::flush;
  what.cases = red.figures.cases;
  const Session green = run_cases(*oracle, what, profile);
  EXPECT_FALSE(green.failure) << green.failure->report;
}

TEST(OracleOfTheOracle, FindsASurveyThatForgetsSwappedPages) {
  const auto swap = test::SwapSpace::take();
  if (!swap) GTEST_SKIP() << swap.error();
  expect_that_it_is_found(forgets_swap, 800, {.swap = true, .files = false});
}

TEST(OracleOfTheOracle, FindsASurveyThatTrustsItsOwnTablesForASharedMemfd) {
  expect_that_it_is_found(trusts_own_tables, 800, {.files = false});
}

TEST(OracleOfTheOracle, FindsAnAnswerThatLosesItsOwnPage) {
  expect_that_it_is_found(loses_its_own_page, 400, {.files = false});
}

TEST(OracleOfTheOracle, FindsAContentCheckThatReadsHalfPages) {
  expect_that_it_is_found(reads_half_pages, 400, {.files = false, .mode = SurveyMode::content_check});
}

TEST(OracleOfTheOracle, FindsAWriteWatchThatBelievesInMissingEntries) {
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << "this kernel has no asynchronous write protection";
  expect_that_it_is_found(believes_in_missing_entries, 800,
                          {.files = false, .mode = SurveyMode::write_watch, .mode_options = 0});
}

/// Sound, and not found to be complete.
void expect_that_misses_are_found(const Surveyor& planted, const Profile& profile) {
  auto oracle = Oracle::start();
  ASSERT_TRUE(oracle) << oracle.error();
  const Session session = run_cases(*oracle, plan(400), profile, {}, planted);
  ASSERT_TRUE(session.failure);
  EXPECT_EQ(session.figures.unsound, 0U);
  EXPECT_GT(session.figures.unexplained(), 0U);
}

TEST(OracleOfTheOracle, FindsAContentCheckThatIsForgotten) {
  expect_that_misses_are_found(
      [](const GuestMemory& memory, const SurveyOptions& options, GuestAddress output) {
        SurveyOptions without = options;
        without.content_check.reset();
        return real_surveyor(memory, without, output);
      },
      {.files = false, .mode = SurveyMode::content_check});
}

TEST(OracleOfTheOracle, FindsAWriteWatchThatIsForgotten) {
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << "this kernel has no asynchronous write protection";
  expect_that_misses_are_found(
      [](const GuestMemory& memory, const SurveyOptions& options, GuestAddress output) {
        // Which knows of no watch.
        const auto map = memory.snapshot();
        auto same = MemoryMap::make(std::vector<Region>(map->regions().begin(), map->regions().end()));
        if (!same)
          return Answered{
              .status = ~std::uint64_t{0}, .zeroed = {}, .direct = {}, .problems = {same.error().message()}};
        SurveyOptions kept = options;
        kept.leave_out.add(page(output.page().value()));
        PageSet zeroed = GuestMemory(std::move(*same)).survey(kept).zeroed();
        zeroed.remove(memory.marks().pages());
        return answer_with(memory, zeroed, output);
      },
      {.files = false, .mode = SurveyMode::write_watch, .mode_options = 0});
}

// A survey that calls everything touched is sound, and misses without a reason.
TEST(OracleOfTheOracle, FindsASurveyThatMissesWhatItNeedNot) {
  auto oracle = Oracle::start();
  ASSERT_TRUE(oracle) << oracle.error();
  const Session session = run_cases(*oracle, plan(80), {.files = false}, {},
                                    [](const GuestMemory& memory, const SurveyOptions&, GuestAddress output) {
                                      return answer_with(memory, PageSet(), output);
                                    });
  ASSERT_TRUE(session.failure);
  EXPECT_EQ(session.figures.unsound, 0U);
  EXPECT_GT(session.figures.unexplained(), 0U);
}

} // namespace
