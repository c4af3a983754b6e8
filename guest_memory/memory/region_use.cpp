module;
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
module cppvmm.guest_memory:region_use.impl;
import :region_use;

namespace cppvmm {

struct RegionUse::State {
  std::mutex mutex;
  std::condition_variable ended;
  bool is_over = false;
};

bool RegionUse::is_over() const {
  const std::lock_guard lock(state_->mutex);
  return state_->is_over;
}

void RegionUse::wait() const {
  std::unique_lock lock(state_->mutex);
  state_->ended.wait(lock, [this] { return state_->is_over; });
}

bool RegionUse::wait_for(std::chrono::nanoseconds time) const {
  // So long that it can be added to the time of day.
  constexpr std::chrono::hours most(24 * 365 * 100);
  time = std::min<std::chrono::nanoseconds>(time, most);
  std::unique_lock lock(state_->mutex);
  return state_->ended.wait_for(lock, time, [this] { return state_->is_over; });
}

RegionEnd::RegionEnd() : state_(std::make_shared<RegionUse::State>()) {}

RegionEnd::~RegionEnd() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_over = true;
  }
  state_->ended.notify_all();
}

} // namespace cppvmm
