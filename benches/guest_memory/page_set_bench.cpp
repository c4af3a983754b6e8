#include <benchmark/benchmark.h>
#include <cstdint>
import cppvmm.guest_memory;

using namespace cppvmm;

namespace {

PageSet every_fourth(std::int64_t ranges, std::uint64_t start) {
  PageSet set;
  for (std::int64_t i = 0; i < ranges; ++i)
    set.add(*PageRange::make(PageNumber(start + static_cast<std::uint64_t>(i) * 4), 1));
  return set;
}

void add_ascending(benchmark::State& state) {
  for (auto _ : state)
    benchmark::DoNotOptimize(every_fourth(state.range(0), 0));
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(add_ascending)->Arg(1000)->Arg(200'000)->Unit(benchmark::kMicrosecond);

void subtract(benchmark::State& state) {
  const PageSet touched = every_fourth(state.range(0), 0);
  for (auto _ : state) {
    PageSet zeroed(*PageRange::make(PageNumber(0), static_cast<std::uint64_t>(state.range(0)) * 4));
    zeroed.remove(touched);
    benchmark::DoNotOptimize(zeroed);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(subtract)->Arg(1000)->Arg(200'000)->Unit(benchmark::kMicrosecond);

void largest(benchmark::State& state) {
  const PageSet set = every_fourth(state.range(0), 0);
  for (auto _ : state)
    benchmark::DoNotOptimize(set.largest(255));
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(largest)->Arg(1000)->Arg(200'000)->Unit(benchmark::kMicrosecond);

} // namespace
