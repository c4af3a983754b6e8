module;
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <mutex>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
module cppvmm.guest_memory:fault_guard.impl;
import :error;
import :fault_guard;

namespace cppvmm {

/// A row of the table that CPPVMM_ON_FAULT makes: each is counted from itself.
struct FaultRow {
  std::int32_t begin;
  std::int32_t end;
  std::int32_t go_on;
};

// The linker's names for the section's bounds; hidden, for each shared object has a table of its own.
extern "C" {
[[gnu::visibility("hidden")]] extern const FaultRow first_fault_row[] __asm__("__start_cppvmm_faults");
[[gnu::visibility("hidden")]] extern const FaultRow end_fault_row[] __asm__("__stop_cppvmm_faults");
}

static std::uintptr_t target(const std::int32_t& distance) {
  return reinterpret_cast<std::uintptr_t>(&distance) + static_cast<std::uintptr_t>(std::intptr_t{distance});
}

/// Where to go on after a fault of the instruction at `at`; 0: it is none of the table's.
static std::uintptr_t go_on_after(std::uintptr_t at) {
  for (const FaultRow* row = first_fault_row; row != end_fault_row; ++row)
    if (at >= target(row->begin) && at < target(row->end)) return target(row->go_on);
  return 0;
}

/// One of the two signals: what was there before ours.
struct GuardedSignal {
  int number;
  bool is_ours = false;                 ///< Our handler is installed, or was when another covered it.
  struct sigaction before{};            ///< Written while ours is not installed; read by handlers.
  std::atomic<bool> is_used_up = false; ///< `before` was for one signal only (SA_RESETHAND), which has come.
};

struct FaultHandlers {
  std::mutex mutex; // of installing and taking away
  std::atomic<unsigned> guards = 0;
  GuardedSignal signals[2] = {{.number = SIGSEGV}, {.number = SIGBUS}};
};

// Never destroyed: a signal may come while the process ends.
static constinit FaultHandlers handlers;

/// Whether the thread's own instruction raised it: not what somebody sent, nor the notice of a memory error elsewhere.
static bool is_fault(const siginfo_t& info) {
  return info.si_code > 0 && info.si_code != SI_KERNEL && !(info.si_signo == SIGBUS && info.si_code == BUS_MCEERR_AO);
}

/// The default action, for the signal as it came; it is blocked until its handler returns.
static void take_default(int number, siginfo_t* info) {
  struct sigaction standard{};
  standard.sa_handler = SIG_DFL;
  sigaction(number, &standard, nullptr);
  if (syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), number, info) != 0) raise(number);
}

/// Whether the kernel would drop the signal: it was sent to the first process of a PID namespace, which has no handler.
static bool is_dropped(const siginfo_t& info) { return getpid() == 1 && !is_fault(info) && info.si_code != SI_KERNEL; }

static void pass_on(GuardedSignal& guarded, int number, siginfo_t* info, void* context) {
  const struct sigaction& before = guarded.before;
  // Where nothing is called, the kernel does not look at SA_SIGINFO; both handlers are one pointer.
  const bool takes_info = (before.sa_flags & SA_SIGINFO) != 0;
  const bool is_once = (static_cast<unsigned>(before.sa_flags) & static_cast<unsigned>(SA_RESETHAND)) != 0;
  if (before.sa_handler == SIG_IGN) {
    // The kernel lets nobody ignore a fault.
    if (is_fault(*info) || info->si_code == SI_KERNEL) take_default(number, info);
    return;
  }
  if (before.sa_handler == SIG_DFL || (is_once && guarded.is_used_up.exchange(true)))
    return is_dropped(*info) ? void() : take_default(number, info);
  if (takes_info)
    before.sa_sigaction(number, info, context);
  else
    before.sa_handler(number);
}

static void on_signal(int number, siginfo_t* info, void* context) {
  if (is_fault(*info)) {
    greg_t& at = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
    if (const std::uintptr_t go_on = go_on_after(static_cast<std::uintptr_t>(at)); go_on != 0) {
      at = static_cast<greg_t>(go_on);
      return;
    }
  }
  pass_on(handlers.signals[number == SIGSEGV ? 0 : 1], number, info, context);
}

static bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == on_signal;
}

/// 0, or what errno says; EBUSY when ours is covered by another.
static int install_one(GuardedSignal& guarded) {
  struct sigaction now{};
  if (sigaction(guarded.number, nullptr, &now) != 0) return errno;
  if (is_ours(now)) return 0;
  if (guarded.is_ours) return EBUSY;
  guarded.before = now;
  guarded.is_used_up.store(false);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_mask = now.sa_mask;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | (now.sa_flags & (SA_NODEFER | SA_RESTART));
  if (sigaction(guarded.number, &action, nullptr) != 0) return errno;
  guarded.is_ours = true;
  return 0;
}

static void take_away(GuardedSignal& guarded) {
  struct sigaction now{};
  if (!guarded.is_ours || sigaction(guarded.number, nullptr, &now) != 0 || !is_ours(now)) return;
  struct sigaction before = guarded.before;
  if (guarded.is_used_up.load()) {
    before.sa_handler = SIG_DFL;
    before.sa_flags &= ~SA_SIGINFO;
  }
  if (sigaction(guarded.number, &before, nullptr) == 0) guarded.is_ours = false;
}

MemoryResult<FaultGuard> FaultGuard::install() {
  const std::lock_guard lock(handlers.mutex);
  if (handlers.guards.load(std::memory_order_relaxed) == 0) {
    for (GuardedSignal& guarded : handlers.signals) {
      const int error = install_one(guarded);
      if (error == 0) continue;
      for (GuardedSignal& each : handlers.signals)
        take_away(each);
      return std::unexpected(MemoryError{.code = error == EBUSY ? MemoryErrc::unavailable : MemoryErrc::os,
                                         .os_error = error,
                                         .operation = "FaultGuard::install: sigaction"});
    }
  }
  handlers.guards.fetch_add(1, std::memory_order_release);
  return FaultGuard();
}

bool FaultGuard::is_installed() { return handlers.guards.load(std::memory_order_acquire) != 0; }

FaultGuard::~FaultGuard() {
  if (!is_held_) return;
  const std::lock_guard lock(handlers.mutex);
  if (handlers.guards.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  for (GuardedSignal& guarded : handlers.signals)
    take_away(guarded);
}

} // namespace cppvmm
