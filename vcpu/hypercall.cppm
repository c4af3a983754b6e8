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
  split,  ///< KVM owns Hyper-V but for GUEST_OS_ID and HYPERCALL, which the VMM takes by an MSR filter: its page traps
          ///< extended calls by port I/O, and leaves every other call to KVM. For KVMs that forward none.
  user,   ///< The VMM owns all, through an MSR filter; the page traps by port I/O. For any kernel since 5.10.
};

/// "kernel", "split" or "user".
export [[nodiscard]] const char* to_string(HypercallTransport transport);

/// The transport that this KVM offers: `kernel` where it forwards extended hypercalls, `split` where it has Hyper-V
/// without, else `user`; unsupported where it has none of them (no MSR filter, or no MSR exits to user space).
export [[nodiscard]] KvmResult<HypercallTransport> choose_hypercall_transport(const Capabilities& capabilities);

/// A hypercall that waits for its answer: Vcpu::complete_hypercall, continue_hypercall or refuse_hypercall.
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
  HypercallTransport transport{}; ///< `kernel` from KVM; `user` by the port, with `split` too.

  friend bool operator==(const Hypercall&, const Hypercall&) = default;
};

/// The port that the hypercall page of `user` and `split` writes to, unless the embedder chooses another one. Nothing
/// on a PC answers there.
export inline constexpr std::uint8_t user_hypercall_port = 0xE4;

/// Not usable: KVM advances RIP at the exit of an OUT to this port (KVM_X86_QUIRK_OUT_7E_INC_RIP).
export inline constexpr std::uint8_t unusable_hypercall_port = 0x7E;

/// What the `user` transport's hypercall page begins with: `out port, al; ret`, the same in 32-bit and 64-bit code. It
/// changes no register and no flag.
export [[nodiscard]] constexpr std::array<std::byte, 3> user_hypercall_code(std::uint8_t port = user_hypercall_port) {
  return {std::byte{0xE6}, std::byte{port}, std::byte{0xC3}};
}

/// The instruction by which a guest calls KVM. KVM takes the other one too, but writes this one in its place, into the
/// guest's memory (arch/x86/kvm/x86.c, emulator_fix_hypercall).
export enum class HypercallInstruction : std::uint8_t {
  vmcall,  ///< Intel's.
  vmmcall, ///< AMD's and Hygon's.
};

/// That of this machine's processor (CPUID leaf 0).
export [[nodiscard]] HypercallInstruction hypercall_instruction();

/// What the `split` transport's hypercall page begins with. Extended calls (0x8001 to 0x8041) go to the port, all
/// others to KVM. The same in 32-bit and 64-bit code; but for what the call itself does, it changes no register and no
/// flag. It uses 16 bytes of the caller's stack.
export [[nodiscard]] constexpr std::array<std::byte, 50> split_hypercall_code(HypercallInstruction instruction,
                                                                              std::uint8_t port = user_hypercall_port) {
  constexpr auto bytes = [](auto... values) { return std::array{static_cast<std::byte>(values)...}; };
  const int last = instruction == HypercallInstruction::vmcall ? 0xC1 : 0xD9;
  return bytes(0xF3, 0x0F, 0x1E, 0xFA,       // endbr64: Linux has no IBT with a page that lacks it
               0x9C,                         // pushf
               0x50,                         // push rax
               0x48, 0x3B, 0x04, 0x24,       // cmp rax, [rsp]; in 32-bit code: dec eax; cmp eax, [esp]
               0x58,                         // pop rax
               0x75, 0x17,                   // jne code32
               0x66, 0x81, 0xF9, 0x01, 0x80, // cmp cx, 0x8001
               0x72, 0x0B,                   // jb kvm
               0x66, 0x81, 0xF9, 0x41, 0x80, // cmp cx, 0x8041
               0x77, 0x04,                   // ja kvm
               0x9D, 0xE6, port, 0xC3,       // ours: popf; out port, al; ret
               0x9D, 0x0F, 0x01, last, 0xC3, // kvm: popf; vmcall or vmmcall; ret
               0x66, 0x3D, 0x01, 0x80,       // code32: cmp ax, 0x8001
               0x72, 0xF5,                   // jb kvm
               0x66, 0x3D, 0x41, 0x80,       // cmp ax, 0x8041
               0x77, 0xEF,                   // ja kvm
               0xEB, 0xE9);                  // jmp ours
}

/// The synthetic MSRs that the VMM owns in the `user` transport: 0x40000000 to 0x400001FF, which holds every one that
/// the TLFS names. In `split`: the first two of them.
export inline constexpr std::uint32_t hyperv_msr_first = 0x4000'0000;
export inline constexpr std::uint32_t hyperv_msr_count = 0x200;
export inline constexpr std::uint32_t split_msr_count = 2;

} // namespace cppvmm
