module;
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <expected>
#include <mutex>
#include <pthread.h>
#include <sched.h>
module cppvmm.vcpu:stop.impl;
import :error;
import :ioctl;
import :stop;
import :stop_state;

namespace cppvmm {

namespace {

struct StopSignal {
  std::mutex mutex;
  std::atomic<int> number = 0; // 0: not chosen
  bool installed = false;
};

StopSignal& chosen() {
  static StopSignal signal;
  return signal;
}

} // namespace

int stop_signal() {
  const int number = chosen().number.load();
  return number != 0 ? number : SIGRTMIN + 4;
}

KvmResult<void> set_stop_signal(int signal) {
  if (signal < 1 || signal > SIGRTMAX || signal == SIGKILL || signal == SIGSTOP || (signal >= 32 && signal < SIGRTMIN))
    return failed(KvmErrc::invalid_argument, "set_stop_signal", static_cast<std::uint64_t>(signal));
  StopSignal& mine = chosen();
  const std::lock_guard lock(mine.mutex);
  if (mine.installed) return failed(KvmErrc::bad_state, "set_stop_signal", static_cast<std::uint64_t>(signal));
  mine.number.store(signal);
  return {};
}

// Being delivered is all that the signal is for.
static void ignore_signal(int) {}

KvmResult<void> install_stop_signal() {
  StopSignal& mine = chosen();
  const std::lock_guard lock(mine.mutex);
  if (mine.installed) return {};
  const int number = stop_signal();
  struct sigaction present{};
  if (sigaction(number, nullptr, &present) != 0) return os_failed("sigaction", static_cast<std::uint64_t>(number));
  const bool has_handler =
      (present.sa_flags & SA_SIGINFO) != 0 || (present.sa_handler != SIG_DFL && present.sa_handler != SIG_IGN);
  if (!has_handler) {
    struct sigaction action{};
    action.sa_handler = ignore_signal;
    sigemptyset(&action.sa_mask);
    // KVM_RUN returns EINTR whatever this says; other calls of the thread need not notice a late signal.
    action.sa_flags = SA_RESTART;
    if (sigaction(number, &action, nullptr) != 0) return os_failed("sigaction", static_cast<std::uint64_t>(number));
  }
  mine.number.store(number);
  mine.installed = true;
  return {};
}

KvmResult<void> unblock_stop_signal() {
  thread_local bool unblocked = false;
  if (unblocked) return {};
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, stop_signal());
  if (const int error = pthread_sigmask(SIG_UNBLOCK, &set, nullptr); error != 0) {
    errno = error;
    return os_failed("pthread_sigmask");
  }
  unblocked = true;
  return {};
}

void StopState::set_immediate_exit(std::uint8_t value) {
  if (immediate_exit_ != nullptr) std::atomic_ref(*immediate_exit_).store(value);
}

void StopState::request() {
  const int signal = stop_signal();
  std::unique_lock lock(mutex_);
  requested_ = true;
  set_immediate_exit(1);
  // A real-time signal is refused (EAGAIN) while the user's queue of pending signals is full. Then again, until it goes
  // out, or the vCPU has come out of KVM_RUN by itself.
  while (requested_ && inside_ && !signalled_) {
    if (pthread_kill(thread_, signal) != EAGAIN) {
      signalled_ = true;
      break;
    }
    lock.unlock();
    sched_yield();
    lock.lock();
  }
}

bool StopState::requested() const {
  const std::lock_guard lock(mutex_);
  return requested_;
}

bool StopState::acknowledge() {
  const std::lock_guard lock(mutex_);
  if (!requested_) return false;
  requested_ = false;
  set_immediate_exit(0);
  return true;
}

void StopState::enter() {
  const std::lock_guard lock(mutex_);
  thread_ = pthread_self();
  inside_ = true;
  signalled_ = false;
}

bool StopState::leave(bool interrupted) {
  const std::lock_guard lock(mutex_);
  inside_ = false;
  if (!interrupted || !requested_) return false;
  requested_ = false;
  set_immediate_exit(0);
  return true;
}

void StopState::force_immediate_exit() {
  const std::lock_guard lock(mutex_);
  set_immediate_exit(1);
}

void StopState::end_immediate_exit() {
  const std::lock_guard lock(mutex_);
  set_immediate_exit(requested_ ? 1 : 0);
}

void StopState::detach() {
  const std::lock_guard lock(mutex_);
  immediate_exit_ = nullptr;
}

void StopHandle::request_stop() const {
  if (state_) state_->request();
}

bool StopHandle::stop_requested() const { return state_ && state_->requested(); }

} // namespace cppvmm
