// Something costly that several threads ask for at once, without what it is: tests have their own.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <utility>

namespace cppvmm {

/// Lets so many runs be in progress at once. Who asks for one while there are as many waits for the next, and shares it
/// with all who wait for one of the same key: it begins after each of them has asked. Safe to use from any thread.
template <class Key, class Result>
class SharedRuns {
public:
  using Clock = std::chrono::steady_clock;

  struct Given {
    Result result;
    bool may_be_shared = true;
  };

  explicit SharedRuns(std::size_t most) : most_(most) {}
  SharedRuns(const SharedRuns&) = delete;
  SharedRuns& operator=(const SharedRuns&) = delete;
  ~SharedRuns() = default;

  /// At least one.
  void set_most(std::size_t most) {
    const std::lock_guard lock(mutex_);
    most_ = std::max<std::size_t>(most, 1);
    changed_.notify_all();
  }

  /// What `run`, which returns a Given, gives in this thread, or a copy of what another one's gave. Without a key, it
  /// is not shared. Nothing where the wait was ended. Throws what this thread's `run` throws, or a copy; whoever waited
  /// for a run that threw, or whose result may not be shared, asks again.
  template <class Run>
  [[nodiscard]] std::optional<Result> get(const std::optional<Key>& key, const std::stop_token& stop,
                                          Clock::time_point deadline, Run run) {
    std::unique_lock lock(mutex_);
    // Not for ever with others, who may have to fail again.
    constexpr int most_tries_shared = 3;
    for (int tries = 0;; ++tries) {
      const std::shared_ptr<Batch> batch = join(tries < most_tries_shared ? key : std::nullopt);
      const auto is_ready = [&] {
        return batch->state == State::waiting ? may_begin(*batch) : batch->state > State::running;
      };
      if (!changed_.wait_until(lock, stop, deadline, is_ready)) {
        leave(*batch);
        return std::nullopt;
      }
      if (batch->state == State::waiting) return lead(*batch, lock, run);
      if (batch->state == State::given) return take(*batch, lock);
      leave(*batch);
    }
  }

  /// How many callers wait for a run to begin.
  [[nodiscard]] std::size_t waiting() const {
    const std::lock_guard lock(mutex_);
    std::size_t callers = 0;
    for (const auto& batch : queue_)
      callers += batch->callers;
    return callers;
  }

private:
  enum class State : unsigned char { waiting, running, given, failed };

  /// Callers who share a run.
  struct Batch {
    std::optional<Key> key;
    State state = State::waiting;
    std::size_t callers = 0; ///< Who have not got their result yet.
    std::optional<Result> result = std::nullopt;
  };

  /// All of these with the lock. One that has begun is not joined any more.
  [[nodiscard]] std::shared_ptr<Batch> join(const std::optional<Key>& key) {
    auto batch = std::ranges::find_if(queue_, [&](const auto& each) { return key && each->key == key; });
    if (batch == queue_.end()) {
      queue_.push_back(std::make_shared<Batch>(Batch{.key = key}));
      batch = std::prev(queue_.end());
    }
    ++(*batch)->callers;
    return *batch;
  }

  [[nodiscard]] bool may_begin(const Batch& batch) const { return running_ < most_ && queue_.front().get() == &batch; }

  void leave(Batch& batch) {
    if (--batch.callers > 0 || batch.state != State::waiting) return;
    std::erase_if(queue_, [&](const auto& each) { return each.get() == &batch; });
    changed_.notify_all();
  }

  void end(Batch& batch, State state) {
    --running_;
    batch.state = state;
    changed_.notify_all();
  }

  template <class Run>
  [[nodiscard]] Result lead(Batch& batch, std::unique_lock<std::mutex>& lock, Run& run) {
    batch.state = State::running;
    queue_.pop_front();
    ++running_;
    changed_.notify_all();
    lock.unlock();
    std::optional<Given> given;
    try {
      given.emplace(run());
    } catch (...) {
      lock.lock();
      end(batch, State::failed);
      leave(batch);
      throw;
    }
    lock.lock();
    if (batch.callers == 1 || !given->may_be_shared) {
      end(batch, State::failed);
      leave(batch);
      return std::move(given->result);
    }
    batch.result.emplace(std::move(given->result));
    end(batch, State::given);
    return take(batch, lock);
  }

  [[nodiscard]] Result take(Batch& batch, std::unique_lock<std::mutex>& lock) {
    /// The last one may have it: all others have their copies.
    struct Leaving {
      SharedRuns& runs;
      Batch& batch;
      std::unique_lock<std::mutex>& lock;
      ~Leaving() {
        if (!lock.owns_lock()) lock.lock();
        runs.leave(batch);
      }
    } const leaving{*this, batch, lock};
    if (batch.callers == 1) return std::move(*batch.result);
    lock.unlock();
    return *batch.result;
  }

  mutable std::mutex mutex_;
  std::condition_variable_any changed_;
  std::size_t most_;
  std::size_t running_ = 0;
  std::deque<std::shared_ptr<Batch>> queue_; // that have not begun
};

} // namespace cppvmm
