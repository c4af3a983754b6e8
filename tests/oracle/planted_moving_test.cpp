#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <iostream>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

#include "support/descriptor.hpp"
#include "support/machine_facts.hpp"

#include "moving.hpp"
#include "session.hpp"

import cppvmm.guest_memory;

// Surveyors with the bugs that memory in motion brings out, and whether the moving oracle finds them within so many
// surveys.

using namespace cppvmm;
using namespace cppvmm::oracle;

namespace {

constexpr std::uint64_t huge = std::uint64_t{2} << 20;

/// A survey of one region whose touched pages are those given; they are everything where nothing is known.
Survey answer(const Region& region, const PageSet& zeroed, Evidence evidence) {
  Survey survey;
  survey.ram = region.pages();
  survey.touched = survey.ram;
  survey.touched.remove(zeroed);
  survey.regions.push_back(
      {.pages = region.pages(), .kind = RegionKind::ram, .backing = region.backing(), .evidence = evidence});
  return survey;
}

PageRange pages_at(const Region& region, std::uint64_t from, std::uint64_t bytes) {
  return *PageRange::make(PageNumber(region.pages().first().value() + from / page_size), bytes / page_size);
}

/// The huge pages with an entry in own page tables, by mincore(2), which looks without the page table's lock.
PageSet found_by_mincore(const Region& region) {
  std::vector<unsigned char> resident(region.bytes() / page_size);
  PageSet found(region.pages());
  if (mincore(region.host_address(), region.bytes(), resident.data()) != 0) return found;
  for (std::uint64_t at = 0; at < region.bytes(); at += huge)
    if ((resident[at / page_size] & 1) == 0) found.remove(pages_at(region, at, huge));
  return found;
}

/// The same by PAGEMAP_SCAN, which looks so when it is not asked to write-protect.
PageSet found_by_scan(const Region& region) {
  // include/uapi/linux/fs.h, Linux 6.7.
  struct Found {
    std::uint64_t start, end, categories;
  };
  struct Request {
    std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    std::uint64_t inverted, mask, anyof, wanted;
  };
  constexpr std::uint64_t present_or_swapped = 1 << 3 | 1 << 4;
  std::vector<Found> list(64);
  const auto start = reinterpret_cast<std::uintptr_t>(region.host_address());
  Request request{.size = sizeof request,
                  .flags = 0,
                  .start = start,
                  .end = start + region.bytes(),
                  .walk_end = 0,
                  .vec = reinterpret_cast<std::uintptr_t>(list.data()),
                  .vec_len = list.size(),
                  .max_pages = 0,
                  .inverted = 0,
                  .mask = 0,
                  .anyof = present_or_swapped,
                  .wanted = present_or_swapped};
  const test::Descriptor pagemap(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  const int count = ioctl(pagemap.number(), _IOWR('f', 16, Request), &request);
  if (count < 0) return region.pages();
  PageSet found;
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i)
    found.add(pages_at(region, list[i].start - start, list[i].end - list[i].start));
  return found;
}

/// By what this kernel has: newer ones may well take the lock in mincore(2).
PageSet found_without_lock(const Region& region) {
  return test::machine_facts().pagemap_scan ? found_by_scan(region) : found_by_mincore(region);
}

/// Private huge pages are those that are found so.
Survey without_lock(const GuestMemory& memory, const SurveyOptions&) {
  const Region region = memory.snapshot()->regions()[0];
  PageSet zeroed(region.pages());
  zeroed.remove(found_without_lock(region));
  return answer(region, zeroed, Evidence::page_tables_read);
}

/// Of a file of huge pages, as many are found so as the file has pages: then there are no others.
Survey by_number_of_entries(const GuestMemory& memory, const SurveyOptions&) {
  const Region region = memory.snapshot()->regions()[0];
  const PageSet found = found_without_lock(region);
  struct stat status{};
  constexpr std::uint64_t bytes_of_block = 512;
  if (fstat(region.file_descriptor(), &status) != 0 ||
      static_cast<std::uint64_t>(status.st_blocks) * bytes_of_block != found.page_count() * page_size)
    return answer(region, {}, Evidence::none);
  PageSet zeroed(region.pages());
  zeroed.remove(found);
  return answer(region, zeroed, Evidence::page_tables_read);
}

constexpr long cachestat_call = 451; // Linux 6.5

/// Holes of a file that are confirmed by the page cache of the descriptor's own inode, wherever the pages are.
Survey by_own_page_cache(const GuestMemory& memory, const SurveyOptions&) {
  const Region region = memory.snapshot()->regions()[0];
  const int file = region.file_descriptor();
  PageSet zeroed;
  const auto end = static_cast<off_t>(region.bytes());
  for (off_t at = 0; at < end;) {
    const off_t hole = lseek(file, at, SEEK_HOLE);
    if (hole < 0 || hole >= end) break;
    const off_t data = lseek(file, hole, SEEK_DATA);
    const off_t stop = data < 0 || data > end ? end : data;
    // include/uapi/linux/mman.h.
    struct {
      std::uint64_t from, bytes;
    } range{static_cast<std::uint64_t>(hole), static_cast<std::uint64_t>(stop - hole)};
    struct {
      std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } status{};
    if (syscall(cachestat_call, file, &range, &status, 0) != 0) return answer(region, {}, Evidence::none);
    if (status.cached + status.evicted == 0) zeroed.add(pages_at(region, range.from, range.bytes));
    at = stop;
  }
  return answer(region, zeroed, Evidence::page_cache);
}

/// The bug is found, and what stands in its place makes a round of the same. A host's kernel may have no such window.
void expect_that_it_is_found(const MovingHost& host, MovingRound round, const MovingSurveyor& planted,
                             std::uint64_t most_surveys) {
  MovingFigures red;
  round.surveys = 50;
  while (red.unsound == 0 && red.surveys < most_surveys) {
    const MovingOutcome outcome = run_round(host, round, planted);
    if (!outcome.lacking.empty()) GTEST_SKIP() << outcome.lacking;
    red.add(outcome.figures);
    if (!outcome.problems.empty()) std::cout << outcome.problems[0] << "\n";
  }
  std::cout << red.unsound << " of " << red.surveys << " surveys; " << moves(red) << std::endl;
  if (red.unsound == 0) {
    for (const Mover mover : round.movers)
      if (red.moved[static_cast<unsigned>(mover)] == 0) GTEST_SKIP() << "nothing here is " << to_string(mover);
    if (!host.is_lab()) GTEST_SKIP() << "not found in " << red.surveys << " surveys: only the lab's kernels are known";
  }
  EXPECT_GT(red.unsound, 0U);
  const MovingOutcome green = run_round(host, round);
  EXPECT_EQ(green.figures.unsound, 0U);
  EXPECT_GT(green.figures.checked_pages, 0U);
}

class MovingOracle : public testing::Test {
protected:
  const MovingHost host;
};

TEST_F(MovingOracle, FindsASurveyThatReadsHugePagesWithoutTheirLock) {
  expect_that_it_is_found(
      host, {.memory = MovingMemory::hugetlb, .movers = {host.has_two_nodes() ? Mover::nodes : Mover::copy_on_write}},
      without_lock, 400'000);
}

TEST_F(MovingOracle, FindsASurveyThatCountsMarkersAsHugePages) {
  if (!test::machine_facts().pagemap_scan)
    GTEST_SKIP() << "this kernel has no PAGEMAP_SCAN, and mincore sees no markers";
  expect_that_it_is_found(host,
                          {.memory = MovingMemory::hugetlb_memfd,
                           .movers = {Mover::other_process, Mover::write_protection, Mover::poison_markers}},
                          by_number_of_entries, 20'000);
}

TEST_F(MovingOracle, FindsASurveyThatAsksTheWrongPageCache) {
  if (!test::machine_facts().cachestat) GTEST_SKIP() << "this kernel has no cachestat";
  if (!host.has_two_nodes()) GTEST_SKIP() << "this machine has one NUMA node: ./dev lab --numa 2 has two";
  expect_that_it_is_found(host, {.memory = MovingMemory::shared_overlay_file, .movers = {Mover::nodes}},
                          by_own_page_cache, 20'000);
}

} // namespace
