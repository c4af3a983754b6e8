module;
#include <cstdint>
#include <expected>
#include <functional>
#include <memory>
#include <optional>
#include <vector>
export module cppvmm.hv_ext:extended_hypercalls;
import :error;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

/// The call was not made from CPL 0: inject #UD; there is no result (TLFS "Hypercall Restrictions").
export struct UndefinedOpcode {
  friend bool operator==(UndefinedOpcode, UndefinedOpcode) = default;
};

/// The result value for RAX (EDX:EAX), or #UD.
export using HypercallResult = std::expected<std::uint64_t, UndefinedOpcode>;

/// One answer to HvExtCallGetBootZeroedMemory, as the guest has got it.
export struct BootZeroedAnswer {
  GuestAddress output;
  std::vector<PageRange> ranges; ///< Largest first, at most hv_boot_zeroed_max_ranges.
  Survey survey;
};

/// What the guest is offered.
export struct HvOptions {
  /// CPUID 0x40000003.EBX bit 20. Without it extended hypercalls get HvStatus::access_denied.
  bool extended_hypercalls = true;
  /// HvExtCallGetBootZeroedMemory and its capability bit. Needs extended_hypercalls.
  bool boot_zeroed_memory = true;
  /// How memory is surveyed; leave_out names pages that must never be reported, beyond the call's own output page.
  SurveyOptions survey{};
  /// Called on the calling vCPU's thread, after the answer was written and before `handle` returns; for several vCPUs
  /// at the same time. Must not throw.
  std::function<void(const BootZeroedAnswer&)> on_boot_zeroed{};
};

/// How often each call arrived, whatever it was answered.
export struct HypercallCounts {
  std::uint64_t query_capabilities = 0;
  std::uint64_t get_boot_zeroed_memory = 0;
  std::uint64_t other = 0;
};

/// Answers Hyper-V's extended hypercalls. Needs nothing of KVM: any VMM can call `handle` from its own exit loop.
/// Safe to use from any thread, all vCPUs at once included; surveys are made one at a time, so that their memory does
/// not grow with the number of vCPUs. One that was moved from may only be assigned to or destroyed.
export class ExtendedHypercalls {
public:
  /// `memory` must outlive this object. invalid_options when boot_zeroed_memory is on without extended_hypercalls.
  [[nodiscard]] static HvResult<ExtendedHypercalls> create(const GuestMemory& memory, HvOptions options = {});
  static HvResult<ExtendedHypercalls> create(const GuestMemory&& memory, HvOptions options = {}) = delete;
  ~ExtendedHypercalls();
  ExtendedHypercalls(ExtendedHypercalls&&) noexcept;
  ExtendedHypercalls& operator=(ExtendedHypercalls&&) noexcept;

  /// Answers one call. All four arguments may be whatever a guest puts there; `cpl` is its current privilege level.
  ///
  /// The order of checks is KVM's (Linux arch/x86/kvm/hyperv.c, kvm_hv_hypercall), so that a guest sees the same
  /// whether KVM forwards its calls or the VMM traps them:
  /// - CPL other than 0: UndefinedOpcode;
  /// - an extended call while extended_hypercalls is off: access_denied;
  /// - a reserved bit of the control word or the nested bit: invalid_hypercall_input;
  /// - an extended call that is fast: invalid_parameter;
  /// - a call code that is not offered: invalid_hypercall_code;
  /// - rep count, rep start or variable header: invalid_hypercall_input, for both are simple calls;
  /// - output GPA misaligned, spanning pages or beyond the guest-physical space: invalid_alignment;
  /// - output GPA without memory that the guest may write, which the hypercall page is not: invalid_parameter;
  /// - no memory left for the survey: insufficient_memory.
  /// Unless the status is success, nothing is written. Neither call has input: `input` is ignored (TLFS "Alignment
  /// Requirements").
  [[nodiscard]] HypercallResult handle(std::uint64_t control, GuestAddress input, GuestAddress output, unsigned cpl);

  /// Where the hypercall page is now, if anywhere: calls that begin later write no output to it, for the guest may only
  /// run it (TLFS "Establishing the Hypercall Interface"), and answers leave it out. (It holds code, which the survey
  /// sees; this makes it certain.)
  void set_hypercall_page(std::optional<PageNumber> page);

  [[nodiscard]] const HvOptions& options() const;
  [[nodiscard]] const GuestMemory& memory() const;
  [[nodiscard]] HypercallCounts counts() const;

private:
  struct State;
  explicit ExtendedHypercalls(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

} // namespace cppvmm
