module;
#include <cstdint>
#include <functional>
export module cppvmm.hv_calls:memory_heat_hint;
import :call_table;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

/// What became of pages that the guest said something of.
export struct HeatDone {
  std::uint64_t freed_pages = 0;   ///< Given back to the host: they read zero, and the next answer reports them.
  std::uint64_t cleared_pages = 0; ///< They read zero, and the host has memory for them still.
  std::uint64_t advised_pages = 0; ///< The host's kernel was told of them.
  std::uint64_t kept_pages = 0;    ///< Nothing was done.

  friend bool operator==(const HeatDone&, const HeatDone&) = default;
};

/// Does what is to be done with pages of RAM, which are of the map as it just was. For several vCPUs at the same time.
/// Some pages of a list at a time, so that it takes as long as they do: a few MiB at first, more where that is quick.
/// Throws nothing but std::bad_alloc. While it discards, pages stay pinned: it must not wait for
/// ExtendedHypercalls::set_pinned, nor for who calls that.
export using HeatPolicy = std::function<MemoryResult<HeatDone>(HvMemoryHeat, const PageSet&)>;

/// What standard_heat_policy makes of the hints that leave what pages hold.
export struct HeatAdvice {
  PageUse cold = PageUse::cold;
  PageUse hot = PageUse::will_need;
};

/// Cold discard gives the pages back (GuestMemory::discard), and leaves what can't be: parts of huge pages of the pool,
/// files that are sealed. Of a private_file, that is so beyond 1024 parts. The others advise the kernel, and where it
/// takes no advice (huge pages of the pool, locked memory) nothing is done. Shared memory that is locked is not given
/// back. `memory` must outlive it and its copies.
export [[nodiscard]] HeatPolicy standard_heat_policy(GuestMemory& memory, HeatAdvice advice = {});

/// A part of a hint was done. Of one that failed, nobody is told.
export struct HeatHinted {
  std::uint32_t vp_index = 0;
  HvMemoryHeat heat{};
  const PageSet& pages; ///< Named by the guest, and neither in use nor pinned; may be none.
  HeatDone done;        ///< Of all that it named.
};

/// What guests have said and what was done, in pages of 4 KiB; a page that is named twice counts twice.
export struct HeatCounts {
  std::uint64_t cold_pages = 0;
  std::uint64_t hot_pages = 0;
  std::uint64_t discard_pages = 0;
  HeatDone done{};

  friend bool operator==(const HeatCounts&, const HeatCounts&) = default;
};

/// How HvExtCallMemoryHeatHint is answered.
export struct HeatOptions {
  /// Null: the call is not offered.
  HeatPolicy policy{};
  /// Whether cold discard is offered: the capability bit that Linux's balloon looks for.
  bool offers_cold_discard = true;
  /// Calls `discard` with the pages that a cold discard has to leave alone until it returns, on the calling vCPU's
  /// thread. May be null: none.
  std::function<void(const std::function<void(const PageSet&)>& discard)> with_kept{};
  /// Told of each part of a hint that was done, on the calling vCPU's thread, for several vCPUs at the same time. Must
  /// not throw. May be null.
  std::function<void(const HeatHinted&)> on_hint{};
};

/// HvExtCallMemoryHeatHint. `memory` must outlive the row and its copies. What the guest gets:
/// - invalid_parameter for a heat that there is none of, a reserved bit, a range that is misaligned or has a page that
///   is no RAM: all ranges before it are done, as the reps completed say. And for a cold discard of which not one page
///   could be given back, and some although they are not in use: Linux tries larger blocks then;
/// - insufficient_memory and operation_denied when the host's kernel fails.
///
/// It goes on when its time is over, after some pages at least. How far it has got within a range is kept for each vCPU
/// (HvCheckedCall::vp_index).
export [[nodiscard]] HvCallRow memory_heat_hint_row(const GuestMemory& memory, HeatOptions options);
HvCallRow memory_heat_hint_row(const GuestMemory&& memory, HeatOptions options) = delete;

} // namespace cppvmm
