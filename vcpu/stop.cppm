module;
#include <memory>
#include <utility>
export module cppvmm.vcpu:stop;
import :error;

namespace cppvmm {

/// Shared between a vCPU and the handles to it.
class StopState;

/// Asks one vCPU to stop, from any thread (not from a signal handler: it takes a lock). Cheap to copy; may outlive the
/// vCPU, and then does nothing.
///
/// A request is never lost: it makes a KVM_RUN that is under way return, or the next one return before the guest
/// executes anything, and it stays until Vcpu::run acknowledges it by returning Interrupted{.stop_requested = true}.
/// Requests before that acknowledgement count as one.
export class StopHandle {
public:
  StopHandle() = default;
  explicit StopHandle(std::shared_ptr<StopState> state) : state_(std::move(state)) {}

  void request_stop() const;
  /// Whether a request waits to be acknowledged.
  [[nodiscard]] bool stop_requested() const;

private:
  std::shared_ptr<StopState> state_;
};

/// The signal that makes a KVM_RUN under way return; process-wide. SIGRTMIN + 4 unless set_stop_signal chose another.
export [[nodiscard]] int stop_signal();

/// Chooses the stop signal, before the first vCPU is made (afterwards: bad_state). invalid_argument when `signal` is
/// not a signal that can be caught. The first vCPU installs a handler that does nothing, unless the program has a
/// handler of its own for that signal, which then stays. Vcpu::run unblocks the signal on the thread that calls it.
export [[nodiscard]] KvmResult<void> set_stop_signal(int signal);

} // namespace cppvmm
