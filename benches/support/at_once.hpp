#pragma once
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <thread>
#include <vector>

namespace cppvmm::bench {

/// `call(i)` on so many threads, which begin together: from the first one's begin to the last one's end.
template <class Call>
std::chrono::nanoseconds at_once(std::size_t count, Call call) {
  using Clock = std::chrono::steady_clock;
  std::barrier begin(static_cast<std::ptrdiff_t>(count));
  std::vector<Clock::time_point> begins(count), ends(count);
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 0; i < count; ++i)
      threads.emplace_back([&, i] {
        begin.arrive_and_wait();
        begins[i] = Clock::now();
        call(i);
        ends[i] = Clock::now();
      });
  }
  return *std::ranges::max_element(ends) - *std::ranges::min_element(begins);
}

} // namespace cppvmm::bench
