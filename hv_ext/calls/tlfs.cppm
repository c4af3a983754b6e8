module;
#include <array>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <optional>
export module cppvmm.hv_calls:tlfs;
import cppvmm.guest_memory;

// Names and numbers of the Hyper-V Top-Level Functional Specification (TLFS); each block names its page.

namespace cppvmm {

/// Call codes (TLFS "HvExtCallQueryCapabilities", "HvExtCallGetBootZeroedMemory", "HvExtCallMemoryHeatHint").
export enum class HvCallCode : std::uint16_t {
  ext_query_capabilities = 0x8001,
  ext_get_boot_zeroed_memory = 0x8002,
  ext_memory_heat_hint = 0x8003,
};

/// First and last call code of the extended hypercalls: the range that KVM forwards to user space
/// (Linux arch/x86/kvm/hyperv.c, HV_EXT_CALL_QUERY_CAPABILITIES to HV_EXT_CALL_MAX).
export inline constexpr std::uint16_t hv_ext_call_first = 0x8001;
export inline constexpr std::uint16_t hv_ext_call_last = 0x8041;

/// Hypercall status codes (TLFS "Hypercall Status Codes").
export enum class HvStatus : std::uint16_t {
  success = 0x0000,
  invalid_hypercall_code = 0x0002,  ///< The call code is not recognized.
  invalid_hypercall_input = 0x0003, ///< A wrong rep count or start, or a reserved bit that is set.
  invalid_alignment = 0x0004,       ///< A GPA that is misaligned, spans pages or lies outside the guest-physical space.
  invalid_parameter = 0x0005,
  access_denied = 0x0006,
  operation_denied = 0x0008,
  insufficient_memory = 0x000B,
};

/// Bits of what HvExtCallQueryCapabilities returns (TLFS "HvExtCallQueryCapabilities").
export enum class HvExtCapability : std::uint64_t {
  get_boot_zeroed_memory = std::uint64_t{1} << 0,
  memory_heat_hint = std::uint64_t{1} << 1,
  epf_setup = std::uint64_t{1} << 2,
  scheduler_assist_setup = std::uint64_t{1} << 3,
  memory_heat_hint_async = std::uint64_t{1} << 4,
  /// What Linux's balloon tests for cold-discard support (include/hyperv, HV_EXT_CAPABILITY_MEMORY_COLD_DISCARD_HINT).
  memory_cold_discard_hint = std::uint64_t{1} << 8,
};

/// The 64-bit hypercall input value, split into its fields (TLFS "Hypercall Inputs").
export struct HvControl {
  std::uint64_t value = 0;

  [[nodiscard]] constexpr std::uint16_t call_code() const { return static_cast<std::uint16_t>(value); }
  [[nodiscard]] constexpr bool is_fast() const { return (value >> 16 & 1) != 0; }
  /// In units of 8 bytes.
  [[nodiscard]] constexpr std::uint16_t variable_header_size() const {
    return static_cast<std::uint16_t>(value >> 17 & 0x3FF);
  }
  [[nodiscard]] constexpr bool is_nested() const { return (value >> 31 & 1) != 0; }
  [[nodiscard]] constexpr std::uint16_t rep_count() const { return static_cast<std::uint16_t>(value >> 32 & 0xFFF); }
  [[nodiscard]] constexpr std::uint16_t rep_start() const { return static_cast<std::uint16_t>(value >> 48 & 0xFFF); }
  /// Whether a bit of 30:27, 47:44 or 63:60 is set.
  [[nodiscard]] constexpr bool has_reserved_bits() const { return (value & reserved_mask) != 0; }
  /// The same call from that element of its list on; below 4096.
  [[nodiscard]] constexpr HvControl with_rep_start(std::uint16_t start) const {
    return {(value & ~(std::uint64_t{0xFFF} << 48)) | std::uint64_t{start} << 48};
  }

