module;
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>
export module cppvmm.vcpu:vcpu;
import :capabilities;
import :cpuid;
import :error;
import :exit;
import :file_descriptor;
import :hypercall;
import :registers;
import :state;
import :stop;

namespace cppvmm {

/// How a Vcpu works.
export struct VcpuOptions {
  /// Exchange registers through the kvm_run page where KVM offers it (KVM_CAP_SYNC_REGS), else by ioctl. KVM stores
  /// them there at an exit if somebody looked at them after the one before; else they come by ioctl when asked for.
  bool sync_registers = true;
};

/// One virtual processor. Owns its descriptor and the mapping of its kvm_run page.
///
/// A Vcpu is used by one thread at a time, not necessarily the one that made it; only its StopHandles may be used by
/// others meanwhile. A call that does not fit what the vCPU waits for is refused with bad_state, and so is every call
/// on a moved-from Vcpu.
export class Vcpu {
public:
  /// Takes over a vCPU descriptor (KVM_CREATE_VCPU) of the KVM that `capabilities` describe. An error when the
  /// descriptor is no vCPU. Capabilities::xsave_bytes is to be what KVM_CAP_XSAVE2 says for its VM.
  [[nodiscard]] static KvmResult<Vcpu> adopt(FileDescriptor descriptor, const Capabilities& capabilities,
                                             std::uint32_t id = 0, VcpuOptions options = {});

  Vcpu(Vcpu&&) noexcept;
  Vcpu& operator=(Vcpu&&) noexcept;
  ~Vcpu();

  /// As given to Vm::create_vcpu or adopt.
  [[nodiscard]] std::uint32_t id() const;
  /// The descriptor's number, for ioctls of the embedder's own; -1 when moved from. Registers that an answer has
  /// changed (complete_hypercall) are in KVM only after the next run().
  [[nodiscard]] int descriptor() const;
  /// Whether registers go through the kvm_run page.
  [[nodiscard]] bool uses_sync_registers() const;

  /// What CPUID tells the guest. Set it before the special registers and before the first run: KVM checks them against
  /// it (KVM 6.12 refuses EFER.LME unless CPUID has long mode).
  [[nodiscard]] KvmResult<void> set_cpuid(std::span<const CpuidEntry> entries);
  [[nodiscard]] KvmResult<std::vector<CpuidEntry>> cpuid() const;
  /// KVM_GET_SUPPORTED_HV_CPUID for this vCPU; unsupported where KVM has no Hyper-V face.
  [[nodiscard]] KvmResult<std::vector<CpuidEntry>> supported_hv_cpuid() const;

  [[nodiscard]] KvmResult<Registers> registers() const;
  /// An exception that inject_exception has queued stays, and is delivered at the new RIP.
  [[nodiscard]] KvmResult<void> set_registers(const Registers& registers);
  [[nodiscard]] KvmResult<SpecialRegisters> special_registers() const;
  [[nodiscard]] KvmResult<void> set_special_registers(const SpecialRegisters& registers);

  /// The value of one MSR, as KVM keeps it (what the VMM owns through a filter is not in KVM).
  [[nodiscard]] KvmResult<std::uint64_t> msr(std::uint32_t index) const;
  /// The values of several; all or an error that names the first MSR which KVM does not give.
  [[nodiscard]] KvmResult<std::vector<MsrEntry>> msrs(std::span<const std::uint32_t> indices) const;
  /// Sets them in order; the error names the first that KVM refused, those before it are set.
  [[nodiscard]] KvmResult<void> set_msrs(std::span<const MsrEntry> entries);

  /// What KVM keeps of a vCPU beside its registers and MSRs, for snapshots and migration; none runs meanwhile, and the
  /// last exit was finished: by run() with a stop requested, as often as it takes to be Interrupted, for what is left
  /// of an access that KVM makes in pieces comes out first; the guest executes nothing more. To be put back in this
  /// order (that of Linux's own tests, tools/testing/selftests/kvm/lib/x86/processor.c, vcpu_load_state): set_tsc_khz,
  /// CPUID, set_special_registers, set_extended_control_registers, set_xsave, set_registers, set_local_apic, set_msrs,
  /// set_debug_registers, set_mp_state, set_events, set_nested_state.
  [[nodiscard]] KvmResult<VcpuEvents> events() const;
  [[nodiscard]] KvmResult<void> set_events(const VcpuEvents& events);
  [[nodiscard]] KvmResult<DebugRegisters> debug_registers() const;
  [[nodiscard]] KvmResult<void> set_debug_registers(const DebugRegisters& registers);
  [[nodiscard]] KvmResult<ExtendedControlRegisters> extended_control_registers() const;
  [[nodiscard]] KvmResult<void> set_extended_control_registers(const ExtendedControlRegisters& registers);
  [[nodiscard]] KvmResult<Xsave> xsave() const;
  /// invalid_argument unless it has as many bytes as xsave() gives here.
  [[nodiscard]] KvmResult<void> set_xsave(const Xsave& xsave);
  /// Of a guest that runs guests, and of any other on a KVM that can have such. unsupported where KVM cannot.
  [[nodiscard]] KvmResult<NestedState> nested_state() const;
  /// invalid_argument unless there are as many bytes as they say themselves, and no more than
  /// Capabilities::nested_state_bytes.
  [[nodiscard]] KvmResult<void> set_nested_state(const NestedState& nested);
  /// In a VM with KVM's interrupt controller.
  [[nodiscard]] KvmResult<LocalApic> local_apic() const;
  [[nodiscard]] KvmResult<void> set_local_apic(const LocalApic& apic);
  /// The frequency of the guest's time stamp counter, in kHz. unsupported when KVM does not know it.
  [[nodiscard]] KvmResult<std::uint32_t> tsc_khz() const;
  /// os with EINVAL where this processor cannot be scaled to it.
  [[nodiscard]] KvmResult<void> set_tsc_khz(std::uint32_t khz);

