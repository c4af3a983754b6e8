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
  std::uint64_t freed_pages = 0;   ///< Given back to the host: they read zero.
  std::uint64_t cleared_pages = 0; ///< They read zero, and the host has memory for them still.
  std::uint64_t advised_pages = 0; ///< The host's kernel was told of them.
  std::uint64_t kept_pages = 0;    ///< Nothing was done.
  /// The host's kernel failed: some may have been given back. Not a policy's to fill in.
  std::uint64_t failed_pages = 0;

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

/// Cold discard gives the pages back (DiscardMode::free_only), and leaves what can't be: parts of huge pages of the
/// pool, shared memory that is locked, files that are sealed, memory of unknown backing; of a private_file, what is
/// beyond 1024 parts. The others advise the kernel, and where it takes no advice (MADV_COLD of huge pages of the pool
/// and of locked memory) nothing is done. `memory` must outlive it and its copies.
///
/// Huge pages of the pool that a guest gives back may be others' when it wants them again: it gets no further then
/// (Vcpu::run: MemoryFault), and an access of the VMM's is a SIGBUS, or an error where a FaultGuard is installed.
/// Regions of the pool that cppvmm made are given back only while there is one, and kept otherwise.
export [[nodiscard]] HeatPolicy standard_heat_policy(GuestMemory& memory, HeatAdvice advice = {});

/// A part of a hint was done, or failed. Pages of a cold discard of which any was freed, cleared or failed may read
/// otherwise than before, and no dirty log has them: who copies memory while the guest runs (a live migration, a live
/// snapshot) is to copy all of `pages` again.
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
  /// Takes out of `pages` those that a cold discard has to leave alone, and calls `discard`: they stay what they are
  /// until it returns. On the calling vCPU's thread. May be null: none.
  std::function<void(PageSet& pages, const std::function<void()>& discard)> without_kept{};
  /// Told of each part of a hint, on the calling vCPU's thread, for several vCPUs at the same time. Throws nothing but
  /// std::bad_alloc, which the guest sees as insufficient_memory. May be null.
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