  static constexpr std::uint64_t reserved_mask = 0xF000'F000'7800'0000;
};

/// The 64-bit hypercall result value: the status in bits 15:0, repetitions completed in bits 43:32
/// (TLFS "Hypercall Outputs").
export [[nodiscard]] constexpr std::uint64_t hv_result(HvStatus status, std::uint16_t reps_completed = 0) {
  return static_cast<std::uint64_t>(status) | static_cast<std::uint64_t>(reps_completed & 0xFFF) << 32;
}

/// Input and output parameters are aligned to this and do not cross a page (TLFS "Alignment Requirements").
export inline constexpr std::uint64_t hv_parameter_alignment = 8;

/// HvExtCallGetBootZeroedMemory's output: a u64 count, then pairs of first page number and page count
/// (TLFS "HvExtCallGetBootZeroedMemory").
export inline constexpr std::size_t hv_boot_zeroed_max_ranges = 255;
export inline constexpr std::size_t hv_boot_zeroed_output_bytes = 0xFF8;
/// HvExtCallMemoryHeatHint's input: a u64 with the heat in bits 1:0 and nothing else, then as many HvGpaPageRange as
/// the rep count says (Linux include/hyperv/hvgdk_ext.h, struct hv_memory_hint).
export inline constexpr std::size_t hv_memory_heat_hint_input_bytes = 8;
export inline constexpr std::size_t hv_memory_heat_hint_max_ranges = 511;

/// What the guest says of its pages (HV_EXTMEM_HEAT_HINT_*).
export enum class HvMemoryHeat : std::uint8_t {
  cold = 0,         ///< It will not need them soon.
  hot = 1,          ///< It will.
  cold_discard = 2, ///< Nor does it need what they hold.
};

/// A range of pages in a list (Linux include/hyperv/hvgdk_mini.h, union hv_gpa_page_range): in bits 10:0 how many pages
/// follow the first, in bit 11 whether they are large. Small ones: the first page's number in bits 63:12. Large ones:
/// bit 12 says that they are of 1 GiB and not of 2 MiB, bits 20:13 are 0, and bits 63:21 are those of the first one's
/// address.
export struct HvGpaPageRange {
  std::uint64_t value = 0;

