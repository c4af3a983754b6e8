module;
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>
export module cppvmm.hv_ext:hyperv;
import :cpuid;
import :error;
import cppvmm.guest_memory;
import cppvmm.hv_calls;
import cppvmm.vcpu;

namespace cppvmm {

/// Hyper-V for a VM made with cppvmm.vcpu: the CPUID leaves, the MSRs, the hypercall page and the extended hypercalls,
/// over each transport. Safe to use from any thread; each Vcpu by its own, as always.
export class Hyperv {
public:
  /// Sets `vm` up. Without `transport`, the one that choose_hypercall_transport names. `memory` must outlive this
  /// object and hold what the VM's slots map. invalid_options as ExtendedHypercalls::create; unsupported when this KVM
  /// lacks the transport; kvm when it refuses. Transports `user` and `split` take the VM's MSR filter
  /// (Vm::take_hyperv_msrs).
  [[nodiscard]] static HypervResult<Hyperv> create(Vm& vm, const GuestMemory& memory, HvOptions options = {},
                                                   std::optional<HypercallTransport> transport = std::nullopt);
  ~Hyperv();
  Hyperv(Hyperv&&) noexcept;
  Hyperv& operator=(Hyperv&&) noexcept;

  [[nodiscard]] HypercallTransport transport() const;
  /// What answers the calls: their counts, and what may change while the guest runs.
  [[nodiscard]] const ExtendedHypercalls& hypercalls() const;
  [[nodiscard]] ExtendedHypercalls& hypercalls();

  /// Gives a new vCPU its CPUID: `cpuid` with Hyper-V's leaves, as `hyperv` says, in the place of all that it has in
  /// 0x40000000..0x400000FF, and the hypervisor bit; and with the transport `user`, time. Call it for every vCPU before
  /// its special registers are set, after Vcpu::set_tsc_khz. invalid_options when leaves contradict what is offered
  /// (add_to_hv_cpuid), or vCPUs have TSCs of different frequencies; kvm when KVM refuses.
  [[nodiscard]] HypervResult<void> prepare(Vcpu& vcpu, std::vector<CpuidEntry> cpuid,
                                           const HypervCpuid& hyperv = {}) const;

  /// Answers an exit that concerns Hyper-V: a hypercall that ExtendedHypercalls answers, or an access to one of the
  /// Hyper-V MSRs. False when the exit is the VMM's own to handle: it waits still, and another hypercall (KVM forwards
  /// HvCallPostMessage and HvCallSignalEvent too) for Vcpu::complete_hypercall or refuse_hypercall. Transports `user`
  /// and `split`: an extended hypercall while GUEST_OS_ID is 0 is #UD (others are no Hyper-V calls to KVM then).
  [[nodiscard]] HypervResult<bool> handle(Vcpu& vcpu, const Exit& exit);

  /// Tells HvOptions::trace, if there is one, what KVM holds of the MSRs that it answers itself (synthetic_msrs), whose
  /// accesses are not seen. Nothing with the transport `user`. On the vCPU's own thread, or while it does not run. kvm
  /// when KVM refuses.
  [[nodiscard]] HypervResult<void> trace_held_msrs(const Vcpu& vcpu) const;

  /// Forgets what the guest set up: GUEST_OS_ID and HYPERCALL are 0 (and not locked), as at power-on, over each
  /// transport, and so are KVM's other synthetic MSRs of this vCPU and of the VM: KVM would go on writing to pages that
  /// the guest named there (its reference TSC, messages), which are the next boot's. From now on no extended hypercall
  /// arrives, from an old hypercall page neither, until the guest writes its OS ID again. The counts go on.
  ///
  /// For a reset of the machine in place, once all its vCPUs have stopped and none is in `handle`: an answer in
  /// progress would go to memory of the next boot's. To be called for each of the VM's vCPUs. The VMM sets back what
  /// else there is: guest memory (GuestMemory::reset), and each vCPU's registers and pending events, after its last
  /// exit was finished: one that was answered, and not run on from, changes them once more (a hypercall: RAX and RIP).
  /// Vcpu::run does that, and returns before the guest executes anything, when a stop was requested before.
  [[nodiscard]] HypervResult<void> reset(Vcpu& vcpu);

  /// What the guest has set up, over whichever transport, to be saved beside its memory, its vCPUs' registers and KVM's
  /// other MSRs. `vcpu` is any of the VM's; none runs. kvm when KVM does not give it.
  [[nodiscard]] HypervResult<HvState> state(const Vcpu& vcpu) const;
  /// Puts it back, in a VM that has its memory already and whose vCPUs do not run yet, after `prepare` for each, and
  /// forgets what a guest before had begun (ExtendedHypercalls::reset). The
  /// hypercall page gets this transport's code: so it is the transport that it was saved over, unless no vCPU is in the
  /// page, nor was interrupted there. invalid_state when it is none that this memory can have
  /// (HypervInterface::restore), kvm when KVM refuses.
  [[nodiscard]] HypervResult<void> restore(Vcpu& vcpu, const HvState& state);

private:
  struct State;
  explicit Hyperv(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

} // namespace cppvmm
