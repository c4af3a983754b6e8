module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <expected>
#include <optional>
#include <ranges>
#include <span>
#include <vector>
module cppvmm.hv_ext:synthetic_msrs.impl;
import :error;
import :synthetic_msrs;
import cppvmm.vcpu;

namespace cppvmm {

/// An MSR, and its value at power-on; nothing where that is the vCPU's own or goes on.
struct SyntheticMsr {
  std::uint32_t index;
  std::optional<std::uint64_t> at_power_on;
};

// TLFS "Virtual MSRs". What no VMM can set is not among them.
constexpr std::array always = {
    SyntheticMsr{0x4000'0002, std::nullopt}, // VP_INDEX
    SyntheticMsr{0x4000'0010, std::nullopt}, // VP_RUNTIME
    SyntheticMsr{0x4000'0021, 0},            // REFERENCE_TSC, of the VM, as from CRASH_P0 on
    SyntheticMsr{0x4000'0073, 0},            // VP_ASSIST_PAGE
    SyntheticMsr{0x4000'0100, 0},            // CRASH_P0 to P4
    SyntheticMsr{0x4000'0101, 0},            //
    SyntheticMsr{0x4000'0102, 0},            //
    SyntheticMsr{0x4000'0103, 0},            //
    SyntheticMsr{0x4000'0104, 0},            //
    SyntheticMsr{0x4000'0106, 0},            // REENLIGHTENMENT_CONTROL
    SyntheticMsr{0x4000'0107, 0},            // TSC_EMULATION_CONTROL
    SyntheticMsr{0x4000'0108, 0},            // TSC_EMULATION_STATUS
    SyntheticMsr{0x4000'0118, 0},            // TSC_INVARIANT_CONTROL
};
// KVM sets none of them before it has a SynIC, which is enabled at first (arch/x86/kvm/hyperv.c, synic_set_msr and
// kvm_hv_activate_synic).
constexpr std::array synic_pages = {
    SyntheticMsr{0x4000'0080, 1}, // SCONTROL
    SyntheticMsr{0x4000'0082, 0}, // SIEFP
    SyntheticMsr{0x4000'0083, 0}, // SIMP
};
constexpr std::uint32_t first_sint = 0x4000'0090;
constexpr std::uint32_t sints = 16;
constexpr std::uint64_t sint_masked = 1 << 16;
constexpr std::uint32_t first_timer = 0x4000'00B0; // CONFIG and COUNT of each
constexpr std::uint32_t timer_msrs = 8;

/// Those of the vCPU and its VM. Timers last: they send to interrupt sources.
static std::vector<SyntheticMsr> msrs_of(const Vcpu& vcpu) {
  std::vector<SyntheticMsr> msrs(always.begin(), always.end());
  if (!vcpu.has_hyperv_synic()) return msrs;
  msrs.insert(msrs.end(), synic_pages.begin(), synic_pages.end());
  for (std::uint32_t i = 0; i < sints; ++i)
    msrs.push_back({first_sint + i, sint_masked});
  for (std::uint32_t i = 0; i < timer_msrs; ++i)
    msrs.push_back({first_timer + i, 0});
  return msrs;
}

static std::unexpected<HypervError> failed(const char* operation, const KvmError& cause) {
  return std::unexpected(HypervError{.code = HypervErrc::kvm, .operation = operation, .cause = cause});
}

HypervResult<std::vector<MsrEntry>> synthetic_msrs(const Vcpu& vcpu) {
  std::vector<MsrEntry> found;
  for (const SyntheticMsr& entry : msrs_of(vcpu)) {
    const auto value = vcpu.msr(entry.index);
    if (value)
      found.push_back({entry.index, *value});
    else if (value.error().code != KvmErrc::unsupported)
      return failed("read KVM's synthetic MSRs", value.error());
  }
  return found;
}

HypervResult<void> reset_synthetic_msrs(Vcpu& vcpu) {
  const auto now = synthetic_msrs(vcpu);
  if (!now) return std::unexpected(now.error());
  const auto known = msrs_of(vcpu);
  // Timers first, for the same reason.
  for (const MsrEntry& entry : *now | std::views::reverse) {
    const auto wanted = std::ranges::find(known, entry.index, &SyntheticMsr::index)->at_power_on;
    if (!wanted || entry.value == *wanted) continue;
    const MsrEntry reset{entry.index, *wanted};
    if (auto set = vcpu.set_msrs(std::span(&reset, 1)); !set) return failed("reset KVM's synthetic MSRs", set.error());
  }
  return {};
}

} // namespace cppvmm
