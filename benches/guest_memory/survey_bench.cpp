#include "support/guests.hpp"
#include <array>
#include <benchmark/benchmark.h>
#include <cstdint>
#include <string>
#include <vector>
import cppvmm.guest_memory;

// What a survey costs: it follows what is touched, not the size of the guest, nor what else the process has mapped.

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

constexpr const char* scan = "PAGEMAP_SCAN";
constexpr const char* seek = "SEEK_DATA, SEEK_HOLE and cachestat";

using Touch = void (*)(const Region&);

/// One region, touched so.
auto one_region(Backing backing, std::uint64_t bytes, Touch touch_all) {
  return [=](Measurement& measurement) {
    const auto region = small_pages(measurement, backing, 0, bytes);
    if (!region) return;
    touch_all(*region);
    survey_beside_bare_scan(measurement, {*region});
  };
}

void few_random_pages(const Region& region) { touch_random_pages(region, unless_brief(10'000, 100)); }
void many_random_pages(const Region& region) { touch_random_pages(region, unless_brief(200'000, 1'000)); }

const Beside in_64_gib({"survey/anonymous/128_extents_in_64_GiB", 1.10, scan},
                       one_region(Backing::anonymous, 64 * gib, touch_as_booted));
const Beside in_1_tib({"survey/anonymous/128_extents_in_1_TiB", 1.10, scan},
                      one_region(Backing::anonymous, 1024 * gib, touch_as_booted));
const Beside in_16_tib({"survey/anonymous/128_extents_in_16_TiB", 1.10, scan},
                       one_region(Backing::anonymous, 16 * 1024 * gib, touch_as_booted));
const Beside few({"survey/anonymous/10000_pages_in_64_GiB", 1.10, scan},
                 one_region(Backing::anonymous, 64 * gib, few_random_pages));
const Beside many({"survey/anonymous/200000_pages_in_64_GiB", 1.25, scan},
                  one_region(Backing::anonymous, 64 * gib, many_random_pages));
const Beside in_64_gib_of_memfd({"survey/memfd/128_extents_in_64_GiB", 1.10, seek},
                                one_region(Backing::memfd, 64 * gib, touch_as_booted));
const Beside few_of_memfd({"survey/memfd/10000_pages_in_64_GiB", 1.10, seek},
                          one_region(Backing::memfd, 64 * gib, few_random_pages));
const Beside many_of_memfd({"survey/memfd/200000_pages_in_64_GiB", 1.10, seek},
                           one_region(Backing::memfd, 64 * gib, many_random_pages));

/// Regions of 1 GiB, in each of which 16 pages are touched, in a process with so many other mappings.
void many_regions(Measurement& measurement, std::uint64_t count, std::uint64_t other_mappings) {
  const OtherMappings others(other_mappings);
  if (others.is_short()) return measurement.skip("a process may have too few mappings here");
  std::vector<Region> regions;
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto region = small_pages(measurement, Backing::anonymous, i * gib, gib);
    if (!region) return;
    touch_extents(*region, 16, page_size);
    regions.push_back(*region);
  }
  survey_beside_bare_scan(measurement, regions);
}

const Beside regions_509({"survey/509_regions", 1.30, scan},
                         [](Measurement& measurement) { many_regions(measurement, unless_brief(509, 20), 0); });
const Beside among_others({"survey/1_region_beside_10000_mappings", 2.2, scan},
                          [](Measurement& measurement) { many_regions(measurement, 1, unless_brief(10'000, 500)); });
const Beside all_among_others({"survey/32_regions_beside_10000_mappings", 2.2, scan}, [](Measurement& measurement) {
  many_regions(measurement, unless_brief(32, 4), unless_brief(10'000, 500));
});

/// A region that is all there: 8 GiB, or what half of the memory that can be had allows.
auto all_touched(Backing backing) {
  return [backing](Measurement& measurement) {
    std::uint64_t bytes = unless_brief(8 * gib, 16 * mib);
    if (const std::uint64_t most = available_memory() / 2; most < bytes) {
      bytes = most / (512 * mib) * (512 * mib);
      if (bytes == 0) return measurement.skip("not 1 GiB of memory to be had");
      measurement.note("of " + std::to_string(bytes / mib) + " MiB, for lack of memory");
    }
    const auto region = small_pages(measurement, backing, 0, bytes);
    if (!region) return;
    if (const auto populated = region->populate(); !populated) return measurement.skip(populated.error().message());
    survey_beside_bare_scan(measurement, {*region});
  };
}
const Beside all_of_anonymous({"survey/8_GiB_all_touched/anonymous", 1.10, scan}, all_touched(Backing::anonymous));
const Beside all_of_memfd({"survey/8_GiB_all_touched/memfd", 1.10, seek}, all_touched(Backing::memfd));

/// Of memory that nothing has touched, as many pages are marked by hand as the kernel is asked about beside it.
const Beside marked({"survey/200000_marks_in_64_GiB", 1.25, "PAGEMAP_SCAN of as many pages"},
                    [](Measurement& measurement) {
                      const auto marked_one = small_pages(measurement, Backing::anonymous, 0, 64 * gib);
                      if (!marked_one) return;
                      const auto touched_one = small_pages(measurement, Backing::anonymous, 0, 64 * gib);
                      if (!touched_one) return;
                      many_random_pages(*touched_one);
                      const GuestMemory touched(value_or_throw(MemoryMap::make({*touched_one})));
                      const PageSet pages = touched.survey().touched;
                      GuestMemory memory(value_or_throw(MemoryMap::make({*marked_one})));
                      for (const PageRange& range : pages.ranges())
                        memory.mark_touched(range, Toucher::device);
                      if (memory.survey().touched != pages) return measurement.fail("the survey's marks are others");
                      const BareScan bare({*touched_one});
                      const auto there = bare.pages();
                      if (!there) return measurement.skip(no_bare_scan);
                      if (*there != pages.page_count()) return measurement.fail("the system calls find other pages");
                      measurement.run([&] { benchmark::DoNotOptimize(memory.survey()); },
                                      [&] { benchmark::DoNotOptimize(bare.pages()); });
                    });

/// The most heap that a survey takes, for each extent.
void heap_an_extent(Measurement& measurement, const GuestMemory& memory) {
  const std::size_t extents = memory.survey().touched.range_count();
  begin_heap_use();
  static_cast<void>(memory.survey());
  measurement.amount(static_cast<double>(end_heap_use().peak) / static_cast<double>(extents));
}

const Beside heap({"survey/heap_of_200000_pages", 24, "bytes an extent"}, [](Measurement& measurement) {
  const auto region = small_pages(measurement, Backing::anonymous, 0, 64 * gib);
  if (!region) return;
  many_random_pages(*region);
  auto map = MemoryMap::make({*region});
  if (!map) return measurement.fail(map.error().message());
  heap_an_extent(measurement, GuestMemory(*std::move(map)));
});
const Beside heap_of_marks({"survey/heap_of_200000_marks", 24, "bytes an extent"}, [](Measurement& measurement) {
  const auto region = small_pages(measurement, Backing::anonymous, 0, 64 * gib);
  if (!region) return;
  many_random_pages(*region);
  GuestMemory memory(value_or_throw(MemoryMap::make({*region})));
  const PageSet pages = memory.survey().touched;
  if (!region->discard(region->pages())) return measurement.fail("the pages are not discarded");
  for (const PageRange& range : pages.ranges())
    memory.mark_touched(range, Toucher::device);
  if (memory.survey().touched != pages) return measurement.fail("the survey's marks are others");
  heap_an_extent(measurement, memory);
});

// The plots.

const Against ram("RAM", {1, 4, 16, 64, 256, 1024, 4096, 16384}, scan, [](Measurement& measurement, std::uint64_t x) {
  one_region(Backing::anonymous, x * gib,
             [](const Region& region) { touch_extents(region, 128, unless_brief(mib, 16 * kib)); })(measurement);
});

void extents(Measurement& measurement, Backing backing, std::uint64_t x) {
  if (available_memory() / 2 < x * page_size) return measurement.skip("too little memory to be had");
  const auto region = small_pages(measurement, backing, 0, 64 * gib);
  if (!region) return;
  touch_extents(*region, brief() ? x % 1000 + 1 : x, page_size);
  survey_beside_bare_scan(measurement, {*region});
}
const Against touched_extents("touched_extents", {1, 10, 100, 1'000, 10'000, 100'000, 300'000, 1'000'000}, scan,
                              [](Measurement& measurement, std::uint64_t x) {
                                extents(measurement, Backing::anonymous, x);
                              });
const Against touched_extents_of_memfd("touched_extents_of_memfd",
                                       {1, 10, 100, 1'000, 10'000, 100'000, 300'000, 1'000'000}, seek,
                                       [](Measurement& measurement, std::uint64_t x) {
                                         extents(measurement, Backing::memfd, x);
                                       });

const Against regions("regions", {1, 2, 4, 8, 16, 32, 64, 128, 256, 509}, scan,
                      [](Measurement& measurement, std::uint64_t x) {
                        many_regions(measurement, brief() ? x % 16 + 1 : x, 0);
                      });

const Against other_mappings("other_mappings", {0, 1'000, 5'000, 10'000, 20'000, 30'000, 40'000, 50'000}, scan,
                             [](Measurement& measurement, std::uint64_t x) {
                               many_regions(measurement, 1, brief() ? x / 100 : x);
                             });

// The evidence of kernels before 6.5 and 6.7, which costs more.

void run_legacy(benchmark::State& state, const Region& region) {
  const GuestMemory memory(value_or_throw(MemoryMap::make({region})));
  std::uint64_t touched = 0;
  for (auto _ : state) {
    const Survey survey = memory.survey({.leave_out = {}, .source = EvidenceSource::legacy});
    touched = survey.touched.page_count();
    benchmark::DoNotOptimize(survey.largest_zeroed(255));
  }
  state.counters["touched_pages"] = static_cast<double>(touched);
}

/// Extents of 4 MiB, evenly spread over 1 TiB: a guest that has booted.
void legacy_extents_in_a_tebibyte(benchmark::State& state) {
  Measurement measurement(state, "");
  const auto region = small_pages(measurement, Backing::memfd, 0, 1024 * gib);
  if (!region) return;
  touch_as_booted(*region);
  run_legacy(state, *region);
}
BENCHMARK(legacy_extents_in_a_tebibyte)->Unit(benchmark::kMillisecond);

/// Single pages at random in 64 GiB.
void legacy_pages_in_64_gib(benchmark::State& state) {
  Measurement measurement(state, "");
  const auto region = small_pages(measurement, state.range(0) != 0 ? Backing::memfd : Backing::anonymous, 0, 64 * gib);
  if (!region) return;
  touch_random_pages(*region, unless_brief(static_cast<std::uint64_t>(state.range(1)), 1'000));
  run_legacy(state, *region);
}
BENCHMARK(legacy_pages_in_64_gib)
    ->ArgNames({"memfd", "pages"})
    ->ArgsProduct({{0, 1}, {10'000, 200'000}})
    ->Unit(benchmark::kMillisecond);

} // namespace
