#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <vector>
import cppvmm.guest_memory;

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;

GuestMemory& memory() {
  static GuestMemory memory(*MemoryMap::make(
      {*Region::anonymous(GuestAddress(0), 64 * mib), *Region::anonymous(GuestAddress(64 * mib), 64 * mib)}));
  return memory;
}

void read_value(benchmark::State& state) {
  const auto map = memory().snapshot();
  for (auto _ : state)
    benchmark::DoNotOptimize(map->read_value<std::uint64_t>(GuestAddress(0x1000)));
}
BENCHMARK(read_value);

/// Through the holder: a snapshot for each access.
void read_value_of_current_map(benchmark::State& state) {
  for (auto _ : state)
    benchmark::DoNotOptimize(memory().read_value<std::uint64_t>(GuestAddress(0x1000)));
}
BENCHMARK(read_value_of_current_map);

void write_across_regions(benchmark::State& state) {
  const auto map = memory().snapshot();
  const std::vector<std::byte> data(static_cast<std::size_t>(state.range(0)), std::byte{1});
  const GuestAddress at(64 * mib - data.size() / 2);
  for (auto _ : state)
    benchmark::DoNotOptimize(map->write(at, data));
  state.SetBytesProcessed(state.iterations() * state.range(0));
}
BENCHMARK(write_across_regions)->Arg(64)->Arg(4096)->Arg(1 << 20);

} // namespace
