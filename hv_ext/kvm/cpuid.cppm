module;
#include <cstdint>
#include <optional>
#include <vector>
export module cppvmm.hv_ext:cpuid;
import :error;
import cppvmm.hv_calls;
import cppvmm.vcpu;

namespace cppvmm {

/// The Hyper-V that a guest sees in CPUID.
export struct HypervCpuid {
  /// What the VMM shows: full_hv_cpuid, or leaves of its own. Ours are added (add_to_hv_cpuid). Empty: those among the
  /// vCPU's leaves at 0x40000000, if they are Hyper-V's, else the minimal set (hv_cpuid_leaves).
  std::vector<CpuidEntry> leaves{};
  /// Shows KVM's own paravirtual leaves too, where the vCPU's have them: moved to 0x40000100, where guests find them by
  /// their signature. Linux takes the hypervisor with the highest base, and so is KVM's guest then, which makes no
  /// Hyper-V call.
  bool with_kvm_leaves = false;
  /// Transport `user`, whose guests have no time of KVM's: the reference time, by the vCPU's TSC, and where KVM has the
  /// interrupt controller the frequencies of the TSC and of its local APIC (1 GHz: not for a VM that was told another,
  /// KVM_CAP_X86_APIC_BUS_CYCLES_NS). The minimal set shows what user_time says; leaves that are given show what they
  /// do, and no other of these MSRs is answered than they grant. Not for a host whose TSC is not stable (its
  /// clocksource is another): the reference TSC page goes by it.
  bool with_time = true;
  /// KVM refuses what the leaves do not grant (Vcpu::enforce_hyperv_cpuid). Nothing: with the minimal set, where KVM
  /// has Hyper-V and can.
  std::optional<bool> enforce = std::nullopt;
};

/// All of KVM's Hyper-V that this vCPU can have, for HypervCpuid::leaves: KVM_GET_SUPPORTED_HV_CPUID
/// (arch/x86/kvm/hyperv.c, kvm_get_hv_cpuid) with the vendor "Microsoft Hv", by which Linux knows it, and without what
/// needs a capability that is not enabled:
/// - SynIC, synthetic timers, messages and events: Vcpu::enable_hyperv_synic (KVM_CAP_HYPERV_SYNIC2);
/// - the APIC's MSRs and cluster IPIs: KVM's interrupt controller (lapic_in_kernel);
/// - the synthetic debugger (leaves 0x40000080 to 0x40000082): a debugger in user space;
/// - enlightened VMCS (KVM_CAP_HYPERV_ENLIGHTENED_VMCS), and with it leaf 0x4000000A;
/// - extended hypercalls, which are ours to add.
/// Not for transport `user`, where KVM has none of it. kvm when KVM refuses, or has no Hyper-V.
export [[nodiscard]] HypervResult<std::vector<CpuidEntry>> full_hv_cpuid(const Vcpu& vcpu);

/// The time that a guest of the transport `user` can have on this vCPU: all 0 where KVM does not know its TSC's
/// frequency, or for a TSC of 10 MHz or slower; HvTimeSource::apic_hz is 0 without KVM's interrupt controller.
export [[nodiscard]] HvTimeSource user_time(const Vcpu& vcpu);

/// Whether the leaf tells of Hyper-V, or of what else the hypervisor is (0x40000000 to 0x400001FF).
[[nodiscard]] constexpr bool is_hypervisor_leaf(std::uint32_t function) {
  return function >= hv_cpuid_vendor && function - hv_cpuid_vendor < 0x200;
}

/// A vCPU's CPUID, composed.
struct ShownCpuid {
  std::vector<CpuidEntry> entries;
  bool is_minimal = false; ///< Of Hyper-V it has the minimal set.
};

/// `cpuid` with Hyper-V's leaves in the place of its own at 0x40000000, and the hypervisor bit. `time`: what the guest
/// has from us. invalid_options as add_to_hv_cpuid.
[[nodiscard]] HypervResult<ShownCpuid> compose_cpuid(std::vector<CpuidEntry> cpuid, const HypervCpuid& hyperv,
                                                     const HvOptions& options, const HvTimeSource& time);

} // namespace cppvmm
