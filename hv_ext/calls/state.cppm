module;
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>
export module cppvmm.hv_calls:state;
import :error;
import :overlay_page;
import cppvmm.guest_memory;

namespace cppvmm {

/// What a guest has set up of its Hyper-V interface: part of a VM's saved state, beside its memory and what KVM keeps.
export struct HvState {
  std::uint64_t guest_os_id = 0; ///< GUEST_OS_ID.
  std::uint64_t hypercall = 0;   ///< HYPERCALL.
  /// What the guest's page under the hypercall page holds. Nothing while the page is not enabled; nor where KVM has
  /// made it, which keeps nothing of what was there.
  std::optional<HvPage> hypercall_page_covers = std::nullopt;
  std::uint64_t reference_tsc = 0; ///< REFERENCE_TSC, where it is not KVM's.
  /// As hypercall_page_covers.
  std::optional<HvPage> reference_tsc_page_covers = std::nullopt;
  std::uint32_t reference_tsc_sequence = 0; ///< Of the page; 0 where there is no time but KVM's.
  std::uint64_t tsc = 0;                    ///< When this was made.
  std::uint64_t reference_time = 0;         ///< At that TSC, in units of 100 ns.

  friend bool operator==(const HvState&, const HvState&) = default;
};

/// invalid_state for what no guest can have set up: a hypercall page without an OS ID, something covered without the
/// page that covers it, both pages over one, REFERENCE_TSC without a sequence, a time of 2^63 and more; HvError::value
/// is HYPERCALL, REFERENCE_TSC or the time.
export [[nodiscard]] HvResult<void> check_hv_state(const HvState& state);

/// For a file or a wire: a signature, the version of the format, and the values, little-endian; at most 8256 bytes.
export [[nodiscard]] std::vector<std::byte> to_bytes(const HvState& state);
/// Reads them back, whoever wrote them. invalid_state for other bytes, or too few or many (HvError::value is how many),
/// for a version that this one does not know or a sequence of more than 32 bits (it is HvError::value), and as
/// check_hv_state.
export [[nodiscard]] HvResult<HvState> hv_state_from_bytes(std::span<const std::byte> bytes);

} // namespace cppvmm
