module;
#include <cstdint>
#include <map>
#include <span>
export module cppvmm.vcpu:vm;
import :capabilities;
import :error;
import :file_descriptor;
import :hypercall;
import :state;
import :vcpu;

namespace cppvmm {

/// A range of guest-physical memory and the host memory behind it (KVM_SET_USER_MEMORY_REGION).
export struct MemorySlot {
  std::uint32_t slot = 0;          ///< Its number: below Capabilities::memory_slots.
  std::uint64_t guest_address = 0; ///< 4 KiB aligned.
  std::uint64_t bytes = 0;         ///< A multiple of 4 KiB, not zero.
  void* host_address = nullptr;    ///< 4 KiB aligned; stays mapped while the slot is there.
  bool read_only = false;          ///< Guest writes become MmioWrite exits.
  bool log_dirty = false;          ///< KVM keeps the dirty log.
};

/// MSRs `first` to `first + count - 1`.
export struct MsrRange {
  std::uint32_t first = 0;
  std::uint32_t count = 0; ///< 1 to 12288 (KVM_MSR_FILTER_MAX_BITMAP_SIZE).
  bool reads = true;
  bool writes = true;
};

/// A virtual machine. Owns its descriptor. Memory slots are changed and dirty logs read by one thread at a time; the
/// other calls may come from any thread.
export class Vm {
public:
  /// Takes over a VM descriptor (KVM_CREATE_VM) of the KVM that `capabilities` describe. An error when it is no VM.
  /// Slots that it has already are not known here: the dirty log calls need set_memory_slot first.
  [[nodiscard]] static KvmResult<Vm> adopt(FileDescriptor descriptor, const Capabilities& capabilities);

  [[nodiscard]] int descriptor() const { return descriptor_.number(); }
  [[nodiscard]] const Capabilities& capabilities() const { return capabilities_; }
  /// KVM_CHECK_EXTENSION for this VM: 0 when KVM lacks it, else what KVM says (api.rst tells what it means).
  [[nodiscard]] KvmResult<int> check_extension(std::uint32_t number) const;

  /// Makes a slot, or moves or re-flags the one of that number.
  [[nodiscard]] KvmResult<void> set_memory_slot(const MemorySlot& slot);
  [[nodiscard]] KvmResult<void> remove_memory_slot(std::uint32_t slot);

  /// Fills `bitmap`, one bit a page from the slot's first on, with the pages written since the last call (or, with
  /// enable_manual_dirty_log, since they were cleared). invalid_argument unless it has at least one bit for every page
  /// of the slot, rounded up to 64.
  [[nodiscard]] KvmResult<void> dirty_log(std::uint32_t slot, std::span<std::uint64_t> bitmap) const;
  /// Reading the log no longer clears it (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2); clear_dirty_log does.
  [[nodiscard]] KvmResult<void> enable_manual_dirty_log();
  /// Clears the pages whose bits are set, from page `first_page` of the slot on: a multiple of 64. `pages` is a
  /// multiple of 64 too, or reaches the slot's end.
  [[nodiscard]] KvmResult<void> clear_dirty_log(std::uint32_t slot, std::uint64_t first_page, std::uint32_t pages,
                                                std::span<const std::uint64_t> bitmap) const;

  /// Three pages below 4 GiB that no slot uses: Intel processors need them to run real mode (KVM_SET_TSS_ADDR).
  [[nodiscard]] KvmResult<void> set_tss_address(std::uint32_t guest_address);
  /// One page that no slot uses, for the same (KVM_SET_IDENTITY_MAP_ADDR); before the first vCPU.
  [[nodiscard]] KvmResult<void> set_identity_map_address(std::uint64_t guest_address);

  /// KVM's own PICs, I/O APIC and local APICs; before the first vCPU. HLT then no longer exits.
  [[nodiscard]] KvmResult<void> create_interrupt_controller();
  /// KVM's own interval timer (KVM_CREATE_PIT2); needs the interrupt controller. With `dummy_speaker`, port 0x61 is
  /// KVM's too.
  [[nodiscard]] KvmResult<void> create_interval_timer(bool dummy_speaker = true);
  /// Sets an input of KVM's interrupt controller (KVM_IRQ_LINE).
  [[nodiscard]] KvmResult<void> set_interrupt_line(std::uint32_t line, bool active);

  /// What KVM keeps of the board, for snapshots and migration, while no vCPU runs; an error where the VM has none. The
  /// clock goes on from where it was put back, and is to be put back before the vCPUs' MSRs.
  [[nodiscard]] KvmResult<InterruptController> interrupt_controller(InterruptChip chip) const;
  [[nodiscard]] KvmResult<void> set_interrupt_controller(const InterruptController& controller);
  [[nodiscard]] KvmResult<IntervalTimer> interval_timer() const;
  [[nodiscard]] KvmResult<void> set_interval_timer(const IntervalTimer& timer);
  [[nodiscard]] KvmResult<VmClock> clock() const;
  [[nodiscard]] KvmResult<void> set_clock(const VmClock& clock);

  /// MSR accesses that KVM refuses for these reasons (msr_reason_* bits) become ReadMsr and WriteMsr exits, not #GP.
  /// unsupported when KVM lacks a reason.
  [[nodiscard]] KvmResult<void> enable_user_space_msrs(std::uint32_t reasons);
  /// KVM leaves these MSRs alone (at most 16 ranges; none allows all again). What the guest then gets is #GP, or an
  /// exit where enable_user_space_msrs has msr_reason_filter. Replaces the filter as a whole.
  [[nodiscard]] KvmResult<void> set_msr_filter(std::span<const MsrRange> denied);
  /// What the transports `user` and `split` need: the Hyper-V MSRs that the VMM owns, as exits. Replaces both settings
  /// above. An embedder who filters other MSRs too makes the two calls itself. invalid_argument for `kernel`.
  [[nodiscard]] KvmResult<void> take_hyperv_msrs(HypercallTransport transport = HypercallTransport::user);

  /// `id`: below Capabilities::max_vcpus, and the APIC ID.
  [[nodiscard]] KvmResult<Vcpu> create_vcpu(std::uint32_t id, VcpuOptions options = {});

private:
  Vm(FileDescriptor descriptor, const Capabilities& capabilities);

  FileDescriptor descriptor_;
  Capabilities capabilities_;
  std::map<std::uint32_t, std::uint64_t> slot_bytes_; // KVM_GET_DIRTY_LOG writes as much as the slot's size asks for
};

} // namespace cppvmm
