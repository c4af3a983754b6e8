module;
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <optional>
#include <span>
#include <vector>
export module cppvmm.hv_calls:call_table;
import :call;
import :error;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

export enum class HvCallKind : std::uint8_t {
  simple, ///< One operation.
  rep,    ///< One operation for each element of a list, which the control word counts.
};

/// A call whose control word and addresses fit its row.
export struct HvCheckedCall {
  HvControl control;
  /// The fixed part and, of a rep call, the list: a copy, which the guest cannot change any more.
  std::span<const std::byte> input;
  /// Where the guest may be written: HvCallRow::output_bytes, and output_bytes_per_rep for each element.
  GuestAddress output;
  std::uint32_t vp_index = 0; ///< HvCall::vp_index.
  /// When a rep call had better end with HvCallAnswer::goes_on: the guest gets its interrupts then.
  std::chrono::steady_clock::time_point until = std::chrono::steady_clock::time_point::max();
};

/// What a handler made of a call.
export struct HvCallAnswer {
  HvStatus status = HvStatus::success;
  /// Of a rep call that fails: elements that are done, those before its rep start index included. Success says that all
  /// are, whatever stands here: a caller that is told of success and too few calls again for ever.
  std::uint16_t reps_completed = 0;
  /// Of a rep call that is not done: the guest is to make it again, from `reps_completed` on. `status` is ignored. What
  /// was done of that element is the handler's to remember, for HvCheckedCall::vp_index; some progress has to be made.
  bool goes_on = false;
};

/// Answers a call, on the calling vCPU's thread, for several vCPUs at the same time. Throws nothing but
/// std::bad_alloc, which the guest sees as insufficient_memory.
export using HvCallHandler = std::function<HvCallAnswer(const HvCheckedCall&)>;

/// A call: what it takes and gives, and who answers it.
export struct HvCallRow {
  std::uint16_t code = 0;
  HvCallKind kind = HvCallKind::simple;
  std::uint16_t input_bytes = 0;          ///< The fixed part; 0: the input address is ignored.
  std::uint16_t input_bytes_per_rep = 0;  ///< An element of the list; of rep calls alone.
  std::uint16_t output_bytes = 0;         ///< 0: the output address is ignored.
  std::uint16_t output_bytes_per_rep = 0; ///< Of rep calls alone.
  bool is_costly = false;                 ///< HvOptions::rate_limit holds for it.
  std::uint64_t capability = 0;           ///< The bits of HvExtCallQueryCapabilities' answer that offer it.
  HvCallHandler handler{};
  /// A call of this vCPU that was to go on never will, for its next step was refused, or was none; without one, no call
  /// will, for the machine was reset. May be null.
  std::function<void(std::optional<std::uint32_t> vp_index)> on_abandoned{};
};

/// The calls that are answered. Immutable.
export class HvCallTable {
public:
  /// invalid_options: two rows of one code, a row without a handler, one whose parameters exceed a page, or a simple
  /// one with parameters for each rep; HvError::value is the code.
  [[nodiscard]] static HvResult<HvCallTable> make(std::vector<HvCallRow> rows);

  /// Ascending by code.
  [[nodiscard]] std::span<const HvCallRow> rows() const { return rows_; }
  /// Null when there is none.
  [[nodiscard]] const HvCallRow* find(std::uint16_t code) const;

private:
  std::vector<HvCallRow> rows_;
};

/// Room for a call's input.
export using HvCallInput = std::array<std::byte, page_size>;

/// Checks a call against its row, and copies its input to `input`. The status for the guest when it does not fit:
/// - variable header, which no call has; rep count or start of a simple call, no rep count or a start that is not below
///   it of a rep call: invalid_hypercall_input;
/// - an address that is used and is misaligned, whose parameters span pages or lie beyond the guest-physical space:
///   invalid_alignment;
/// - input that is not there to read, output without memory that the guest may write: invalid_parameter.
export [[nodiscard]] std::expected<HvCheckedCall, HvStatus> check_call(const HvCall& call, const HvCallRow& row,
                                                                       const GuestMemory& memory, HvCallInput& input);

} // namespace cppvmm
