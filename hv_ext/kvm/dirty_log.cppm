module;
#include <cstdint>
#include <memory>
#include <span>
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
  /// and reads and clears their logs by this object alone, and changes other slots only while no survey is being made
  /// and no other call of this object.
  ///
  /// invalid_options when `options` says complete and a page of RAM is in none of the slots, or the slot maps other
  /// host memory there; memory when a write log is kept already; kvm when KVM refuses, as it does where it has a dirty
  /// ring in the log's place (ENXIO; Linux virt/kvm/kvm_main.c, kvm_get_dirty_log). After such an error KVM may go on
  /// logging, which costs time and nothing else, and what the VMM has not read of its own logs is there still.
  [[nodiscard]] static HypervResult<DirtyLog> start(Vm& vm, GuestMemory& memory, const std::vector<MemorySlot>& slots,
                                                    const WriteLogOptions& options = {});
  DirtyLog(DirtyLog&&) noexcept;
  DirtyLog& operator=(DirtyLog&&) noexcept;
  /// Stops, without a word of errors. What the VMM has not read of a log that is its own too is lost.
  ~DirtyLog();

  /// Ends the write log and switches KVM's log off, but for the slots whose log is the VMM's too; nothing the second
  /// time. From any thread, while vCPUs run too. On an error of KVM's some slots may still be logged, which costs time
  /// and nothing else.
  [[nodiscard]] HypervResult<void> stop();

  /// The log of a slot, for the VMM itself (live migration): what KVM has logged since the last of these reads. KVM
  /// gives each write once, so surveys and the VMM share what it gave. For slots that had MemorySlot::log_dirty at the
  /// start, and as `keep` says. After `stop`, which leaves their logs on, the VMM reads them by Vm::dirty_log; and once
  /// more by this, for what surveys took before is nowhere else. From any thread.
  ///
  /// invalid_options for another slot, or when `bitmap` has less than a bit for each page, rounded up to 64; kvm: from
  /// then on all of the slot's pages count as written, for the VMM's next read too.
  [[nodiscard]] HypervResult<void> read(std::uint32_t slot, std::span<std::uint64_t> bitmap);
  /// Vm::clear_dirty_log, for a VM with Vm::enable_manual_dirty_log, where reading clears nothing. Surveys have seen
  /// what is cleared. Errors as `read`, and invalid_options for pages that are not the slot's, and after `stop`.
  [[nodiscard]] HypervResult<void> clear(std::uint32_t slot, std::uint64_t first_page, std::uint32_t pages,
                                         std::span<const std::uint64_t> bitmap);
  /// From now on the slot's log is the VMM's too, or no more: for a migration that begins or ends meanwhile. It begins
  /// empty (with Vm::enable_manual_dirty_log, with what was not cleared). Before `stop`; invalid_options afterwards and
  /// for a slot that is not logged; kvm.
  [[nodiscard]] HypervResult<void> keep(std::uint32_t slot, bool is_kept);

private:
  struct State;
  explicit DirtyLog(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

} // namespace cppvmm
