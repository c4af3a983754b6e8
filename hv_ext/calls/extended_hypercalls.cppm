module;
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>
export module cppvmm.hv_calls:extended_hypercalls;
import :boot_zeroed_memory;
import :call;
import :call_table;
import :error;
import :tlfs;
import :trace;
import cppvmm.guest_memory;

namespace cppvmm {

/// What the guest is offered. Two of these are what it begins with, and may change while it runs: boot_zeroed_memory
/// (ExtendedHypercalls::offer_boot_zeroed_memory) and survey (ExtendedHypercalls::set_survey).
export struct HvOptions {
  /// CPUID 0x40000003.EBX bit 20. Without it extended hypercalls get HvStatus::access_denied.
  bool extended_hypercalls = true;
  /// HvExtCallGetBootZeroedMemory and its capability bit. Needs extended_hypercalls. Without it, `calls` may have a row
  /// of that code.
  bool boot_zeroed_memory = true;
  /// How memory is surveyed until ExtendedHypercalls::set_survey; leave_out names pages that must not be reported,
  /// beyond the call's own output page.
  SurveyOptions survey{};
  /// Called on the calling vCPU's thread, after the answer was written and before `handle` returns; for several vCPUs
  /// at the same time. No more than two surveys are kept for answers, so that a third waits for it: it must neither
  /// call `handle` nor wait for another vCPU. The answer is gone afterwards, for its survey may be large: what is to
  /// stay is to be copied, and then bounded by whoever copies it, for a guest may ask again and again. Must not throw.
  std::function<void(const BootZeroedAnswer&)> on_boot_zeroed{};
  /// Calls of the embedder's own, of any code that is not answered here. Which ever arrive depends on how hypercalls
  /// do: KVM hands over extended calls (0x8001 to 0x8041), HvCallPostMessage and HvCallSignalEvent, and answers all
  /// others itself; so with the transport `split` too.
  std::vector<HvCallRow> calls{};
  /// Bits that HvExtCallQueryCapabilities answers with, beside those of the calls.
  std::uint64_t capabilities = 0;
  /// Is told of each call that arrives and of each answer's ranges; by Hyperv, of CPUID leaves and MSRs too. May be
  /// null, which costs nothing.
  HvTrace trace{};
};

/// How often each call arrived, whatever it was answered.
export struct HypercallCounts {
  std::uint64_t query_capabilities = 0;
  std::uint64_t get_boot_zeroed_memory = 0;
  std::uint64_t other = 0; ///< Those that were handed back included.
};

/// Answers Hyper-V's extended hypercalls, and the embedder's own. Needs nothing of KVM: any VMM can call `handle` from
/// its own exit loop. Safe to use from any thread, all vCPUs at once included. One that was moved from may only be
/// assigned to or destroyed.
export class ExtendedHypercalls {
public:
  /// `memory` must outlive this object. invalid_options when boot_zeroed_memory is on without extended_hypercalls, and
  /// as HvCallTable::make.
  [[nodiscard]] static HvResult<ExtendedHypercalls> create(const GuestMemory& memory, HvOptions options = {});
  static HvResult<ExtendedHypercalls> create(const GuestMemory&& memory, HvOptions options = {}) = delete;
  ~ExtendedHypercalls();
  ExtendedHypercalls(ExtendedHypercalls&&) noexcept;
  ExtendedHypercalls& operator=(ExtendedHypercalls&&) noexcept;

  /// Answers one call. All of it may be whatever a guest puts there. What is neither an extended call (0x8001 to
  /// 0x8041) nor one of HvOptions::calls is handed back (not_ours), whatever else is wrong with it.
  ///
  /// The order of checks is KVM's (Linux arch/x86/kvm/hyperv.c, kvm_hv_hypercall), so that a guest sees the same
  /// whether KVM forwards its calls or the VMM traps them:
  /// - CPL other than 0: undefined_opcode;
  /// - an extended call while extended_hypercalls is off: access_denied;
  /// - a reserved bit of the control word or the nested bit: invalid_hypercall_input;
  /// - an extended call that is fast, its parameters in registers: invalid_parameter;
  /// - an extended call that is not offered: invalid_hypercall_code;
  /// - control word and addresses that do not fit the call's row: as check_call says;
  /// - output to the hypercall page, or the reference TSC page: invalid_parameter;
  /// - no memory left for the answer: insufficient_memory.
  /// Unless the status is success, nothing is written by the calls answered here.
  [[nodiscard]] HypercallResult handle(const HvCall& call);

  /// Where the hypercall page is now, if anywhere: calls that begin later write no output to it, for the guest may only
  /// run it (TLFS "Establishing the Hypercall Interface"), and answers leave it out. (It holds code, which the survey
  /// sees; this makes it certain.)
  void set_hypercall_page(std::optional<PageNumber> page);
  /// The same for the reference TSC page, which the guest may only read, where it is not KVM's.
  void set_reference_tsc_page(std::optional<PageNumber> page);

  /// How memory is surveyed from the next answer on. At any time: while the guest runs, and while a call is answered.
  /// An answer that is on its way may be made by what was set before; and what an answer has named, the guest may have
  /// taken: left out from now on, it is none the less not the VMM's to write.
  void set_survey(SurveyOptions survey);
  /// Offers HvExtCallGetBootZeroedMemory to the guest, or no more. too_late once the guest has called it or
  /// HvExtCallQueryCapabilities, since it began or `reset`: it asks once, and goes by that. invalid_options without
  /// HvOptions::extended_hypercalls, and where a row of the embedder's answers it. Nothing has changed then. Whether a
  /// guest has asked is no part of its saved state: one that is restored is to be offered the same as before.
  [[nodiscard]] HvResult<void> offer_boot_zeroed_memory(bool is_offered);
  [[nodiscard]] bool offers_boot_zeroed_memory() const;
  /// The machine was reset: its guest has not asked yet. The counts go on, and so does what was set. Hyperv::reset does
  /// that.
  void reset();

  /// As they were given to `create`.
  [[nodiscard]] const HvOptions& options() const;
  /// The calls that there are: those of the options, offered or not, and the embedder's. Valid while this object is,
  /// and so are copies of its rows.
  [[nodiscard]] const HvCallTable& table() const;
  [[nodiscard]] const GuestMemory& memory() const;
  [[nodiscard]] HypercallCounts counts() const;

private:
  struct State;
  explicit ExtendedHypercalls(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

} // namespace cppvmm
