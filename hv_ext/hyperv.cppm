module;
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>
export module cppvmm.hv_ext:hyperv;
import :error;
import :extended_hypercalls;
import cppvmm.guest_memory;
import cppvmm.vcpu;

namespace cppvmm {

/// Hyper-V for a VM made with cppvmm.vcpu: the CPUID leaves, the MSRs, the hypercall page and the extended hypercalls,
/// over either transport. Safe to use from any thread; each Vcpu by its own, as always.
export class Hyperv {
public:
  /// Sets `vm` up. Without `transport`, the one that choose_hypercall_transport names. `memory` must outlive this
  /// object and hold what the VM's slots map. invalid_options as ExtendedHypercalls::create; unsupported when this KVM
  /// lacks the transport; kvm when it refuses. Transport `user` takes the VM's MSR filter (Vm::take_hyperv_msrs).
  [[nodiscard]] static HvResult<Hyperv> create(Vm& vm, const GuestMemory& memory, HvOptions options = {},
                                               std::optional<HypercallTransport> transport = std::nullopt);
  ~Hyperv();
  Hyperv(Hyperv&&) noexcept;
  Hyperv& operator=(Hyperv&&) noexcept;

  [[nodiscard]] HypercallTransport transport() const;
  /// The calls' counts, for reports.
  [[nodiscard]] const ExtendedHypercalls& hypercalls() const;

  /// Gives a new vCPU its CPUID: `cpuid` with the Hyper-V leaves in the place of all that it has in
  /// 0x40000000..0x400000FF, and the hypervisor bit. Call it for every vCPU before its special registers are set.
  [[nodiscard]] HvResult<void> prepare(Vcpu& vcpu, std::vector<CpuidEntry> cpuid) const;

  /// Answers an exit that concerns Hyper-V: a hypercall, or an access to one of its MSRs. False when the exit is the
  /// VMM's own to handle. Transport `user`: a hypercall while GUEST_OS_ID is 0 is #UD.
  [[nodiscard]] HvResult<bool> handle(Vcpu& vcpu, const Exit& exit);

  /// Forgets what the guest set up: GUEST_OS_ID and HYPERCALL are 0 (and not locked), as at power-on, over either
  /// transport. From now on no hypercall arrives, from an old hypercall page neither, until the guest writes its OS ID
  /// again. The counts go on.
  ///
  /// For a reset of the machine in place, once all its vCPUs have stopped and none is in `handle`: an answer in
  /// progress would go to memory of the next boot's. `vcpu` is any of the VM's. The VMM sets back what else there is:
  /// guest memory (GuestMemory::reset), and each vCPU's registers and pending events, after its last exit was finished:
  /// one that was answered, and not run on from, changes them once more (a hypercall: RAX and RIP). Vcpu::run does
  /// that, and returns before the guest executes anything, when a stop was requested before.
  [[nodiscard]] HvResult<void> reset(Vcpu& vcpu);

private:
  struct State;
  explicit Hyperv(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

} // namespace cppvmm
