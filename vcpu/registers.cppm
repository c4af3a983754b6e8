module;
#include <array>
#include <cstdint>
export module cppvmm.vcpu:registers;

namespace cppvmm {

/// General-purpose registers, instruction pointer and flags.
export struct Registers {
  std::uint64_t rax = 0, rbx = 0, rcx = 0, rdx = 0;
  std::uint64_t rsi = 0, rdi = 0, rsp = 0, rbp = 0;
  std::uint64_t r8 = 0, r9 = 0, r10 = 0, r11 = 0;
  std::uint64_t r12 = 0, r13 = 0, r14 = 0, r15 = 0;
  std::uint64_t rip = 0;
  std::uint64_t rflags = 2; ///< Bit 1 is always set (Intel SDM vol. 1, 3.4.3).

  friend bool operator==(const Registers&, const Registers&) = default;
};

/// A segment register with its hidden part (Intel SDM vol. 3, 3.4.5).
export struct Segment {
  std::uint64_t base = 0;
  std::uint32_t limit = 0; ///< In bytes, whatever `granularity` says.
  std::uint16_t selector = 0;
  std::uint8_t type = 0; ///< The descriptor's four type bits.
  std::uint8_t dpl = 0;  ///< 0 to 3; of SS: the CPL.
  bool present = false;
  bool db = false;          ///< Default operand size 32 bits.
  bool non_system = false;  ///< The S bit: code or data.
  bool long_mode = false;   ///< The L bit: 64-bit code.
  bool granularity = false; ///< The G bit: limit in 4 KiB units in the descriptor.
  bool available = false;   ///< The AVL bit.
  bool unusable = false;    ///< No segment is loaded.

  friend bool operator==(const Segment&, const Segment&) = default;
};

/// GDTR or IDTR.
export struct DescriptorTable {
  std::uint64_t base = 0;
  std::uint16_t limit = 0;

  friend bool operator==(const DescriptorTable&, const DescriptorTable&) = default;
};

/// Segments, control registers and what else KVM_GET_SREGS gives.
export struct SpecialRegisters {
  Segment cs, ds, es, fs, gs, ss, tr, ldt;
  DescriptorTable gdt, idt;
  std::uint64_t cr0 = 0, cr2 = 0, cr3 = 0, cr4 = 0, cr8 = 0;
  std::uint64_t efer = 0;
  std::uint64_t apic_base = 0;
  /// At most one bit: an external interrupt that is accepted and not yet delivered.
  std::array<std::uint64_t, 4> interrupt_bitmap{};

  friend bool operator==(const SpecialRegisters&, const SpecialRegisters&) = default;
};

/// Control register and EFER bits that a VMM sets to start a vCPU in its mode (Intel SDM vol. 3, 2.2.1 and 2.5).
export inline constexpr std::uint64_t cr0_pe = 1U << 0;
export inline constexpr std::uint64_t cr0_mp = 1U << 1;
export inline constexpr std::uint64_t cr0_et = 1U << 4;
export inline constexpr std::uint64_t cr0_ne = 1U << 5;
export inline constexpr std::uint64_t cr0_wp = 1U << 16;
export inline constexpr std::uint64_t cr0_pg = 1U << 31;
export inline constexpr std::uint64_t cr4_pse = 1U << 4;
export inline constexpr std::uint64_t cr4_pae = 1U << 5;
export inline constexpr std::uint64_t cr4_osfxsr = 1U << 9;
export inline constexpr std::uint64_t cr4_osxmmexcpt = 1U << 10;
export inline constexpr std::uint64_t efer_sce = 1U << 0;
export inline constexpr std::uint64_t efer_lme = 1U << 8;
export inline constexpr std::uint64_t efer_lma = 1U << 10;
export inline constexpr std::uint64_t efer_nx = 1U << 11;

/// Flat segments for a vCPU that starts in long mode or protected mode; `dpl` 0 to 3, the selector's RPL included.
export [[nodiscard]] Segment code64_segment(std::uint16_t selector, std::uint8_t dpl = 0);
export [[nodiscard]] Segment code32_segment(std::uint16_t selector, std::uint8_t dpl = 0);
export [[nodiscard]] Segment data_segment(std::uint16_t selector, std::uint8_t dpl = 0);

/// A model-specific register and its value.
export struct MsrEntry {
  std::uint32_t index = 0;
  std::uint64_t value = 0;

  friend bool operator==(const MsrEntry&, const MsrEntry&) = default;
};

/// Exception vectors (Intel SDM vol. 3, 6.3.1).
export enum class ExceptionVector : std::uint8_t {
  divide_error = 0,
  debug = 1,
  breakpoint = 3,
  invalid_opcode = 6,
  double_fault = 8,
  general_protection = 13,
  page_fault = 14,
};

/// Whether a vCPU runs when asked to (KVM_GET_MP_STATE). Only VMs with KVM's own interrupt controller know others than
/// `runnable`.
export enum class MpState : std::uint32_t {
  runnable = 0,
  uninitialized = 1, ///< Waits for INIT.
  init_received = 2, ///< Waits for SIPI.
  halted = 3,
  sipi_received = 4,
};

} // namespace cppvmm
