#include "support/at_once.hpp"
#include "support/beside.hpp"
#include "support/peer.hpp"
#include <benchmark/benchmark.h>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>
import cppvmm.guest_memory;

// Pages that are marked by hand, one at a time, in a guest of 16 GiB.

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

constexpr std::uint64_t bytes = std::uint64_t{16} << 30;
constexpr std::uint64_t pages = bytes / page_size;

using Pages = std::vector<std::uint64_t>;

Pages dense() {
  Pages all(unless_brief(200'000, 1'000));
  for (std::uint64_t i = 0; i < all.size(); ++i)
    all[i] = i;
  return all;
}

// Fewer than the ranges of marks that are kept.
Pages at_random(unsigned seed) {
  std::mt19937_64 random(seed);
  Pages all(unless_brief(20'000, 200));
  for (std::uint64_t& page : all)
    page = random() % pages;
  return all;
}

std::vector<PageRange> ranges_of(const Pages& which) {
  std::vector<PageRange> ranges;
  for (const std::uint64_t page : which)
    ranges.push_back(value_or_throw(PageRange::make(PageNumber(page), 1)));
  return ranges;
}

void mark(GuestMemory& memory, const std::vector<PageRange>& which) {
  for (const PageRange& page : which)
    memory.mark_touched(page, Toucher::device);
}

/// A list of pages for each thread.
void marks_beside_bitmap(Measurement& measurement, const std::vector<Pages>& of_threads) {
  auto region = Region::anonymous(GuestAddress(0), bytes);
  if (!region) return measurement.skip(region.error().message());
  GuestMemory memory(value_or_throw(MemoryMap::make({*region})));
  const PageRange all = region->pages();
  std::vector<std::vector<PageRange>> ranges;
  for (const Pages& which : of_threads)
    ranges.push_back(ranges_of(which));
  const auto ours = [&] {
    // Those of the round before.
    memory.clear_marks(all);
    return at_once(of_threads.size(), [&](std::size_t i) { mark(memory, ranges[i]); });
  };
  ours();
  const PageSet marked = memory.marks().pages();
  for (const Pages& which : of_threads)
    for (const std::uint64_t page : which)
      if (!marked.contains(PageNumber(page)))
        return measurement.fail("page " + std::to_string(page) + " is not marked");

  const Peer peer = make_peer(page_size, pages);
  if (!peer) return measurement.skip(no_peer);
  const auto floor = [&] {
    return at_once(of_threads.size(),
                   [&](std::size_t i) { vm_memory_peer_mark(peer.get(), of_threads[i].data(), of_threads[i].size()); });
  };
  floor();
  for (const Pages& which : of_threads)
    if (vm_memory_peer_marked(peer.get(), which.data(), which.size()) != which.size())
      return measurement.fail("vm-memory has not marked the pages");
  measurement.run(ours, floor, of_threads[0].size());
}

constexpr const char* bitmap = "AtomicBitmap";
const Beside one_after_the_other({"marks/dense", 0.8, bitmap},
                                 [](Measurement& measurement) { marks_beside_bitmap(measurement, {dense()}); });
const Beside random_pages({"marks/random", 0.8, bitmap},
                          [](Measurement& measurement) { marks_beside_bitmap(measurement, {at_random(1)}); });
const Beside by_two({"marks/random_by_2_threads", 0.8, bitmap},
                    [](Measurement& measurement) { marks_beside_bitmap(measurement, {at_random(1), at_random(2)}); });

} // namespace
