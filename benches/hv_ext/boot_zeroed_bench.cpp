#include <benchmark/benchmark.h>
#include <cstdint>
#include <random>
#include <sys/mman.h>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;

namespace {

/// One HvExtCallGetBootZeroedMemory, from registers to the answer in guest memory, for a 64 GiB guest.
void get_boot_zeroed_memory(benchmark::State& state) {
  constexpr std::uint64_t bytes = std::uint64_t{64} << 30;
  const Region region = *Region::memfd(GuestAddress(0), bytes);
  madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
  std::mt19937_64 random(1);
  for (std::int64_t i = 0; i < state.range(0); ++i)
    static_cast<volatile char*>(region.host_address())[random() % bytes] = 1;
  const GuestMemory memory(*MemoryMap::make({region}));
  auto hypercalls = *ExtendedHypercalls::create(memory);
  for (auto _ : state)
    benchmark::DoNotOptimize(hypercalls.handle({.control = 0x8002}));
}
BENCHMARK(get_boot_zeroed_memory)->Arg(100)->Arg(10'000)->Unit(benchmark::kMillisecond);

void query_capabilities(benchmark::State& state) {
  const GuestMemory memory(*MemoryMap::make({*Region::memfd(GuestAddress(0), 1 << 20)}));
  auto hypercalls = *ExtendedHypercalls::create(memory);
  for (auto _ : state)
    benchmark::DoNotOptimize(hypercalls.handle({.control = 0x8001}));
}
BENCHMARK(query_capabilities);

} // namespace
