module;
#include <memory>
#include <vector>
export module cppvmm.hv_ext:dirty_log;
import :error;
import cppvmm.guest_memory;
import cppvmm.vcpu;

namespace cppvmm {

/// KVM's dirty log as a WriteLog of guest memory: it shows the stores of the guest, those of its page walks and KVM's
/// own writes to guest memory, by 4 KiB pages whatever the host's page size is (while the log is on, KVM maps no huge
/// pages into the guest). A page that the guest only read may be in it as well: KVM maps it writable if it can, and
/// logs it then. So surveys know which pages the guest wrote; and with WriteLogOptions::complete, of memory that is
/// present as a whole (hugetlb, populated, locked), which pages are zero still.
///
/// KVM's log lags behind vCPUs that are in the guest. Processors that log by themselves (Intel's page modification
/// logging) hand their stores over when the vCPU leaves the guest, which KVM asks for without waiting
/// (kvm_arch_sync_dirty_log in arch/x86/kvm/x86.c); and a page whose protection KVM lifts without its lock is logged
/// just after (fast_page_fault in arch/x86/kvm/mmu/mmu.c). So declare the log complete only where no other vCPU is in
/// the guest while a survey is made: they have not started yet, or the VMM keeps them out of KVM_RUN.
///
/// To be had until the answer that matters was given: start it before the vCPUs run, stop it in
/// HvOptions::on_boot_zeroed. What it costs until then is a fault at the guest's first store to each page, and at the
/// first after each survey.
export class DirtyLog {
public:
  /// Switches the log on for `slots`, as they were given to `vm` (those that are read-only are left alone), and begins
  /// a write log of `memory` by it. Both must outlive this object; while it is on, the VMM changes none of these slots
  /// and reads none of their logs, and other slots only while no survey is being made.
  ///
  /// invalid_options when `options` says complete and a page of RAM is in none of the slots, or the slot maps other
  /// host memory there; kvm and memory when these refuse (a log is kept already). After such an error KVM may go on
  /// logging, which costs time and nothing else.
  [[nodiscard]] static HvResult<DirtyLog> start(Vm& vm, GuestMemory& memory, const std::vector<MemorySlot>& slots,
                                                const WriteLogOptions& options = {});
  DirtyLog(DirtyLog&&) noexcept;
  DirtyLog& operator=(DirtyLog&&) noexcept;
  /// Stops, without a word of errors.
  ~DirtyLog();

  /// Ends the write log and switches KVM's log off; nothing the second time. From any thread, while vCPUs run too. On
  /// an error of KVM's some slots may still be logged, which costs time and nothing else.
  [[nodiscard]] HvResult<void> stop();

private:
  struct State;
  explicit DirtyLog(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

} // namespace cppvmm
