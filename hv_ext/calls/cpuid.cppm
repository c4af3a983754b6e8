module;
#include <array>
#include <cstdint>
#include <vector>
export module cppvmm.hv_calls:cpuid;
import :error;
import :extended_hypercalls;
import :reference_time;
import :tlfs;

namespace cppvmm {

/// A CPUID leaf for the guest, subleaf 0.
export struct HvCpuidLeaf {
  std::uint32_t function = 0;
  std::uint32_t eax = 0;
  std::uint32_t ebx = 0;
  std::uint32_t ecx = 0;
  std::uint32_t edx = 0;
  friend bool operator==(const HvCpuidLeaf&, const HvCpuidLeaf&) = default;
};

/// The least that a guest needs, for a VMM that shows no Hyper-V of its own. Leaves 0x40000000 to 0x40000006: "Hv#1"
/// with the hypercall and VP_INDEX MSRs, extended hypercalls if offered, and the time that HypervInterface::set_time
/// was given, if any (TLFS "Hypervisor CPUID Leaves"). They replace whatever the vCPU had in 0x40000000..0x400000FF;
/// the guest also needs CPUID 1.ECX[31].
export [[nodiscard]] std::array<HvCpuidLeaf, 7> hv_cpuid_leaves(const HvOptions& options,
                                                                const HvTimeSource& time = {});

/// Adds to the Hyper-V leaves that a VMM shows already what the options need: extended hypercalls, if offered
/// (0x40000003.EBX bit 20). All else stays as it is.
///
/// invalid_cpuid when the leaves contradict it (HvError::value is the leaf): 0x40000001 is not there or not "Hv#1", by
/// which Windows knows Hyper-V; 0x40000000 is not there, its vendor is not "Microsoft Hv", by which Linux does (KVM
/// says "Linux KVM Hv"), or its highest leaf lies before 0x40000005, which Linux wants; 0x40000003 is not there or
/// lacks the hypercall MSRs (EAX bit 5) or VP_INDEX (bit 6), without which Linux does not take them; or it grants
/// CreatePartitions and CpuManagement (EBX bits 0 and 12) together, by which Linux takes itself for a root partition
/// (arch/x86/kernel/cpu/mshyperv.c, ms_hyperv_init_platform).
export [[nodiscard]] HvResult<std::vector<HvCpuidLeaf>> add_to_hv_cpuid(std::vector<HvCpuidLeaf> leaves,
                                                                        const HvOptions& options);

} // namespace cppvmm
