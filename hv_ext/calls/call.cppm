module;
#include <cstdint>
#include <expected>
export module cppvmm.hv_calls:call;
import cppvmm.guest_memory;

namespace cppvmm {

/// A hypercall as it arrives: all of it may be whatever a guest puts there.
export struct HvCall {
  std::uint64_t control = 0; ///< The hypercall input value (TLFS "Hypercall Inputs"); see HvControl.
  GuestAddress input{0};     ///< Of the input parameters.
  GuestAddress output{0};    ///< Of the output parameters.
  unsigned cpl = 0;          ///< The caller's current privilege level; real mode counts as 3.
  /// Of the vCPU that calls. The trace tells of it, and a call that goes on is known by it: no two vCPUs have the same.
  std::uint32_t vp_index = 0;

  friend bool operator==(const HvCall&, const HvCall&) = default;
};

/// Why a hypercall has no result.
export enum class HvNoResult : std::uint8_t {
  undefined_opcode, ///< Not called from CPL 0: inject #UD (TLFS "Hypercall Restrictions").
  not_ours,         ///< Nothing was done: the call is the VMM's own to answer.
};

/// The hypercall result value (TLFS "Hypercall Outputs"), or why there is none.
export using HypercallResult = std::expected<std::uint64_t, HvNoResult>;

/// What became of a hypercall in the time that the guest may be kept from its interrupts.
export struct HvCallStep {
  bool is_done = true;
  /// The hypercall result value; or, where it is not done, the control word to go on with: the guest makes the call
  /// again, with RIP on the instruction that called still (TLFS "Hypercall Continuation").
  std::uint64_t value = 0;

  friend bool operator==(const HvCallStep&, const HvCallStep&) = default;
};

/// A step, or why there is none.
export using HvCallProgress = std::expected<HvCallStep, HvNoResult>;

/// The general registers that a hypercall uses.
export struct HvCallRegisters {
  std::uint64_t rax = 0, rbx = 0, rcx = 0, rdx = 0;
  std::uint64_t rsi = 0, rdi = 0;
  std::uint64_t r8 = 0;

  friend bool operator==(const HvCallRegisters&, const HvCallRegisters&) = default;
};

/// The call that the registers make. From 64-bit code (`long_mode`: EFER.LMA and CS.L) control, input and output are
/// RCX, RDX and R8; else EDX:EAX, EBX:ECX and EDI:ESI (TLFS "Hypercall Inputs").
export [[nodiscard]] HvCall hv_call(const HvCallRegisters& registers, bool long_mode, unsigned cpl);

/// Puts the control word where the call had it: RCX, or EDX:EAX. The other registers stay, and so does RIP.
export void set_hv_control(HvCallRegisters& registers, bool long_mode, std::uint64_t control);

/// Puts the result where the caller expects it: RAX, or EDX:EAX (TLFS "Hypercall Outputs"). The other registers stay.
export void set_hv_result(HvCallRegisters& registers, bool long_mode, std::uint64_t result);

} // namespace cppvmm