  [[nodiscard]] KvmResult<MpState> mp_state() const;
  [[nodiscard]] KvmResult<void> set_mp_state(MpState state);

  /// Delivers an exception at the next entry, RIP unchanged; with the error code where the vector has one. bad_state
  /// when one waits already.
  [[nodiscard]] KvmResult<void> inject_exception(ExceptionVector vector, std::optional<std::uint32_t> error_code = {});

  /// Delivers an external interrupt (KVM_INTERRUPT), in a VM without KVM's interrupt controller; only while
  /// ready_for_interrupt.
  [[nodiscard]] KvmResult<void> inject_interrupt(std::uint8_t vector);
  /// Whether the guest could take an interrupt when run() last returned.
  [[nodiscard]] bool ready_for_interrupt() const;
  /// Whether run() returns InterruptWindowOpen as soon as the guest can take one.
  [[nodiscard]] KvmResult<void> request_interrupt_window(bool wanted);

  /// Runs the guest until there is something to do, and says what. Finishes first what the previous exit left open: an
  /// unanswered IoIn or MmioRead reads all ones; an unanswered ReadMsr, WriteMsr or Hypercall is bad_state. May also
  /// return Interrupted for any signal that the thread takes. On the first call by a thread, unblocks the stop signal
  /// there.
  [[nodiscard]] KvmResult<Exit> run();

  /// A handle with which any thread can stop this vCPU.
  [[nodiscard]] StopHandle stop_handle() const;
  /// Takes a stop request back that run() has not acknowledged; whether there was one.
  bool acknowledge_stop();

  /// Answers IoIn: exactly size * count bytes, else invalid_argument (and the exit still waits).
  [[nodiscard]] KvmResult<void> complete_io_in(std::span<const std::byte> data);
  /// Answers MmioRead: exactly `size` bytes, else invalid_argument (and the exit still waits).
  [[nodiscard]] KvmResult<void> complete_mmio_read(std::span<const std::byte> data);
  /// Answers ReadMsr: the guest reads `value`.
  [[nodiscard]] KvmResult<void> complete_read_msr(std::uint64_t value);
  /// Answers WriteMsr: the write is taken.
  [[nodiscard]] KvmResult<void> complete_write_msr();
  /// Answers ReadMsr or WriteMsr: the guest gets #GP.
  [[nodiscard]] KvmResult<void> refuse_msr();
  /// Answers Hypercall with the result value (TLFS "Hypercall Outputs"): in RAX, or in EDX:EAX for 32-bit code. Nothing
  /// else of the guest changes.
  [[nodiscard]] KvmResult<void> complete_hypercall(std::uint64_t result);
  /// Has the guest make the Hypercall again when it runs next, with this control word: how a rep call whose time is
  /// over goes on, its rep start index advanced (TLFS "Hypercall Continuation"). RIP is at the trapping instruction,
  /// the control word in RCX, or in EDX:EAX for 32-bit code; nothing else of the guest changes. Interrupts that wait
  /// are delivered first, the vCPU may be stopped and its state taken: what goes on is the guest's own call.
  [[nodiscard]] KvmResult<void> continue_hypercall(std::uint64_t control);
  /// Answers Hypercall with #UD, RIP at the trapping instruction and every register as it was at the call.
  [[nodiscard]] KvmResult<void> refuse_hypercall();

  /// From now on, a write of one byte to `port` is a Hypercall (transports `user` and `split`); wider ones stay IoOut.
  /// KVM does not tell a step of OUTSB from an OUT: that is the guest's own doing, and a call with the registers that
  /// it has. invalid_argument for unusable_hypercall_port. The VMM puts user_hypercall_code(port) or
  /// split_hypercall_code into the hypercall page.
  [[nodiscard]] KvmResult<void> use_user_hypercalls(std::uint8_t port = user_hypercall_port);
  /// KVM_CAP_HYPERV_SYNIC2: KVM's synthetic interrupt controller, for synthetic timers and messages, in a VM with KVM's
  /// interrupt controller; for good. unsupported where KVM lacks it.
  [[nodiscard]] KvmResult<void> enable_hyperv_synic();
  /// Whether that was done.
  [[nodiscard]] bool has_hyperv_synic() const;
  /// KVM_CAP_HYPERV_ENFORCE_CPUID: KVM refuses what the guest's Hyper-V CPUID leaves do not grant, extended hypercalls
  /// included (transport `kernel`). unsupported where KVM lacks it.
  [[nodiscard]] KvmResult<void> enforce_hyperv_cpuid(bool enforced = true);

private:
  struct Impl;
  explicit Vcpu(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

} // namespace cppvmm
