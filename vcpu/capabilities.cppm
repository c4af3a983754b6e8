module;
#include <cstddef>
#include <cstdint>
export module cppvmm.vcpu:capabilities;

namespace cppvmm {

/// Bits of Capabilities::user_space_msr_reasons and Vm::enable_user_space_msrs: which MSR accesses KVM hands to user
/// space (Linux Documentation/virt/kvm/api.rst, KVM_CAP_X86_USER_SPACE_MSR).
export inline constexpr std::uint32_t msr_reason_invalid = 1U << 0; ///< KVM knows the MSR and refuses the access.
export inline constexpr std::uint32_t msr_reason_unknown = 1U << 1; ///< KVM does not know the MSR.
export inline constexpr std::uint32_t msr_reason_filter = 1U << 2;  ///< The MSR filter denies the access.

/// Bits of Capabilities::sync_registers: what KVM keeps in the shared kvm_run page (api.rst, KVM_CAP_SYNC_REGS).
export inline constexpr std::uint32_t sync_general_registers = 1U << 0;
export inline constexpr std::uint32_t sync_special_registers = 1U << 1;
export inline constexpr std::uint32_t sync_events = 1U << 2;

/// What one /dev/kvm offers, probed once when it is opened. Zero and false mean "not offered".
export struct Capabilities {
  std::size_t vcpu_mmap_bytes = 0;          ///< KVM_GET_VCPU_MMAP_SIZE: kvm_run and what follows it.
  unsigned memory_slots = 0;                ///< KVM_CAP_NR_MEMSLOTS.
  unsigned recommended_vcpus = 0;           ///< KVM_CAP_NR_VCPUS.
  unsigned max_vcpus = 0;                   ///< KVM_CAP_MAX_VCPUS.
  bool user_memory = false;                 ///< KVM_CAP_USER_MEMORY.
  bool read_only_memory = false;            ///< KVM_CAP_READONLY_MEM.
  bool manual_dirty_log = false;            ///< KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
  bool immediate_exit = false;              ///< KVM_CAP_IMMEDIATE_EXIT; stopping a vCPU needs it.
  bool interrupt_controller = false;        ///< KVM_CAP_IRQCHIP.
  bool interval_timer = false;              ///< KVM_CAP_PIT2.
  bool system_event_data = false;           ///< KVM_CAP_SYSTEM_EVENT_DATA.
  std::uint32_t sync_registers = 0;         ///< KVM_CAP_SYNC_REGS: sync_* bits.
  std::uint32_t user_space_msr_reasons = 0; ///< KVM_CAP_X86_USER_SPACE_MSR: msr_reason_* bits.
  bool msr_filter = false;                  ///< KVM_CAP_X86_MSR_FILTER.
  std::size_t xsave_bytes = 0;              ///< KVM_CAP_XSAVE2 (Linux 5.17), as at the VM's first vCPU.
  std::size_t nested_state_bytes = 0;       ///< KVM_CAP_NESTED_STATE: the most that Vcpu::nested_state gives; 0: none.
  bool hyperv = false;                      ///< KVM_CAP_HYPERV: KVM has a Hyper-V face of its own.
  bool hyperv_cpuid = false;                ///< KVM_CAP_HYPERV_CPUID, for a vCPU.
  bool system_hyperv_cpuid = false;         ///< KVM_CAP_SYS_HYPERV_CPUID, for /dev/kvm itself.
  bool hyperv_enforce_cpuid = false;        ///< KVM_CAP_HYPERV_ENFORCE_CPUID.
  bool hyperv_synic = false;                ///< KVM_CAP_HYPERV_SYNIC2.
  /// KVM hands the hypercalls 0x8001 to 0x8041 to user space: bit 20 of 0x40000003.EBX in KVM_GET_SUPPORTED_HV_CPUID
  /// (Linux 6.3 and later, built with CONFIG_KVM_HYPERV).
  bool forwards_extended_hypercalls = false;
};

} // namespace cppvmm
