module;
#include <cstdint>
#include <mutex>
#include <pthread.h>
module cppvmm.vcpu:stop_state;
import :error;
import :stop;

namespace cppvmm {

// The stop protocol. kvm_run.immediate_exit is 1 as long as a request waits: KVM looks at it when KVM_RUN begins. A
// request that comes later than that look finds the thread entered here and signals it, which interrupts KVM_RUN in the
// kernel or in the guest. The signal goes out under the lock, and the thread leaves under the lock: it is never sent to
// a thread that has gone on to other things, or is no more.
class StopState {
public:
  explicit StopState(std::uint8_t* immediate_exit) : immediate_exit_(immediate_exit) {}

  void request();
  [[nodiscard]] bool requested() const;
  // Takes the request back; whether there was one.
  bool acknowledge();

  // Around KVM_RUN, on the thread that calls it. leave() acknowledges when KVM_RUN was interrupted, and says so.
  void enter();
  bool leave(bool interrupted);

  // For a KVM_RUN that is only to finish what the last exit left open. The caller makes it between the two, and does
  // not enter: a request waits meanwhile.
  void force_immediate_exit();
  void end_immediate_exit();

  // The vCPU is going: its kvm_run page must not be touched any more.
  void detach();

private:
  void set_immediate_exit(std::uint8_t value);

  mutable std::mutex mutex_;
  std::uint8_t* immediate_exit_;
  bool requested_ = false;
  bool signalled_ = false; // since the thread entered: once is enough
  bool inside_ = false;    // thread_ is inside KVM_RUN, or about to be
  pthread_t thread_{};
};

// Installs the stop signal's handler, once; and lets the calling thread take the signal, once a thread.
KvmResult<void> install_stop_signal();
KvmResult<void> unblock_stop_signal();

} // namespace cppvmm
