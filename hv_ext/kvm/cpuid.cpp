module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <expected>
#include <iterator>
#include <span>
#include <utility>
#include <vector>
module cppvmm.hv_ext:cpuid.impl;
import :cpuid;
import :error;
import cppvmm.hv_calls;
import cppvmm.vcpu;

namespace cppvmm {

HypervResult<std::vector<CpuidEntry>> full_hv_cpuid(const Vcpu& vcpu) {
  auto supported = vcpu.supported_hv_cpuid();
  if (!supported)
    return std::unexpected(HypervError{
        .code = HypervErrc::kvm, .operation = "ask KVM for its Hyper-V CPUID leaves", .cause = supported.error()});
  const CpuidEntry* const all = find_cpuid(*supported, hv_cpuid_features);
  const bool has_apic = all != nullptr && (all->edx & hv_feature_edx_direct_synthetic_timers) != 0;
  std::vector<CpuidEntry> leaves;
  for (CpuidEntry entry : *supported) {
    if (entry.function > hv_cpuid_limits) continue;
    switch (entry.function) {
    case hv_cpuid_vendor:
      entry.eax = hv_cpuid_hardware;
      entry.ebx = hv_vendor_microsoft[0];
      entry.ecx = hv_vendor_microsoft[1];
      entry.edx = hv_vendor_microsoft[2];
      break;
    case hv_cpuid_features:
      entry.ebx &= ~(hv_feature_ebx_debugging | hv_feature_ebx_extended_hypercalls);
      entry.edx &= ~(hv_feature_edx_guest_debugging | hv_feature_edx_debug_msrs);
      if (!has_apic) entry.eax &= ~hv_feature_eax_apic_msrs;
      if (vcpu.has_hyperv_synic()) break;
      entry.eax &= ~(hv_feature_eax_synic_msrs | hv_feature_eax_synthetic_timer_msrs);
      entry.ebx &= ~(hv_feature_ebx_post_messages | hv_feature_ebx_signal_events);
      entry.edx &= ~hv_feature_edx_direct_synthetic_timers;
      break;
    case hv_cpuid_recommendations:
      entry.eax &= ~hv_hint_eax_enlightened_vmcs;
      if (!has_apic) entry.eax &= ~(hv_hint_eax_apic_msrs | hv_hint_eax_cluster_ipi);
      break;
    default:
      break;
    }
    leaves.push_back(entry);
  }
  leaves.push_back({.function = hv_cpuid_hardware});
  return leaves;
}

HvTimeSource user_time(const Vcpu& vcpu) {
  const auto khz = vcpu.tsc_khz();
  if (!khz || !HvTscScale::of(std::uint64_t{*khz} * 1000)) return {};
  constexpr std::uint64_t kvm_apic_hz = 1'000'000'000;
  return {.tsc_hz = std::uint64_t{*khz} * 1000, .apic_hz = vcpu.local_apic() ? kvm_apic_hz : 0};
}

static bool is_hyperv_leaf(const CpuidEntry& entry) { return (entry.function & 0xFFFF'FF00) == hv_cpuid_vendor; }

/// KVM's own leaves among those at 0x40000000, by their signature, moved.
static std::vector<CpuidEntry> moved_kvm_leaves(std::span<const CpuidEntry> cpuid) {
  // "KVMKVMKVM" (arch/x86/include/uapi/asm/kvm_para.h).
  constexpr std::array<std::uint32_t, 3> signature = {0x4B4D'564B, 0x564B'4D56, 0x0000'004D};
  constexpr std::uint32_t distance = 0x100;
  const CpuidEntry* const first = find_cpuid(cpuid, hv_cpuid_vendor);
  std::vector<CpuidEntry> moved;
  if (first == nullptr || std::array{first->ebx, first->ecx, first->edx} != signature) return moved;
  for (CpuidEntry entry : cpuid) {
    if (!is_hyperv_leaf(entry)) continue;
    // The highest leaf; 0 in old KVMs, which means the next one.
    if (entry.function == hv_cpuid_vendor) entry.eax = std::max(entry.eax, hv_cpuid_interface) + distance;
    entry.function += distance;
    moved.push_back(entry);
  }
  return moved;
}

static std::vector<HvCpuidLeaf> hyperv_leaves_of(std::span<const CpuidEntry> entries) {
  std::vector<HvCpuidLeaf> leaves;
  for (const CpuidEntry& entry : entries)
    if (is_hyperv_leaf(entry))
      leaves.push_back(
          {.function = entry.function, .eax = entry.eax, .ebx = entry.ebx, .ecx = entry.ecx, .edx = entry.edx});
  return leaves;
}

HypervResult<ShownCpuid> compose_cpuid(std::vector<CpuidEntry> cpuid, const HypervCpuid& hyperv,
                                       const HvOptions& options, const HvTimeSource& time) {
  constexpr std::uint32_t hypervisor_present = 1U << 31;
  const CpuidEntry* const interface = find_cpuid(cpuid, hv_cpuid_interface);
  const bool has_own = interface != nullptr && interface->eax == hv_interface_hv1;
  ShownCpuid shown{.entries = {}, .is_minimal = hyperv.leaves.empty() && !has_own};
  std::vector<HvCpuidLeaf> leaves;
  if (shown.is_minimal) {
    std::ranges::copy(hv_cpuid_leaves(options, time), std::back_inserter(leaves));
  } else {
    auto added = add_to_hv_cpuid(hyperv_leaves_of(hyperv.leaves.empty() ? cpuid : hyperv.leaves), options);
    if (!added)
      return std::unexpected(HypervError{
          .code = HypervErrc::invalid_options, .operation = "add to the Hyper-V CPUID leaves", .cause = added.error()});
    leaves = std::move(*added);
  }
  std::vector<CpuidEntry> kvm;
  if (hyperv.with_kvm_leaves) kvm = moved_kvm_leaves(cpuid);
  std::erase_if(cpuid, is_hyperv_leaf);
  for (CpuidEntry& entry : cpuid)
    if (entry.function == 1) entry.ecx |= hypervisor_present;
  for (const HvCpuidLeaf& leaf : leaves)
    cpuid.push_back({.function = leaf.function, .eax = leaf.eax, .ebx = leaf.ebx, .ecx = leaf.ecx, .edx = leaf.edx});
  std::ranges::copy(kvm, std::back_inserter(cpuid));
  shown.entries = std::move(cpuid);
  return shown;
}

} // namespace cppvmm
