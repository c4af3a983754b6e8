module;
#include <algorithm>
#include <chrono>
#include <mutex>
module cppvmm.hv_calls:rate_limit;

namespace cppvmm {

/// So much time in each period, from whoever takes it. What is taken is known afterwards, and may be more than there
/// was: it is missing then. Safe to use from any thread.
class TimeBudget {
public:
  using Clock = std::chrono::steady_clock;

  /// `period` is not 0.
  TimeBudget(std::chrono::nanoseconds time, std::chrono::nanoseconds period)
      : time_(time), period_(period), left_(time) {}

  [[nodiscard]] bool is_used_up(Clock::time_point now) {
    const std::lock_guard lock(mutex_);
    // In floating point, for no product of times fits into 64 bits.
    const double share = std::chrono::duration<double>(now - filled_) / std::chrono::duration<double>(period_);
    left_ = std::min(left_ + share * std::chrono::duration<double, std::nano>(time_), Left(time_));
    filled_ = now;
    return left_ <= Left::zero();
  }

  void take(std::chrono::nanoseconds time) {
    const std::lock_guard lock(mutex_);
    left_ -= time;
  }

private:
  using Left = std::chrono::duration<double, std::nano>;
  std::chrono::nanoseconds time_;
  std::chrono::nanoseconds period_;
  std::mutex mutex_;
  Left left_;
  Clock::time_point filled_ = Clock::now();
};

} // namespace cppvmm
