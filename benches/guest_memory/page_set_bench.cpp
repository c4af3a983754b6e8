#include "support/beside.hpp"
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>
import cppvmm.guest_memory;

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

/// What a sorted vector of ranges, without more around it, is made of.
struct Run {
  std::uint64_t first = 0;
  std::uint64_t count = 0;
};

std::uint64_t extents() { return unless_brief(200'000, 2'000); }

/// Of 1 to 3 pages, 4 pages apart.
std::vector<Run> ascending_runs(std::uint64_t count) {
  std::vector<Run> runs;
  for (std::uint64_t i = 0; i < count; ++i)
    runs.push_back({i * 4, 1 + i % 3});
  return runs;
}

std::vector<Run> shuffled(std::vector<Run> runs) {
  std::ranges::shuffle(runs, std::mt19937_64(1));
  return runs;
}

std::vector<PageRange> ranges_of(const std::vector<Run>& runs) {
  std::vector<PageRange> ranges;
  for (const Run& run : runs)
    ranges.push_back(value_or_throw(PageRange::make(PageNumber(run.first), run.count)));
  return ranges;
}

void append(std::vector<Run>& runs, Run run) {
  if (!runs.empty() && runs.back().first + runs.back().count >= run.first)
    runs.back().count = std::max(runs.back().count, run.first + run.count - runs.back().first);
  else
    runs.push_back(run);
}

PageSet added_one_by_one(const std::vector<PageRange>& ranges) {
  PageSet set;
  for (const PageRange& range : ranges)
    set.add(range);
  return set;
}

std::vector<Run> joined(const std::vector<Run>& runs) {
  std::vector<Run> joined;
  for (const Run& run : runs)
    append(joined, run);
  return joined;
}

const Beside ascending({"page_set/200000_extents_ascending", 1.5, "a sorted vector"}, [](Measurement& measurement) {
  const auto runs = ascending_runs(extents());
  const auto ranges = ranges_of(runs);
  if (added_one_by_one(ranges).range_count() != runs.size()) return measurement.fail("ranges are missing");
  measurement.run([&] { benchmark::DoNotOptimize(added_one_by_one(ranges)); },
                  [&] { benchmark::DoNotOptimize(joined(runs)); });
});

const Beside in_random_order({"page_set/200000_extents_in_random_order", 1.5, "a vector that is sorted"},
                             [](Measurement& measurement) {
                               const auto runs = shuffled(ascending_runs(extents()));
                               const auto ranges = ranges_of(runs);
                               if (PageSet::of(ranges).range_count() != runs.size())
                                 return measurement.fail("ranges are missing");
                               measurement.run([&] { benchmark::DoNotOptimize(PageSet::of(ranges)); },
                                               [&] {
                                                 auto sorted = runs;
                                                 std::ranges::sort(sorted, {}, &Run::first);
                                                 benchmark::DoNotOptimize(joined(sorted));
                                               });
                             });

template <class Make>
void measure_held(Measurement& measurement, Make make) {
  begin_heap_use();
  const PageSet set = make();
  const HeapUse use = end_heap_use();
  measurement.amount(static_cast<double>(use.held) / static_cast<double>(set.range_count()));
}
const Beside held_ascending({"page_set/heap_ascending", 24, "bytes an extent"}, [](Measurement& measurement) {
  const auto ranges = ranges_of(ascending_runs(extents()));
  measure_held(measurement, [&] { return added_one_by_one(ranges); });
});
const Beside held_random({"page_set/heap_in_random_order", 24, "bytes an extent"}, [](Measurement& measurement) {
  const auto ranges = ranges_of(shuffled(ascending_runs(extents())));
  measure_held(measurement, [&] { return PageSet::of(ranges); });
});

/// Ranges of many lengths, so that the heap has work to do.
std::vector<Run> runs_of_many_lengths(std::uint64_t count) {
  std::mt19937_64 random(1);
  std::vector<Run> runs;
  for (std::uint64_t i = 0; i < count; ++i)
    runs.push_back({i * 4096, 1 + random() % 4000});
  return runs;
}

PageSet set_of(const std::vector<Run>& runs) { return PageSet::of(ranges_of(runs)); }

/// The largest first, of equals the lowest: a heap of as many as are wanted, the least of them on top.
std::vector<Run> largest_of(const std::vector<Run>& runs, std::size_t count) {
  const auto is_before = [](const Run& left, const Run& right) {
    return left.count != right.count ? left.count > right.count : left.first < right.first;
  };
  std::vector<Run> heap(runs.begin(), runs.begin() + static_cast<std::ptrdiff_t>(std::min(count, runs.size())));
  std::ranges::make_heap(heap, is_before);
  for (std::size_t i = heap.size(); i < runs.size(); ++i) {
    if (!is_before(runs[i], heap.front())) continue;
    std::ranges::pop_heap(heap, is_before);
    heap.back() = runs[i];
    std::ranges::push_heap(heap, is_before);
  }
  std::ranges::sort_heap(heap, is_before);
  return heap;
}

const Beside largest_255({"page_set/255_largest_of_1000000", 1.2, "a heap over a vector"},
                         [](Measurement& measurement) {
                           const auto runs = runs_of_many_lengths(unless_brief(1'000'000, 5'000));
                           const PageSet set = set_of(runs);
                           const auto is_same = [](const PageRange& range, const Run& run) {
                             return range.first().value() == run.first && range.count() == run.count;
                           };
                           if (!std::ranges::equal(set.largest(255), largest_of(runs, 255), is_same))
                             return measurement.fail("these are not the largest");
                           measurement.run([&] { benchmark::DoNotOptimize(set.largest(255)); },
                                           [&] { benchmark::DoNotOptimize(largest_of(runs, 255)); });
                         });

const Beside largest_heap({"page_set/heap_of_255_largest", 16'384, "bytes"}, [](Measurement& measurement) {
  const PageSet set = set_of(runs_of_many_lengths(unless_brief(1'000'000, 5'000)));
  begin_heap_use();
  benchmark::DoNotOptimize(set.largest(255));
  measurement.amount(static_cast<double>(end_heap_use().peak));
});

void subtract(benchmark::State& state) {
  const PageSet touched = set_of(ascending_runs(static_cast<std::uint64_t>(state.range(0))));
  for (auto _ : state) {
    PageSet zeroed(value_or_throw(PageRange::make(PageNumber(0), static_cast<std::uint64_t>(state.range(0)) * 4)));
    zeroed.remove(touched);
    benchmark::DoNotOptimize(zeroed);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(subtract)->Arg(1000)->Arg(200'000)->Unit(benchmark::kMicrosecond);

} // namespace
