module;
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>
export module cppvmm.hv_calls:boot_zeroed_memory;
import :call_table;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

/// The output of HvExtCallGetBootZeroedMemory, byte by byte (TLFS): a u64 count, then 255 pairs of u64 first page
/// number and u64 page count; little-endian, unused pairs zero.
export using BootZeroedOutput = std::array<std::byte, hv_boot_zeroed_output_bytes>;

/// Encodes the first hv_boot_zeroed_max_ranges of `ranges`, in their order.
export [[nodiscard]] BootZeroedOutput encode_boot_zeroed(std::span<const PageRange> ranges);

/// One answer to HvExtCallGetBootZeroedMemory, as the guest has got it.
export struct BootZeroedAnswer {
  GuestAddress output;
  std::vector<PageRange> ranges; ///< Largest first, at most hv_boot_zeroed_max_ranges.
  Survey survey;
};

/// How HvExtCallGetBootZeroedMemory is answered.
export struct BootZeroedOptions {
  /// How memory is surveyed, asked for at each answer; leave_out names pages that must not be reported: the outputs of
  /// other calls in progress, the hypercall page. Throws nothing but std::bad_alloc. May be null: SurveyOptions{}. (The
  /// call's own output page is left out in any case.)
  std::function<SurveyOptions()> survey{};
  /// Called on the calling vCPU's thread, after the answer was written and before the call returns; for one vCPU at a
  /// time, while no other answer is made. Must not throw. May be null.
  std::function<void(const BootZeroedAnswer&)> on_answer{};
};

/// HvExtCallGetBootZeroedMemory. Answers are made one at a time, so that their memory does not grow with the number of
/// vCPUs. `memory` must outlive the row and its copies.
export [[nodiscard]] HvCallRow boot_zeroed_memory_row(const GuestMemory& memory, BootZeroedOptions options);
HvCallRow boot_zeroed_memory_row(const GuestMemory&& memory, BootZeroedOptions options) = delete;

} // namespace cppvmm
