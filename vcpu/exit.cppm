module;
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <variant>
export module cppvmm.vcpu:exit;
import :hypercall;

// Why a vCPU stopped. Every span below points into the vCPU's kvm_run page: it is valid until the next call of run()
// or of an answer (complete_*, continue_*, refuse_*) on the same Vcpu, and while the Vcpu lives.

namespace cppvmm {

/// An exit that has no type here, kept with its number.
export struct UnknownExit {
  std::uint32_t reason = 0;          ///< KVM_EXIT_*.
  std::uint64_t hardware_reason = 0; ///< Of KVM_EXIT_UNKNOWN (reason 0), else 0.
};

/// The guest reads from a port, `count` times `size` bytes. Answer with Vcpu::complete_io_in; unanswered, the guest
/// reads all ones, as from a port where nothing is.
export struct IoIn {
  std::uint16_t port = 0;
  std::uint8_t size = 0;   ///< Bytes of one access: 1, 2 or 4.
  std::uint32_t count = 0; ///< Accesses: more than one for string instructions.
};

/// The guest writes to a port.
export struct IoOut {
  std::uint16_t port = 0;
  std::uint8_t size = 0;             ///< Bytes of one access: 1, 2 or 4.
  std::uint32_t count = 0;           ///< Accesses: more than one for string instructions.
  std::span<const std::byte> data{}; ///< size * count bytes.
};

/// The guest reads where no memory slot is. Answer with Vcpu::complete_mmio_read; unanswered, it reads all ones.
export struct MmioRead {
  std::uint64_t address = 0; ///< Guest-physical.
  std::uint32_t size = 0;    ///< 1 to 8 bytes.
};

/// The guest writes where no memory slot is, or to a read-only one.
export struct MmioWrite {
  std::uint64_t address = 0;         ///< Guest-physical.
  std::span<const std::byte> data{}; ///< 1 to 8 bytes.
};

/// HLT, in a VM without KVM's interrupt controller.
export struct Hlt {};

/// A triple fault, or another event that ends a processor's work.
export struct Shutdown {};

/// The guest asks for something that concerns the whole VM.
export struct SystemEvent {
  std::uint32_t type = 0;                ///< KVM_SYSTEM_EVENT_*: 1 shutdown, 2 reset, 3 crash, ...
  std::span<const std::uint64_t> data{}; ///< What KVM tells about it; at most 16 values.
};

/// The processor refused to enter the guest.
export struct FailEntry {
  std::uint64_t hardware_reason = 0;
  std::uint32_t cpu = 0; ///< The host processor.
};

/// KVM gave up.
export struct InternalError {
  std::uint32_t suberror = 0;            ///< KVM_INTERNAL_ERROR_*: 1 an instruction that KVM could not emulate, ...
  std::span<const std::uint64_t> data{}; ///< At most 16 values.
  /// The instruction that could not be emulated, as far as KVM fetched it; empty when it does not say.
  std::span<const std::byte> instruction{};
};

/// The guest reads an MSR that user space owns. Must be answered: Vcpu::complete_read_msr or Vcpu::refuse_msr (#GP).
export struct ReadMsr {
  std::uint32_t index = 0;
  std::uint32_t reason = 0; ///< One msr_reason_* bit.
};

/// The guest writes an MSR that user space owns. Must be answered: Vcpu::complete_write_msr or Vcpu::refuse_msr (#GP).
export struct WriteMsr {
  std::uint32_t index = 0;
  std::uint64_t value = 0;
  std::uint32_t reason = 0; ///< One msr_reason_* bit.
};

/// Another event of KVM's Hyper-V face: 1 a SynIC MSR was written, 3 the synthetic debugger. The vCPU may go on.
export struct HypervEvent {
  std::uint32_t type = 0; ///< KVM_EXIT_HYPERV_*.
};

/// KVM_RUN was interrupted; the vCPU can run on.
export struct Interrupted {
  bool stop_requested = false; ///< By a StopHandle: the request is hereby acknowledged. Else: some signal.
};

/// The guest can take an interrupt, as Vcpu::request_interrupt_window asked to know.
export struct InterruptWindowOpen {};

/// A breakpoint or single step that was asked for with KVM_SET_GUEST_DEBUG.
export struct Debug {
  std::uint32_t exception = 0; ///< Vector: 1 or 3.
  std::uint64_t rip = 0;
  std::uint64_t dr6 = 0;
  std::uint64_t dr7 = 0;
};

/// An end-of-interrupt for a vector of the user-space I/O APIC (split interrupt controller).
export struct IoApicEoi {
  std::uint8_t vector = 0;
};

/// The host cannot supply the memory that the guest accesses: it is protected, unmapped, or beyond the end of its file.
/// The access has not been made; run() tries it again. (A KVM that emulates the instruction may make it MMIO instead.)
/// For memory that was lost to a memory error, KVM raises SIGBUS (BUS_MCEERR_AR) on the thread and tries again, which
/// ends as Interrupted for a VMM that survives the signal.
export struct MemoryFault {
  std::uint64_t flags = 0; ///< KVM_MEMORY_EXIT_FLAG_*.
  /// Guest-physical; nothing where KVM does not say. It does (KVM_EXIT_MEMORY_FAULT, Linux 6.8) for memory of a
  /// guest_memfd; of other memory, Linux 6.12 fails with the bare error (arch/x86/kvm/mmu/mmu.c, kvm_handle_error_pfn).
  std::optional<std::uint64_t> address = std::nullopt;
  std::uint64_t size = 0; ///< 0 where KVM does not say.
  int os_error = 0;       ///< EFAULT or EHWPOISON.
};

/// Why Vcpu::run returned.
export using Exit = std::variant<UnknownExit, IoIn, IoOut, MmioRead, MmioWrite, Hlt, Shutdown, SystemEvent, FailEntry,
                                 InternalError, ReadMsr, WriteMsr, Hypercall, HypervEvent, Interrupted,
                                 InterruptWindowOpen, Debug, IoApicEoi, MemoryFault>;

/// The name of an exit's type, for logs: "IoIn", "Hypercall", ...
export [[nodiscard]] const char* exit_name(const Exit& exit);

} // namespace cppvmm
