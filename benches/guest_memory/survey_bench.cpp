#include <benchmark/benchmark.h>
#include <cstdint>
#include <random>
#include <sys/mman.h>
import cppvmm.guest_memory;

// What a survey costs: it follows what is touched, not the size of the guest.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t gib = 1 << 30;

Region make(bool is_memfd, std::uint64_t bytes) {
  Region region = is_memfd ? *Region::memfd(GuestAddress(0), bytes) : *Region::anonymous(GuestAddress(0), bytes);
  madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
  return region;
}

void touch(const Region& region, std::uint64_t page) {
  static_cast<volatile char*>(region.host_address())[page * page_size] = 1;
}

void run(benchmark::State& state, const Region& region, EvidenceSource source) {
  const GuestMemory memory(*MemoryMap::make({region}));
  std::uint64_t touched = 0;
  for (auto _ : state) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    touched = survey.touched.page_count();
    benchmark::DoNotOptimize(survey.zeroed.largest(255));
  }
  state.counters["touched_pages"] = static_cast<double>(touched);
}

/// Extents of 4 MiB, evenly spread over 1 TiB: a guest that has booted.
void extents_in_a_tebibyte(benchmark::State& state) {
  const Region region = make(state.range(0) != 0, 1024 * gib);
  const auto extents = static_cast<std::uint64_t>(state.range(2));
  for (std::uint64_t i = 0; i < extents; ++i)
    for (std::uint64_t page = 0; page < 4 * mib / page_size; ++page)
      touch(region, i * (1024 * gib / page_size / extents) + page);
  run(state, region, state.range(1) != 0 ? EvidenceSource::legacy : EvidenceSource::automatic);
}
BENCHMARK(extents_in_a_tebibyte)
    ->ArgNames({"memfd", "legacy", "extents"})
    ->Args({0, 0, 128})
    ->Args({1, 0, 128})
    ->Args({1, 1, 128})
    ->Unit(benchmark::kMillisecond);

/// Single pages at random in 64 GiB.
void pages_in_64_gib(benchmark::State& state) {
  const Region region = make(state.range(0) != 0, 64 * gib);
  std::mt19937_64 random(1);
  for (std::int64_t i = 0; i < state.range(2); ++i)
    touch(region, random() % (64 * gib / page_size));
  run(state, region, state.range(1) != 0 ? EvidenceSource::legacy : EvidenceSource::automatic);
}
BENCHMARK(pages_in_64_gib)
    ->ArgNames({"memfd", "legacy", "pages"})
    ->ArgsProduct({{0, 1}, {0, 1}, {10'000, 200'000}})
    ->Unit(benchmark::kMillisecond);

} // namespace
