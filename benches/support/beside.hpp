#pragma once
#include <algorithm>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// What is measured beside its floor, or beside a peer: both in one process, in turns, and the figure is the median of
// the rounds' ratios. What slows the machine for a while slows both.

namespace cppvmm::bench {

/// --brief: everything once and small, to see that it works; the figures say nothing.
[[nodiscard]] bool brief();
[[nodiscard]] inline std::uint64_t unless_brief(std::uint64_t usual, std::uint64_t small) {
  return brief() ? small : usual;
}

/// Bytes of the heap that a call took: at most at a time, and those that it still holds.
struct HeapUse {
  std::int64_t peak = 0;
  std::int64_t held = 0;
};
void begin_heap_use();
[[nodiscard]] HeapUse end_heap_use();

/// Of at least one value.
[[nodiscard]] double median(std::vector<double> values);

/// What is measured for a row or a point of a plot: by one call of `run` or `amount`, unless it is skipped or has
/// failed.
class Measurement {
public:
  Measurement(benchmark::State& state, std::string unit) : state_(state), unit_(std::move(unit)) {}

  /// This machine has not what it takes: says so, and is no failure.
  void skip(const std::string& why);
  /// What is measured does not do what it should: the program fails.
  void fail(const std::string& why);
  /// Something to know about the figure.
  void note(const std::string& what) { unit_ += "; " + what; }

  /// Ours and the floor in turns. Each does `operations`, and may return how long they took, where there is more in it
  /// than them.
  template <class Ours, class Floor>
  void run(Ours ours, Floor floor, std::uint64_t operations = 1) {
    using Clock = std::chrono::steady_clock;
    constexpr unsigned most_rounds = 31;
    constexpr unsigned fewest_rounds = 7;
    constexpr std::chrono::seconds enough(3);
    std::vector<double> ours_took, floor_took, ratios;
    if (!brief()) {
      // The first time is another: caches, the allocator, pages of the heap.
      time(ours);
      time(floor);
    }
    const auto begin = Clock::now();
    for (unsigned round = 0; round < (brief() ? 1 : most_rounds); ++round) {
      if (round >= fewest_rounds && Clock::now() - begin > enough) break;
      double of_floor = round % 2 == 0 ? time(floor) : 0;
      const double of_ours = time(ours);
      if (round % 2 != 0) of_floor = time(floor);
      ours_took.push_back(of_ours / static_cast<double>(operations));
      floor_took.push_back(of_floor / static_cast<double>(operations));
      ratios.push_back(of_ours / of_floor);
    }
    begin_heap_use();
    time(ours);
    const HeapUse ours_use = end_heap_use();
    begin_heap_use();
    time(floor);
    const HeapUse floor_use = end_heap_use();
    report(median(ours_took), median(floor_took), median(ratios), ours_use, floor_use);
  }

  /// What the floor's result takes, where the floor keeps none: a plot shows it beside what ours takes of the heap.
  void floor_takes(std::uint64_t bytes) { floor_takes_ = static_cast<double>(bytes); }

  /// What is not a time, and has no floor but its goal.
  void amount(double value);

private:
  template <class Call>
  static double time(Call& call) {
    using Nanoseconds = std::chrono::duration<double, std::nano>;
    if constexpr (std::is_void_v<std::invoke_result_t<Call&>>) {
      const auto begin = std::chrono::steady_clock::now();
      call();
      return Nanoseconds(std::chrono::steady_clock::now() - begin).count();
    } else {
      return Nanoseconds(call()).count();
    }
  }
  void report(double ours, double floor, double ratio, HeapUse ours_use, HeapUse floor_use);

  benchmark::State& state_;
  std::string unit_;
  double floor_takes_ = 0;
};

/// A row of the table.
struct Row {
  std::string name;
  /// The figure is to be at most this.
  double goal = 0;
  /// In words, what the figure is a ratio to; or the unit of an amount.
  std::string floor;
};

/// One registers a row: name, goal, floor and how it is measured.
struct Beside {
  Beside(Row row, std::function<void(Measurement&)> measure);
};

/// One registers a line of a plot, with a point for each x.
struct Against {
  Against(std::string plot, std::vector<std::uint64_t> xs, std::string floor,
          std::function<void(Measurement&, std::uint64_t x)> measure);
};

} // namespace cppvmm::bench
