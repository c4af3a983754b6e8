module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <variant>
export module cppvmm.hv_calls:trace;
import :call;
import cppvmm.guest_memory;

// What a guest was shown, what it did and what it was told: to find out from afar why one does not ask, or what it made
// of an answer. Numbers and addresses only: nothing here is of guest memory's content.

namespace cppvmm {

/// A vCPU was given one of the hypervisor's CPUID leaves (0x40000000 to 0x400001FF).
export struct HvCpuidGiven {
  std::uint32_t vp_index = 0;
  std::uint32_t function = 0;
  std::uint32_t eax = 0;
  std::uint32_t ebx = 0;
  std::uint32_t ecx = 0;
  std::uint32_t edx = 0;
};

export enum class HvMsrAccess : std::uint8_t {
  read,  ///< By the guest.
  write, ///< By the guest.
  held,  ///< By nobody: it is what KVM has there, whose own answers to the guest are not seen.
};

/// A synthetic MSR.
export struct HvMsrTouched {
  std::uint32_t vp_index = 0;
  HvMsrAccess access = HvMsrAccess::read;
  std::uint32_t index = 0;
  std::optional<std::uint64_t> value{}; ///< What was read, or to be written; none when a read was refused.
  bool is_refused = false;              ///< The guest got #GP.
};

/// An answer of ours to HvExtCallGetBootZeroedMemory was written. The event of the call, which has the same output,
/// follows.
export struct HvRangesAnswered {
  GuestAddress output{0};
  std::span<const PageRange> ranges; ///< Those that the guest got; valid for as long as it is told of them.
  std::uint64_t ram_pages = 0;
  std::uint64_t zeroed_pages = 0; ///< That the survey found, in ranges of any size.
  std::size_t zeroed_ranges = 0;
};

/// A hypercall came to an end here, or goes on.
export struct HvCallEnded {
  HvCall call;
  std::optional<std::uint64_t> result{}; ///< The hypercall result value (TLFS "Hypercall Outputs").
  std::optional<HvNoResult> no_result{}; ///< Why there is none.
  /// The control word that the guest is to make it again with: it has not come to an end.
  std::optional<std::uint64_t> goes_on{};
  std::chrono::nanoseconds took{}; ///< HvOptions::on_boot_zeroed included.
};

export using HvTraceEvent = std::variant<HvCpuidGiven, HvMsrTouched, HvRangesAnswered, HvCallEnded>;

/// Is told of each event, on the thread where it happened, of several vCPUs at the same time, and as often as a guest
/// likes: what it keeps has to be bounded. Must not throw, nor call back.
export using HvTrace = std::function<void(const HvTraceEvent&)>;

} // namespace cppvmm
