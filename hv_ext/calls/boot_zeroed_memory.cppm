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

/// One answer to HvExtCallGetBootZeroedMemory, as the guest has got it. Valid for as long as it is told of.
export struct BootZeroedAnswer {
  GuestAddress output;
  std::vector<PageRange> ranges; ///< Largest first, at most hv_boot_zeroed_max_ranges.
  /// What the ranges are of. Calls that came while others were answered have one together: its zeroed() has what is
  /// left out of this call.
  const Survey& survey;
  const PageSet& leave_out;

  /// The pages that could be reported, in ranges of any size: a new set, as Survey::zeroed is. Survey::for_each_zeroed
  /// takes no memory.
  [[nodiscard]] PageSet zeroed() const {
    PageSet pages = survey.zeroed();
    pages.remove(leave_out);
    return pages;
  }
};

/// How HvExtCallGetBootZeroedMemory is answered.
export struct BootZeroedOptions {
  /// How memory is surveyed, asked for at each call, and what it leaves out again when the survey begins; leave_out
  /// names pages that must not be reported: the outputs of other calls in progress, the hypercall page. Throws nothing
  /// but std::bad_alloc. May be null: SurveyOptions{}. (The call's own output page is left out in any case.)
  std::function<SurveyOptions()> survey{};
  /// Called on the calling vCPU's thread, after the answer was written and before the call returns; for several vCPUs
  /// at the same time. The survey is kept for so long, and no third is made. Must not throw. May be null.
  std::function<void(const BootZeroedAnswer&)> on_answer{};
};

/// HvExtCallGetBootZeroedMemory. There are two surveys at once at most, however many vCPUs call, and GuestMemory's
/// limit holds beside: who calls meanwhile waits, until its SurveyOptions::stop or max_time, and shares the next one
/// with all who wait. (A wait that was ended is an answer without ranges.) One that looks at content is not shared.
/// `memory` must outlive the row and its copies.
export [[nodiscard]] HvCallRow boot_zeroed_memory_row(const GuestMemory& memory, BootZeroedOptions options);
HvCallRow boot_zeroed_memory_row(const GuestMemory&& memory, BootZeroedOptions options) = delete;

} // namespace cppvmm
