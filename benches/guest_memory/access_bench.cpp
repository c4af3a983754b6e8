#include "support/at_once.hpp"
#include "support/beside.hpp"
#include "support/peer.hpp"
#include <array>
#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>
import cppvmm.guest_memory;

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t region_bytes = 64 * mib;

GuestMemory& memory() {
  static GuestMemory memory(
      value_or_throw(MemoryMap::make({value_or_throw(Region::anonymous(GuestAddress(0), region_bytes)),
                                      value_or_throw(Region::anonymous(GuestAddress(region_bytes), region_bytes))})));
  return memory;
}

// Values of 8 bytes, in 32 KiB of the second region, which the first cache holds.

constexpr std::uint64_t span = 32 << 10;
std::uint64_t accesses() { return unless_brief(1'000'000, span / 8); }

GuestAddress nth(std::uint64_t first, std::uint64_t i) {
  return GuestAddress(region_bytes + first + (i * 8 & (span - 1)));
}

/// Of a map that is held, or a GuestMemory, which looks for its map at each access.
template <class Memory>
std::uint64_t read_values(const Memory& of, std::uint64_t first) {
  std::uint64_t sum = 0;
  for (std::uint64_t i = 0, count = accesses(); i < count; ++i)
    sum += of.template read_value<std::uint64_t>(nth(first, i)).value_or(0);
  return sum;
}

template <class Memory>
void write_values(const Memory& of, std::uint64_t first) {
  for (std::uint64_t i = 0, count = accesses(); i < count; ++i)
    benchmark::DoNotOptimize(of.write_value(nth(first, i), i).has_value());
}

/// Whether both memories hold what was written: each value the number of the last access to it.
bool holds_values(Measurement& measurement, const vm_memory_peer* peer, std::uint64_t first) {
  const std::uint64_t values = span / 8;
  write_values(memory(), first);
  if (peer != nullptr) vm_memory_peer_write(peer, {first, span, accesses()});
  // The accesses are whole rounds and a part of one: what a round reads is the last write of each.
  std::uint64_t expected = 0;
  for (std::uint64_t value = 0; value < values; ++value)
    expected += value + (accesses() - 1 - value) / values * values;
  std::uint64_t ours = 0;
  for (std::uint64_t value = 0; value < values; ++value)
    ours += memory().read_value<std::uint64_t>(nth(first, value)).value_or(0);
  if (ours != expected) {
    measurement.fail("the values sum up to " + std::to_string(ours));
    return false;
  }
  if (peer == nullptr) {
    measurement.skip(no_peer);
    return false;
  }
  if (vm_memory_peer_read(peer, {first, span, values}) != expected) {
    measurement.fail("vm-memory's values sum up to another sum");
    return false;
  }
  return true;
}

const Beside read_held({"access/read_8_bytes", 0.8, "vm-memory"}, [](Measurement& measurement) {
  const Peer peer = make_peer(region_bytes, 0);
  if (!holds_values(measurement, peer.get(), 0)) return;
  const auto map = memory().snapshot();
  measurement.run([&] { benchmark::DoNotOptimize(read_values(*map, 0)); },
                  [&] { benchmark::DoNotOptimize(vm_memory_peer_read(peer.get(), {0, span, accesses()})); },
                  accesses());
});

const Beside write_held({"access/write_8_bytes", 0.8, "vm-memory"}, [](Measurement& measurement) {
  const Peer peer = make_peer(region_bytes, 0);
  if (!holds_values(measurement, peer.get(), 0)) return;
  const auto map = memory().snapshot();
  measurement.run([&] { write_values(*map, 0); }, [&] { vm_memory_peer_write(peer.get(), {0, span, accesses()}); },
                  accesses());
});

/// Each thread in 32 KiB of its own.
auto current_by(std::size_t threads, bool writes) {
  return [=](Measurement& measurement) {
    const Peer peer = make_peer(region_bytes, 0);
    for (std::size_t i = 0; i < threads; ++i)
      if (!holds_values(measurement, peer.get(), i * span)) return;
    const auto ours = [&](std::size_t i) {
      if (writes)
        write_values(memory(), i * span);
      else
        benchmark::DoNotOptimize(read_values(memory(), i * span));
    };
    const auto floor = [&](std::size_t i) {
      const vm_memory_peer_accesses which{i * span, span, accesses()};
      if (writes)
        vm_memory_peer_write_current(peer.get(), which);
      else
        benchmark::DoNotOptimize(vm_memory_peer_read_current(peer.get(), which));
    };
    measurement.run([&] { return at_once(threads, ours); }, [&] { return at_once(threads, floor); }, accesses());
  };
}

constexpr const char* atomic = "GuestMemoryAtomic";
const Beside read_by_1({"access/current/read_by_1_thread", 0.8, atomic}, current_by(1, false));
const Beside read_by_2({"access/current/read_by_2_threads", 0.8, atomic}, current_by(2, false));
const Beside read_by_4({"access/current/read_by_4_threads", 0.8, atomic}, current_by(4, false));
const Beside read_by_8({"access/current/read_by_8_threads", 0.8, atomic}, current_by(8, false));
const Beside write_by_1({"access/current/write_by_1_thread", 0.8, atomic}, current_by(1, true));
const Beside write_by_2({"access/current/write_by_2_threads", 0.8, atomic}, current_by(2, true));
const Beside write_by_4({"access/current/write_by_4_threads", 0.8, atomic}, current_by(4, true));
const Beside write_by_8({"access/current/write_by_8_threads", 0.8, atomic}, current_by(8, true));