  [[nodiscard]] constexpr std::uint64_t count() const { return (value & 0x7FF) + 1; }
  [[nodiscard]] constexpr bool is_large() const { return (value >> 11 & 1) != 0; }
  [[nodiscard]] constexpr std::uint64_t page_bytes() const {
    constexpr std::uint64_t large[] = {std::uint64_t{2} << 20, std::uint64_t{1} << 30};
    return is_large() ? large[value >> 12 & 1] : page_size;
  }
  /// Its 4 KiB pages; nothing where a reserved bit is set, a large page is misaligned, or it leaves the guest-physical
  /// space.
  [[nodiscard]] constexpr std::optional<PageRange> pages() const {
    const std::uint64_t reserved = is_large() ? 0xFF << 13 : 0;
    const GuestAddress first(value & ~(is_large() ? std::uint64_t{0x1F'FFFF} : std::uint64_t{0xFFF}));
    if ((value & reserved) != 0 || !first.is_aligned(page_bytes())) return std::nullopt;
    const auto pages = PageRange::make(first.page(), count() * (page_bytes() / page_size));
    return pages ? std::optional(*pages) : std::nullopt;
  }
};

/// HvExtCallQueryCapabilities' output: one u64.
export inline constexpr std::size_t hv_query_capabilities_output_bytes = 8;

/// Synthetic MSRs (TLFS "Virtual MSRs").
export inline constexpr std::uint32_t hv_msr_guest_os_id = 0x4000'0000;
export inline constexpr std::uint32_t hv_msr_hypercall = 0x4000'0001;
export inline constexpr std::uint32_t hv_msr_vp_index = 0x4000'0002;
export inline constexpr std::uint32_t hv_msr_time_ref_count = 0x4000'0020;
export inline constexpr std::uint32_t hv_msr_reference_tsc = 0x4000'0021;
export inline constexpr std::uint32_t hv_msr_tsc_frequency = 0x4000'0022;
export inline constexpr std::uint32_t hv_msr_apic_frequency = 0x4000'0023;

/// HYPERCALL's bit 0: the page is there (TLFS "Establishing the Hypercall Interface").
export inline constexpr std::uint64_t hv_hypercall_enabled = 1;
/// REFERENCE_TSC's bit 0: the same (TLFS "Partition Reference TSC Mechanism").
export inline constexpr std::uint64_t hv_reference_tsc_enabled = 1;

/// CPUID leaves (TLFS "Hypervisor CPUID Leaves").
export inline constexpr std::uint32_t hv_cpuid_vendor = 0x4000'0000;
export inline constexpr std::uint32_t hv_cpuid_interface = 0x4000'0001;
export inline constexpr std::uint32_t hv_cpuid_version = 0x4000'0002;
export inline constexpr std::uint32_t hv_cpuid_features = 0x4000'0003;
export inline constexpr std::uint32_t hv_cpuid_recommendations = 0x4000'0004;
export inline constexpr std::uint32_t hv_cpuid_limits = 0x4000'0005;
export inline constexpr std::uint32_t hv_cpuid_hardware = 0x4000'0006;

/// Leaf 0x40000000, EBX, ECX and EDX: "Microsoft Hv". Leaf 0x40000001, EAX: "Hv#1".
export inline constexpr std::array<std::uint32_t, 3> hv_vendor_microsoft = {0x7263'694D, 0x666F'736F, 0x7648'2074};
export inline constexpr std::uint32_t hv_interface_hv1 = 0x3123'7648;

/// Leaf 0x40000003, EAX: the MSRs that a guest may use.
export inline constexpr std::uint32_t hv_feature_eax_time_ref_count = 1U << 1;
export inline constexpr std::uint32_t hv_feature_eax_synic_msrs = 1U << 2;
export inline constexpr std::uint32_t hv_feature_eax_synthetic_timer_msrs = 1U << 3;
export inline constexpr std::uint32_t hv_feature_eax_apic_msrs = 1U << 4;
export inline constexpr std::uint32_t hv_feature_eax_hypercall_msrs = 1U << 5; ///< GUEST_OS_ID and HYPERCALL.
export inline constexpr std::uint32_t hv_feature_eax_vp_index_msr = 1U << 6;
export inline constexpr std::uint32_t hv_feature_eax_reference_tsc = 1U << 9;
export inline constexpr std::uint32_t hv_feature_eax_frequency_msrs = 1U << 11; ///< TSC's and the local APIC's.
/// EBX: the hypercalls that it may make.
export inline constexpr std::uint32_t hv_feature_ebx_create_partitions = 1U << 0;
export inline constexpr std::uint32_t hv_feature_ebx_post_messages = 1U << 4;
export inline constexpr std::uint32_t hv_feature_ebx_signal_events = 1U << 5;
export inline constexpr std::uint32_t hv_feature_ebx_debugging = 1U << 11;
export inline constexpr std::uint32_t hv_feature_ebx_cpu_management = 1U << 12;
export inline constexpr std::uint32_t hv_feature_ebx_extended_hypercalls = 1U << 20;
/// EDX: what else there is.
export inline constexpr std::uint32_t hv_feature_edx_guest_debugging = 1U << 1;
export inline constexpr std::uint32_t hv_feature_edx_frequency_msrs = 1U << 8;
export inline constexpr std::uint32_t hv_feature_edx_debug_msrs = 1U << 11;
export inline constexpr std::uint32_t hv_feature_edx_direct_synthetic_timers = 1U << 19;
/// Leaf 0x40000004, EAX: what a guest had better do.
export inline constexpr std::uint32_t hv_hint_eax_apic_msrs = 1U << 3;
export inline constexpr std::uint32_t hv_hint_eax_cluster_ipi = 1U << 10;
export inline constexpr std::uint32_t hv_hint_eax_enlightened_vmcs = 1U << 14;

} // namespace cppvmm
