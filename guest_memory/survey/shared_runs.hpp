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
    std::optional<Result> got;
    static_cast<void>(use(key, stop, deadline, run, [&](Result& result, bool is_last) {
      if (is_last)
        got.emplace(std::move(result));
      else
        got.emplace(std::as_const(result));
    }));
    return got;
  }

  /// The same, without copies: calls `used(result, is_last)` with what is shared. It is of use to others at the same
  /// time unless `is_last`: then it may be taken. A run is in progress until all have used its result, so that there
  /// are no more results than runs. False where the wait was ended. Throws what `used` throws, too.
  template <class Run, class Use>
  [[nodiscard]] bool use(const std::optional<Key>& key, const std::stop_token& stop, Clock::time_point deadline,
                         Run run, Use used) {
    std::unique_lock lock(mutex_);
    // Not for ever with others, who may have to fail again.
    constexpr int most_tries_shared = 3;
    for (int tries = 0;; ++tries) {
      Leaving own{*this, join(tries < most_tries_shared ? key : std::nullopt), lock};
      Batch& batch = *own.batch;
      const auto is_ready = [&] {
        return batch.state == State::waiting ? may_begin(batch) : batch.state > State::running;
      };
      if (!changed_.wait_until(lock, stop, deadline, is_ready)) return false;
      if (batch.state == State::waiting) lead(batch, lock, run, own.leads);
      if (batch.state == State::failed && !own.leads) continue;
      const bool is_last = own.leads || batch.callers == 1;
      lock.unlock();
      used(*batch.result, is_last);
      return true;
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
    std::size_t callers = 0; ///< Who have not used their result yet.
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

  /// A caller's part in a batch.
  struct Leaving {
    SharedRuns& runs;
    std::shared_ptr<Batch> batch;
    std::unique_lock<std::mutex>& lock;
    bool leads = false; ///< It has run what is not shared, or not yet.

    ~Leaving() {
      if (!lock.owns_lock()) lock.lock();
      runs.leave(*batch, leads, lock);
    }
  };

  void leave(Batch& batch, bool leads, std::unique_lock<std::mutex>& lock) {
    --batch.callers;
    // Of a run that failed, the others have nothing.
    if (leads || (batch.callers == 0 && batch.state == State::given)) {
      // It can be large: others need not wait for that.
      lock.unlock();
      batch.result.reset();
      lock.lock();
      --running_;
    } else if (batch.callers == 0 && batch.state == State::waiting) {
      std::erase_if(queue_, [&](const auto& each) { return each.get() == &batch; });
    } else {
      return;
    }
    changed_.notify_all();
  }

  template <class Run>
  void lead(Batch& batch, std::unique_lock<std::mutex>& lock, Run& run, bool& leads) {
    batch.state = State::running;
    queue_.pop_front();
    ++running_;
    changed_.notify_all();
    leads = true;
    const auto end = [&](State state) {
      lock.lock();
      batch.state = state;
      leads = state == State::failed;
      changed_.notify_all();
    };
    lock.unlock();
    bool may_be_shared = false;
    try {
      Given given = run();
      may_be_shared = given.may_be_shared;
      batch.result.emplace(std::move(given.result));
    } catch (...) {
      end(State::failed);
      throw;
    }
    end(may_be_shared ? State::given : State::failed);
  }

  mutable std::mutex mutex_;
  std::condition_variable_any changed_;
  std::size_t most_;
  std::size_t running_ = 0;
  std::deque<std::shared_ptr<Batch>> queue_; // that have not begun
};

} // namespace cppvmm
