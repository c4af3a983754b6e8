#include "support/guests.hpp"
#include <benchmark/benchmark.h>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

constexpr HvCall get_boot_zeroed_memory{.control = 0x8002};

/// A guest of 64 GiB that has booted, and asks: from registers to the answer in guest memory.
class AskingGuest {
public:
  explicit AskingGuest(const Region& region)
      : memory_(value_or_throw(MemoryMap::make({region}))),
        hypercalls_(value_or_throw(ExtendedHypercalls::create(memory_))), bare_({region}) {}

  /// Whether it can be measured.
  [[nodiscard]] bool answers(Measurement& measurement) {
    if (hypercalls_.handle(get_boot_zeroed_memory) != 0) {
      measurement.fail("the call was not answered with success");
      return false;
    }
    if (memory_.read_value<std::uint64_t>(GuestAddress(0)).value_or(0) == 0) {
      measurement.fail("the answer names no range");
      return false;
    }
    if (!bare_.pages()) {
      measurement.skip(no_bare_scan);
      return false;
    }
    return true;
  }
  void ask() { benchmark::DoNotOptimize(hypercalls_.handle(get_boot_zeroed_memory)); }
  void scan() const { benchmark::DoNotOptimize(bare_.pages()); }

private:
  GuestMemory memory_;
  ExtendedHypercalls hypercalls_;
  BareScan bare_;
};

auto whole_answer(Backing backing) {
  return [backing](Measurement& measurement) {
    const auto region = small_pages(measurement, backing, 0, 64 * gib);
    if (!region) return;
    touch_as_booted(*region);
    AskingGuest guest(*region);
    if (!guest.answers(measurement)) return;
    measurement.run([&] { guest.ask(); }, [&] { guest.scan(); });
  };
}
const Beside of_anonymous({"answer/anonymous", 1.15, "PAGEMAP_SCAN"}, whole_answer(Backing::anonymous));
const Beside of_memfd({"answer/memfd", 1.15, "SEEK_DATA, SEEK_HOLE and cachestat"}, whole_answer(Backing::memfd));

void on_threads(std::uint64_t count, const std::function<void()>& call) {
  std::vector<std::jthread> threads;
  threads.reserve(count);
  for (std::uint64_t i = 0; i < count; ++i)
    threads.emplace_back(call);
}

const Against
    vcpus("vCPUs", {1, 2, 3, 4, 6, 8}, "as many PAGEMAP_SCANs at once", [](Measurement& measurement, std::uint64_t x) {
      const auto region = small_pages(measurement, Backing::anonymous, 0, 64 * gib);
      if (!region) return;
      touch_as_booted(*region);
      AskingGuest guest(*region);
      if (!guest.answers(measurement)) return;
      // The extents of a guest that has booted, of the two surveys that there are at once.
      measurement.floor_takes(std::uint64_t{2} * 16 * 128);
      measurement.run([&] { on_threads(x, [&] { guest.ask(); }); }, [&] { on_threads(x, [&] { guest.scan(); }); });
    });

void query_capabilities(benchmark::State& state) {
  const GuestMemory memory(value_or_throw(MemoryMap::make({value_or_throw(Region::memfd(GuestAddress(0), 1 << 20))})));
  auto hypercalls = value_or_throw(ExtendedHypercalls::create(memory));
  for (auto _ : state)
    benchmark::DoNotOptimize(hypercalls.handle({.control = 0x8001}));
}
BENCHMARK(query_capabilities);

} // namespace
