#include "support/guests.hpp"
#include <benchmark/benchmark.h>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stop_token>
#include <sys/mman.h>
#include <thread>
#include <utility>
#include <vector>
import cppvmm.guest_memory;

// What it costs to read the content of touched pages. The worst case: 1 GiB that was populated, all of it zero.

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

std::uint64_t populated_bytes() { return unless_brief(gib, 16 * mib); }

/// Beside a loop that reads the same memory, by one thread too.
void look_beside_loop(Measurement& measurement, const Region& region) {
  if (const auto populated = region.populate(); !populated) return measurement.skip(populated.error().message());
  const GuestMemory memory(value_or_throw(MemoryMap::make({region})));
  const SurveyOptions options{
      .leave_out = {}, .source = EvidenceSource::automatic, .content_check = ContentCheckOptions{.parallel_tasks = 1}};
  const Survey survey = memory.survey(options);
  const auto& content = survey.regions[0].content;
  if (!content || content->error)
    return measurement.fail(content ? content->error->message() : "no content was looked at");
  if (content->zero_pages != region.pages().count()) return measurement.fail("pages are missing among the zero ones");
  measurement.run([&] { return memory.survey(options).regions[0].content->cost; },
                  [&] { benchmark::DoNotOptimize(read_all(region.host_address(), region.bytes())); });
}

constexpr const char* loop = "a loop that only reads";
const Beside of_huge_pages({"content_check/anonymous_2_MiB_pages", 1.10, loop}, [](Measurement& measurement) {
  const auto region = Region::anonymous(GuestAddress(0), populated_bytes());
  if (!region) return measurement.skip(region.error().message());
  if (const auto set = region->set_huge_pages(HugePages::preferred); !set)
    return measurement.skip(set.error().message());
  if (const auto populated = region->populate(); !populated) return measurement.skip(populated.error().message());
  if (region->huge_page_bytes().value_or(0) != region->bytes())
    return measurement.skip("the host gives no transparent huge pages here, or too few");
  look_beside_loop(measurement, *region);
});
const Beside of_memfd({"content_check/memfd_4_KiB_pages", 1.5, loop}, [](Measurement& measurement) {
  if (const auto region = small_pages(measurement, Backing::memfd, 0, populated_bytes()))
    look_beside_loop(measurement, *region);
});

class ThreadPool {
public:
  explicit ThreadPool(unsigned count) {
    for (unsigned i = 0; i < count; ++i)
      threads_.emplace_back([this](const std::stop_token& stop) {
        for (;;) {
          std::unique_lock lock(mutex_);
          if (!wake_.wait(lock, stop, [this] { return !tasks_.empty(); })) return;
          const auto task = std::move(tasks_.back());
          tasks_.pop_back();
          lock.unlock();
          task();
        }
      });
  }

  void post(std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    wake_.notify_one();
  }

private:
  std::mutex mutex_;
  std::condition_variable_any wake_;
  std::vector<std::function<void()>> tasks_;
  std::vector<std::jthread> threads_; // last, so that they end first
};

void run(benchmark::State& state, const Region& region, ZeroScan scan, unsigned threads) {
  if (!is_supported(scan)) return state.SkipWithError("this machine has no such instructions");
  const GuestMemory memory(value_or_throw(MemoryMap::make({region})));
  ThreadPool pool(threads - 1);
  ContentCheckOptions options{.scan = scan};
  if (threads > 1) {
    options.executor = [&pool](auto task) { pool.post(std::move(task)); };
    options.parallel_tasks = threads - 1;
  }
  std::uint64_t checked = 0;
  for (auto _ : state) {
    const Survey survey =
        memory.survey({.leave_out = {}, .source = EvidenceSource::automatic, .content_check = options});
    checked = survey.regions[0].content->checked_pages;
    state.SetIterationTime(std::chrono::duration<double>(survey.regions[0].content->cost).count());
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(checked * page_size) * state.iterations());
  state.SetLabel(to_string(scan));
}

void populate(const Region& region, int advice) {
  madvise(region.host_address(), region.bytes(), advice);
  for (std::uint64_t page = 0; page < region.pages().count(); ++page)
    static_cast<volatile char*>(region.host_address())[page * page_size] = 0;
}

/// Through the mapping: arguments are the instructions, the threads, and whether the memory has huge pages.
void populated_gibibyte(benchmark::State& state) {
  const Region region = value_or_throw(Region::anonymous(GuestAddress(0), populated_bytes()));
  populate(region, state.range(2) != 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  run(state, region, static_cast<ZeroScan>(state.range(0)), static_cast<unsigned>(state.range(1)));
}
BENCHMARK(populated_gibibyte)
    ->ArgNames({"scan", "threads", "huge"})
    ->ArgsProduct({{static_cast<int>(ZeroScan::portable), static_cast<int>(ZeroScan::avx2),
                    static_cast<int>(ZeroScan::avx512)},
                   {1, 2},
                   {0, 1}})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

/// Through the descriptor: pages of a memfd that are mapped nowhere in this process.
void populated_gibibyte_of_others(benchmark::State& state) {
  const Region region = value_or_throw(Region::memfd(GuestAddress(0), populated_bytes()));
  populate(region, MADV_NOHUGEPAGE);
  madvise(region.host_address(), region.bytes(), MADV_DONTNEED);
  run(state, region, ZeroScan::automatic, static_cast<unsigned>(state.range(0)));
}
BENCHMARK(populated_gibibyte_of_others)
    ->ArgName("threads")
    ->Arg(1)
    ->Arg(2)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

} // namespace
