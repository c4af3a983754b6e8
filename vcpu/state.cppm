module;
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>
export module cppvmm.vcpu:state;

// What KVM keeps of a VM beside registers and MSRs, for snapshots and migration: the bytes of the kernel's structures
// (arch/x86/include/uapi/asm/kvm.h), which are the same in every kernel that has them. They are to be put back, not to
// be looked into.

namespace cppvmm {

/// Exceptions, interrupts and NMIs that wait or are being delivered, and SMM (struct kvm_vcpu_events).
export struct VcpuEvents {
  std::array<std::byte, 64> bytes{};
  friend bool operator==(const VcpuEvents&, const VcpuEvents&) = default;
};

/// DR0 to DR3, DR6 and DR7 (struct kvm_debugregs).
export struct DebugRegisters {
  std::array<std::byte, 128> bytes{};
  friend bool operator==(const DebugRegisters&, const DebugRegisters&) = default;
};

/// XCR0 and its like (struct kvm_xcrs).
export struct ExtendedControlRegisters {
  std::array<std::byte, 392> bytes{};
  friend bool operator==(const ExtendedControlRegisters&, const ExtendedControlRegisters&) = default;
};

/// x87, SSE, AVX and what else XSAVE saves (struct kvm_xsave). 4096 bytes, or as many as KVM_CAP_XSAVE2 says.
export struct Xsave {
  std::vector<std::byte> bytes{};
  friend bool operator==(const Xsave&, const Xsave&) = default;
};

/// What KVM keeps of a vCPU that has guests of its own (struct kvm_nested_state and what follows it): as many bytes as
/// its `size` says.
export struct NestedState {
  std::vector<std::byte> bytes{};
  friend bool operator==(const NestedState&, const NestedState&) = default;
};

/// The registers of KVM's local APIC (struct kvm_lapic_state).
export struct LocalApic {
  std::array<std::byte, 1024> bytes{};
  friend bool operator==(const LocalApic&, const LocalApic&) = default;
};

/// Those of KVM's interrupt controllers that a VM has once, by their numbers for KVM.
export enum class InterruptChip : std::uint32_t { pic_master = 0, pic_slave = 1, io_apic = 2 };

/// The registers of one of them (struct kvm_irqchip), its number included.
export struct InterruptController {
  std::array<std::byte, 520> bytes{};
  friend bool operator==(const InterruptController&, const InterruptController&) = default;
};

/// KVM's interval timer (struct kvm_pit_state2).
export struct IntervalTimer {
  std::array<std::byte, 112> bytes{};
  friend bool operator==(const IntervalTimer&, const IntervalTimer&) = default;
};

/// KVM's clock for guests, which TIME_REF_COUNT of KVM's Hyper-V goes by too (struct kvm_clock_data).
export struct VmClock {
  std::array<std::byte, 48> bytes{};
  friend bool operator==(const VmClock&, const VmClock&) = default;
};

} // namespace cppvmm
