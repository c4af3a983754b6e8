module;
#include <vector>
export module cppvmm.hv_ext:synthetic_msrs;
import :error;
import cppvmm.vcpu;

namespace cppvmm {

/// What a saved state has of Hyper-V's MSRs beside HvState, where KVM has them (transports `kernel` and `split`): those
/// of the vCPU (VP_INDEX, VP_RUNTIME, VP_ASSIST_PAGE; SynIC and timers after Vcpu::enable_hyperv_synic) and of its VM
/// (REFERENCE_TSC, CRASH_P0 to P4 and others), as far as this KVM has them, in the order in which Vcpu::set_msrs puts
/// them back. That comes after Vcpu::enable_hyperv_synic, if the vCPU had it, and after Vm::set_clock. Kvm::msr_indices
/// names some of them, and not all: leave out 0x40000000 to 0x400001FF there. kvm when KVM refuses.
export [[nodiscard]] HypervResult<std::vector<MsrEntry>> synthetic_msrs(const Vcpu& vcpu);

/// Sets them as they are at power-on; VP_INDEX and VP_RUNTIME stay.
[[nodiscard]] HypervResult<void> reset_synthetic_msrs(Vcpu& vcpu);

} // namespace cppvmm
