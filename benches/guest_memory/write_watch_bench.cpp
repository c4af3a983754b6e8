#include "support/beside.hpp"
#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <string>
#include <sys/mman.h>
import cppvmm.guest_memory;

// What a write watch costs: arming it, a survey under it, and the first write to each page.

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

constexpr std::uint64_t mib = 1 << 20;

Region populated(std::uint64_t bytes, bool huge) {
  Region region = value_or_throw(Region::anonymous(GuestAddress(0), bytes));
  madvise(region.host_address(), bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  for (std::uint64_t at = 0; at < bytes; at += page_size)
    static_cast<volatile std::byte*>(region.host_address())[at] = std::byte{};
  return region;
}

void store_to_each_page(const Region& region) {
  for (std::uint64_t at = 0; at < region.bytes(); at += page_size)
    static_cast<volatile std::byte*>(region.host_address())[at] = std::byte{1};
}

std::uint64_t watched_bytes() { return unless_brief(256 * mib, 8 * mib); }
constexpr WriteWatchOptions fresh{.baseline = Baseline::promise};

/// Stores to populated memory: the first to each page under a watch, or none.
void first_stores(benchmark::State& state) {
  const Region region = populated(watched_bytes(), state.range(0) != 0);
  GuestMemory memory(value_or_throw(MemoryMap::make({region})));
  for (auto _ : state) {
    if (state.range(1) != 0) {
      state.PauseTiming();
      memory.disarm_write_watch(GuestAddress(0));
      if (const auto armed = memory.arm_write_watch(GuestAddress(0), fresh); !armed) {
        state.SkipWithError(armed.error().message().c_str());
        break;
      }
      state.ResumeTiming();
    }
    store_to_each_page(region);
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(region.pages().count()));
}
BENCHMARK(first_stores)->ArgNames({"huge", "watched"})->ArgsProduct({{0, 1}, {0, 1}})->Unit(benchmark::kMillisecond);

void arming(benchmark::State& state) {
  const Region region = populated(watched_bytes(), state.range(0) != 0);
  GuestMemory memory(value_or_throw(MemoryMap::make({region})));
  for (auto _ : state) {
    if (const auto armed = memory.arm_write_watch(GuestAddress(0), fresh); !armed) {
      state.SkipWithError(armed.error().message().c_str());
      break;
    }
    memory.disarm_write_watch(GuestAddress(0));
  }
}
BENCHMARK(arming)->ArgName("huge")->Arg(0)->Arg(1)->Unit(benchmark::kMillisecond);

/// Of populated memory, every 16th page of which was written.
void watched_survey(benchmark::State& state) {
  const Region region = populated(watched_bytes(), state.range(0) != 0);
  GuestMemory memory(value_or_throw(MemoryMap::make({region})));
  if (const auto armed = memory.arm_write_watch(GuestAddress(0), fresh); !armed) {
    state.SkipWithError(armed.error().message().c_str());
    return;
  }
  for (std::uint64_t at = 0; at < region.bytes(); at += 16 * page_size)
    static_cast<volatile std::byte*>(region.host_address())[at] = std::byte{1};
  std::uint64_t zeroed = 0;
  for (auto _ : state)
    zeroed = memory.survey().zeroed().page_count();
  state.counters["zeroed_pages"] = static_cast<double>(zeroed);
}
BENCHMARK(watched_survey)->ArgName("huge")->Arg(0)->Arg(1)->Unit(benchmark::kMillisecond);

} // namespace