// Slices of 4 KiB, one after the other in 32 KiB, from an address that is aligned or not.

constexpr std::size_t slice = 4096;
std::uint64_t slices() { return unless_brief(20'000, 16); }

auto slices_of(std::uint64_t misaligned, bool writes) {
  return [=](Measurement& measurement) {
    const auto map = memory().snapshot();
    alignas(64) static std::array<std::byte, slice> buffer;
    auto* const host = static_cast<std::byte*>(map->find(GuestAddress(region_bytes))->host_address()) + misaligned;
    const auto nth_offset = [](std::uint64_t i) { return i * slice & (span - 1); };
    const auto nth_slice = [&](std::uint64_t i) { return GuestAddress(region_bytes + misaligned + nth_offset(i)); };

    for (std::size_t i = 0; i < slice; ++i)
      buffer[i] = static_cast<std::byte>(i * 7);
    const auto before = buffer;
    if (!map->write(nth_slice(1), buffer) || std::memcmp(host + slice, buffer.data(), slice) != 0)
      return measurement.fail("the slice was not written");
    buffer = {};
    if (!map->read(nth_slice(1), buffer) || buffer != before) return measurement.fail("the slice was not read");

    const auto ours = [&] {
      for (std::uint64_t i = 0, count = slices(); i < count; ++i) {
        benchmark::DoNotOptimize(writes ? map->write(nth_slice(i), buffer).has_value()
                                        : map->read(nth_slice(i), buffer).has_value());
        benchmark::ClobberMemory();
      }
    };
    const auto floor = [&] {
      for (std::uint64_t i = 0, count = slices(); i < count; ++i) {
        if (writes)
          std::memcpy(host + nth_offset(i), buffer.data(), slice);
        else
          std::memcpy(buffer.data(), host + nth_offset(i), slice);
        benchmark::DoNotOptimize(buffer.data());
        benchmark::ClobberMemory();
      }
    };
    measurement.run(ours, floor, slices());
  };
}
const Beside read_slices({"access/read_4_KiB", 1.10, "memcpy"}, slices_of(0, false));
const Beside write_slices({"access/write_4_KiB", 1.10, "memcpy"}, slices_of(0, true));
const Beside read_misaligned({"access/read_4_KiB_misaligned", 1.10, "memcpy"}, slices_of(1, false));
const Beside write_misaligned({"access/write_4_KiB_misaligned", 1.10, "memcpy"}, slices_of(1, true));

void write_across_regions(benchmark::State& state) {
  const auto map = memory().snapshot();
  const std::vector<std::byte> data(static_cast<std::size_t>(state.range(0)), std::byte{1});
  const GuestAddress at(64 * mib - data.size() / 2);
  for (auto _ : state)
    benchmark::DoNotOptimize(map->write(at, data));
  state.SetBytesProcessed(state.iterations() * state.range(0));
}
BENCHMARK(write_across_regions)->Arg(64)->Arg(4096)->Arg(1 << 20);

/// Ways to the bytes: memory of our own, and adopted memory through the kernel or with a FaultGuard.
enum class Way { own, kernel, guarded };

class Memory {
public:
  explicit Memory(Way way)
      : host_(mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)),
        map_(value_or_throw(MemoryMap::make(
            {way == Way::own
                 ? value_or_throw(Region::anonymous(GuestAddress(0), mib))
                 : value_or_throw(Region::adopt(
                       GuestAddress(0), {.host_address = host_, .bytes = mib, .backing = Backing::anonymous}))}))) {
    if (way == Way::guarded) guard_.emplace(value_or_throw(FaultGuard::install()));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    map_ = {};
    munmap(host_, mib);
  }
  [[nodiscard]] const MemoryMap& map() const { return map_; }

private:
  void* host_;
  MemoryMap map_;
  std::optional<FaultGuard> guard_;
};

template <Way way>
void read_by(benchmark::State& state) {
  const Memory memory(way);
  std::vector<std::byte> data(static_cast<std::size_t>(state.range(0)), std::byte{1});
  static_cast<void>(memory.map().write(GuestAddress(0), data));
  for (auto _ : state)
    benchmark::DoNotOptimize(memory.map().read(GuestAddress(0), data));
  state.SetBytesProcessed(state.iterations() * state.range(0));
}
BENCHMARK(read_by<Way::own>)->Arg(8)->Arg(4096)->Arg(1 << 20);
BENCHMARK(read_by<Way::kernel>)->Arg(8)->Arg(4096)->Arg(1 << 20);
BENCHMARK(read_by<Way::guarded>)->Arg(8)->Arg(4096)->Arg(1 << 20);

template <Way way>
void write_by(benchmark::State& state) {
  const Memory memory(way);
  const std::vector<std::byte> data(static_cast<std::size_t>(state.range(0)), std::byte{1});
  for (auto _ : state)
    benchmark::DoNotOptimize(memory.map().write(GuestAddress(0), data));
  state.SetBytesProcessed(state.iterations() * state.range(0));
}
BENCHMARK(write_by<Way::own>)->Arg(8)->Arg(4096)->Arg(1 << 20);
BENCHMARK(write_by<Way::kernel>)->Arg(8)->Arg(4096)->Arg(1 << 20);
BENCHMARK(write_by<Way::guarded>)->Arg(8)->Arg(4096)->Arg(1 << 20);

} // namespace
