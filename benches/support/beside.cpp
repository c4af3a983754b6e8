#include "beside.hpp"
#include <malloc.h>
import cppvmm.guest_memory;

namespace cppvmm::bench {

namespace {

struct Registered {
  std::string name;
  double goal;
  double x;
  std::string unit;
  std::function<void(Measurement&)> measure;
};

// Registered before main, which knows only then how they are to be run.
std::vector<Registered>& all_registered() {
  static std::vector<Registered> all;
  return all;
}

bool is_brief = false;
bool has_failed = false;

void register_all() {
  for (const Registered& each : all_registered())
    benchmark::RegisterBenchmark(each.name.c_str(),
                                 [&each](benchmark::State& state) {
                                   // One iteration of the framework's is all rounds.
                                   for (auto _ : state) {
                                     Measurement measurement(state, each.unit);
                                     each.measure(measurement);
                                   }
                                   if (each.goal > 0) state.counters["goal"] = each.goal;
                                   if (each.x >= 0) state.counters["x"] = each.x;
                                 })
        ->Iterations(1)
        ->UseManualTime();
}

} // namespace

bool brief() { return is_brief; }

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const std::size_t half = values.size() / 2;
  return values.size() % 2 != 0 ? values[half] : (values[half - 1] + values[half]) / 2;
}

void Measurement::skip(const std::string& why) { state_.SkipWithError(("skipped: " + why).c_str()); }

void Measurement::fail(const std::string& why) {
  has_failed = true;
  state_.SkipWithError(("failed: " + why).c_str());
}

void Measurement::report(double ours, double floor, double ratio, HeapUse ours_use, HeapUse floor_use) {
  state_.SetIterationTime(ours / 1e9);
  state_.counters["ours"] = ours;
  state_.counters["floor"] = floor;
  state_.counters["value"] = ratio;
  state_.counters["ours_bytes"] = static_cast<double>(ours_use.peak);
  state_.counters["floor_bytes"] = floor_takes_ > 0 ? floor_takes_ : static_cast<double>(floor_use.peak);
  state_.SetLabel(unit_);
}

void Measurement::amount(double value) {
  state_.SetIterationTime(0);
  state_.counters["value"] = value;
  state_.SetLabel(unit_);
}

Beside::Beside(Row row, std::function<void(Measurement&)> measure) {
  all_registered().push_back({"beside/" + row.name, row.goal, -1, std::move(row.floor), std::move(measure)});
}

Against::Against(std::string plot, std::vector<std::uint64_t> xs, std::string floor,
                 std::function<void(Measurement&, std::uint64_t x)> measure) {
  for (const std::uint64_t x : xs)
    all_registered().push_back({"against/" + plot + "/" + std::to_string(x), 0, static_cast<double>(x), floor,
                                [measure, x](Measurement& measurement) { measure(measurement, x); }});
}

} // namespace cppvmm::bench

int main(int argc, char** argv) {
  using namespace cppvmm::bench;
  std::vector<char*> arguments;
  char least_time[] = "--benchmark_min_time=0.001";
  for (int i = 0; i < argc; ++i)
    if (std::string(argv[i]) == "--brief")
      is_brief = true;
    else
      arguments.push_back(argv[i]);
  if (is_brief) arguments.push_back(least_time);
  int count = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  // The heap keeps what it was given back: else a round would pay for fresh pages, or not, by chance.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  // Kept as the floors keep theirs; without it, each survey opens and closes its own.
  const auto books = cppvmm::KernelBooks::open();
  register_all();
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return has_failed ? 1 : 0;
}
