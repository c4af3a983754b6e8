#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <sys/mman.h>
#include <utility>
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

/// Ways to the bytes: memory of our own, and adopted memory through the kernel or with a FaultGuard.
enum class Way { own, kernel, guarded };

class Memory {
public:
  explicit Memory(Way way)
      : host_(mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)),
        map_(*MemoryMap::make(
            {way == Way::own ? *Region::anonymous(GuestAddress(0), mib)
                             : *Region::adopt(GuestAddress(0),
                                              {.host_address = host_, .bytes = mib, .backing = Backing::anonymous})})) {
    if (way == Way::guarded) guard_.emplace(*FaultGuard::install());
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
