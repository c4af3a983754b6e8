module;
#include <utility>
export module cppvmm.guest_memory:fault_guard;
import :error;

namespace cppvmm {

/// While one is there, no access of this library to guest memory is a deadly signal: where the host has no memory to
/// give (MemoryErrc::inaccessible), the SIGSEGV or SIGBUS becomes the access's error. All regions are accessed by loads
/// and stores then, adopted ones too, at the price of memory of our own, and naturally aligned accesses of up to 8
/// bytes are never torn.
///
/// It installs handlers of SIGSEGV and SIGBUS (SA_SIGINFO, SA_ONSTACK, and of SA_NODEFER, SA_RESTART and the mask what
/// was there before). They mend faults of the library's own instructions, which a table lists; every other signal goes
/// to what was installed before, as if they were not there: a handler is called with the same arguments (on the
/// alternate stack, if the thread has one), the default action is taken. They use nothing but the table, so that any
/// thread may fault, and a child of fork(2) has them too.
///
/// What an embedder has to see to:
/// - Threads that access guest memory do not block SIGSEGV or SIGBUS: the kernel kills a process that faults so. Nor do
///   accesses come from handlers of these signals, which block them.
/// - Who installs a handler of these signals later keeps ours and passes on what is not its own.
/// - The last guard goes when no access is in progress.
/// - A child that is forked while another thread installs or takes away a guard may do neither itself.
/// - A signal that was ignored interrupts system calls meanwhile, and is not ignored by what execve(2) starts.
///
/// KVM_RUN raises SIGBUS (BUS_MCEERR_AR) where the guest meets memory that was lost to a memory error: that signal is
/// no access of this library, and goes on as any other.
export class FaultGuard {
public:
  /// Any number may be there: the first installs the handlers, the last takes them away, unless another handler was
  /// installed over them; then they stay, pass everything on and go on mending. `unavailable` when handlers of a former
  /// guard are covered so, for nobody could tell whether signals reach them still; os. Safe to call from any thread.
  [[nodiscard]] static MemoryResult<FaultGuard> install();
  /// Whether there is one.
  [[nodiscard]] static bool is_installed();

  FaultGuard(FaultGuard&& other) noexcept : is_held_(std::exchange(other.is_held_, false)) {}
  FaultGuard& operator=(FaultGuard&& other) noexcept {
    std::swap(is_held_, other.is_held_);
    return *this;
  }
  ~FaultGuard();

private:
  FaultGuard() = default;
  bool is_held_ = true;
};

} // namespace cppvmm
