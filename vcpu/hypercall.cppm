module;
#include <array>
#include <cstddef>
#include <cstdint>
export module cppvmm.vcpu:hypercall;
import :capabilities;
import :error;

namespace cppvmm {

/// How a guest's Hyper-V hypercall comes to user space.
export enum class HypercallTransport : std::uint8_t {
  kernel, ///< KVM owns the Hyper-V MSRs and the hypercall page, and forwards 0x8001 to 0x8041 (KVM_EXIT_HYPERV_HCALL).
  user,   ///< The VMM owns both, through an MSR filter; the page traps by port I/O. For any kernel since 5.10.
};

/// The transport that this KVM offers: `kernel` where it forwards extended hypercalls, else `user`; unsupported where
/// it has neither (no MSR filter, or no MSR exits to user space).
export [[nodiscard]] KvmResult<HypercallTransport> choose_hypercall_transport(const Capabilities& capabilities);

/// A hypercall that waits for its result: Vcpu::complete_hypercall or Vcpu::refuse_hypercall.
export struct Hypercall {
  std::uint64_t control = 0; ///< The hypercall input value: RCX, or EDX:EAX from 32-bit code (TLFS "Hypercall Inputs").
  std::uint64_t input = 0;   ///< GPA of the input parameters: RDX, or EBX:ECX.
  std::uint64_t output = 0;  ///< GPA of the output parameters: R8, or EDI:ESI.
  /// The privilege level of the caller: anything but 0 is to be refused (TLFS: "protected mode with a current privilege
  /// level of zero"). Real mode, where no hypercalls exist either, counts as 3. `kernel`: always 0, KVM has refused
  /// others itself.
  std::uint8_t cpl = 0;
  bool long_mode =
      false; ///< Called from 64-bit code. `kernel`: always true, KVM does not say and the values are whole.
  HypercallTransport transport{};

  friend bool operator==(const Hypercall&, const Hypercall&) = default;
};

/// The port that the `user` transport's hypercall page writes to, unless the embedder chooses another one. Nothing on
/// a PC answers there.
export inline constexpr std::uint8_t user_hypercall_port = 0xE4;

/// Not usable: KVM advances RIP at the exit of an OUT to this port (KVM_X86_QUIRK_OUT_7E_INC_RIP).
export inline constexpr std::uint8_t unusable_hypercall_port = 0x7E;

/// What the `user` transport's hypercall page begins with: `out port, al; ret`, the same in 32-bit and 64-bit code. It
/// changes no register and no flag.
export [[nodiscard]] constexpr std::array<std::byte, 3> user_hypercall_code(std::uint8_t port = user_hypercall_port) {
  return {std::byte{0xE6}, std::byte{port}, std::byte{0xC3}};
}

/// The synthetic MSRs that the VMM owns in the `user` transport: 0x40000000 to 0x400001FF, which holds every one that
/// the TLFS names.
export inline constexpr std::uint32_t hyperv_msr_first = 0x4000'0000;
export inline constexpr std::uint32_t hyperv_msr_count = 0x200;

} // namespace cppvmm
