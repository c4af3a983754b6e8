module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <expected>
#include <vector>
module cppvmm.hv_calls:cpuid.impl;
import :cpuid;
import :error;
import :extended_hypercalls;
import :reference_time;
import :tlfs;

namespace cppvmm {

std::array<HvCpuidLeaf, 7> hv_cpuid_leaves(const HvOptions& options, const HvTimeSource& time) {
  const bool has_frequencies = time.tsc_hz != 0 && time.apic_hz != 0;
  // Linux goes by the vendor, Windows by the interface. Leaf 4's EBX says how often a spinlock is tried before the
  // hypervisor is told: never.
  return {{
      {.function = hv_cpuid_vendor,
       .eax = hv_cpuid_hardware,
       .ebx = hv_vendor_microsoft[0],
       .ecx = hv_vendor_microsoft[1],
       .edx = hv_vendor_microsoft[2]},
      {.function = hv_cpuid_interface, .eax = hv_interface_hv1},
      {.function = hv_cpuid_version},
      {.function = hv_cpuid_features,
       .eax = hv_feature_eax_hypercall_msrs | hv_feature_eax_vp_index_msr |
              (time.tsc_hz != 0 ? hv_feature_eax_time_ref_count | hv_feature_eax_reference_tsc : 0) |
              (has_frequencies ? hv_feature_eax_frequency_msrs : 0),
       .ebx = options.extended_hypercalls ? hv_feature_ebx_extended_hypercalls : 0,
       .edx = has_frequencies ? hv_feature_edx_frequency_msrs : 0},
      {.function = hv_cpuid_recommendations, .ebx = 0xFFFF'FFFF},
      {.function = hv_cpuid_limits},
      {.function = hv_cpuid_hardware},
  }};
}

static std::unexpected<HvError> contradiction(const char* what, std::uint32_t leaf) {
  return std::unexpected(HvError{.code = HvErrc::invalid_cpuid, .operation = what, .value = leaf});
}

HvResult<std::vector<HvCpuidLeaf>> add_to_hv_cpuid(std::vector<HvCpuidLeaf> leaves, const HvOptions& options) {
  const auto find = [&](std::uint32_t function) { return std::ranges::find(leaves, function, &HvCpuidLeaf::function); };
  if (const auto interface = find(hv_cpuid_interface); interface == leaves.end() || interface->eax != hv_interface_hv1)
    return contradiction("leaves of no Hyper-V: their interface is not Hv#1", hv_cpuid_interface);
  const auto vendor = find(hv_cpuid_vendor);
  if (vendor == leaves.end() || std::array{vendor->ebx, vendor->ecx, vendor->edx} != hv_vendor_microsoft)
    return contradiction("leaves of no Hyper-V: their vendor is not Microsoft Hv", hv_cpuid_vendor);
  if (vendor->eax < hv_cpuid_limits) return contradiction("Hyper-V leaves that end before the limits", hv_cpuid_vendor);
  const auto features = find(hv_cpuid_features);
  if (features == leaves.end()) return contradiction("Hyper-V leaves without the features", hv_cpuid_features);
  constexpr std::uint32_t needed = hv_feature_eax_hypercall_msrs | hv_feature_eax_vp_index_msr;
  if ((features->eax & needed) != needed)
    return contradiction("Hyper-V leaves without the hypercall or VP_INDEX MSRs", hv_cpuid_features);
  constexpr std::uint32_t root = hv_feature_ebx_create_partitions | hv_feature_ebx_cpu_management;
  if ((features->ebx & root) == root) return contradiction("Hyper-V leaves of a root partition", hv_cpuid_features);
  if (options.extended_hypercalls) features->ebx |= hv_feature_ebx_extended_hypercalls;
  return leaves;
}

} // namespace cppvmm
