module;
#include <chrono>
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
import :memory_heat_hint;
import :tlfs;
import :trace;
import cppvmm.guest_memory;

namespace cppvmm {

/// How HvExtCallMemoryHeatHint is answered by ExtendedHypercalls.
export struct HvHeatOptions {
  /// standard_heat_policy, or the embedder's own. Null: the call is not offered. Off by default: of memory that is
  /// pinned for devices (VFIO), which would go on writing into what the guest no longer has, the embedder has to say
  /// so.
  HeatPolicy policy{};
  bool offers_cold_discard = true; ///< HeatOptions::offers_cold_discard.
  /// Pages that a cold discard leaves alone, until ExtendedHypercalls::set_pinned. It leaves alone, too, what answers
  /// leave out: SurveyOptions::leave_out, the hypercall page, the reference TSC page where it is not KVM's, outputs of
  /// calls in progress; and its own input. Of the rest, a guest that gives away what it uses harms itself.
  PageSet pinned{};
  std::function<void(const HeatHinted&)> on_hint{}; ///< HeatOptions::on_hint.
};

/// What calls that cost something may take of the host's time, from all vCPUs together: `time` in each `period`, which
/// may be saved up for one period.
export struct HvRateLimit {
  std::chrono::nanoseconds time{};
  std::chrono::nanoseconds period{};
};

/// What the guest is offered. Three of these are what it begins with, and may change while it runs: boot_zeroed_memory
/// (ExtendedHypercalls::offer_boot_zeroed_memory), survey (ExtendedHypercalls::set_survey) and memory_heat.pinned
/// (ExtendedHypercalls::set_pinned).
export struct HvOptions {
  /// CPUID 0x40000003.EBX bit 20. Without it extended hypercalls get HvStatus::access_denied.
  bool extended_hypercalls = true;
  /// HvExtCallGetBootZeroedMemory and its capability bit. Needs extended_hypercalls. Without it, `calls` may have a row
  /// of that code.
  bool boot_zeroed_memory = true;
  /// HvExtCallMemoryHeatHint and its capability bits. Needs extended_hypercalls. Without a policy, `calls` may have a
  /// row of that code.
  HvHeatOptions memory_heat{};
  /// How long a step of a rep call goes on before the guest gets its interrupts, but for the part that it is at, of 2
  /// to 64 MiB (a huge page of the pool at least), and what that waits for: discards of other vCPUs, a userfaultfd's
  /// handler. TLFS aims at 50 us; each step costs an exit more.
  std::chrono::nanoseconds call_time = std::chrono::microseconds(200);
  /// Of HvExtCallGetBootZeroedMemory, HvExtCallMemoryHeatHint, and rows that are HvCallRow::is_costly. A call that
  /// begins when the time is used up, or is to go on then, gets operation_denied. What a call takes is counted with
  /// what it waited for others.
  std::optional<HvRateLimit> rate_limit{};
  /// How memory is surveyed until ExtendedHypercalls::set_survey; leave_out names pages that must not be reported,
  /// beyond the call's own output page.
  SurveyOptions survey{};
  /// Called on the calling vCPU's thread, after the answer was written and before `handle` returns; for several vCPUs
  /// at the same time. No more than two surveys are kept for answers, so that a third waits for it: it must neither
  /// call `handle` nor wait for another vCPU. The answer is gone afterwards, for its survey may be large: what is to
  /// stay is to be copied, and then bounded by whoever copies it, for a guest may ask again and again. Throws nothing
  /// but std::bad_alloc, for which the guest gets insufficient_memory.
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
  std::uint64_t memory_heat_hint = 0; ///< Again each time that one goes on.
  std::uint64_t other = 0;            ///< Those that were handed back included.
};

/// Answers Hyper-V's extended hypercalls, and the embedder's own. Needs nothing of KVM: any VMM can call `handle` from
/// its own exit loop. Safe to use from any thread, all vCPUs at once included. One that was moved from may only be
/// assigned to or destroyed.
export class ExtendedHypercalls {
public:
  /// `memory` must outlive this object. invalid_options when boot_zeroed_memory or memory_heat is on without
  /// extended_hypercalls, for a rate limit without a period, and as HvCallTable::make.
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
  /// - a costly call beyond the rate limit: operation_denied;
  /// - no memory left for the answer: insufficient_memory.
  /// Unless the status is success, nothing is written by the calls answered here; a rep call has done what its reps
  /// completed say, and may have done more.
  [[nodiscard]] HypercallResult handle(const HvCall& call);
  /// The same, for no longer than HvOptions::call_time or so: a rep call may have to go on. For VMMs that can leave RIP
  /// on the call (set_hv_control); `handle` keeps the guest from its interrupts until all of the list is done, which
  /// may name all of memory 511 times.
  [[nodiscard]] HvCallProgress handle_some(const HvCall& call);

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
  /// The pages that a cold discard leaves alone from now on, beside those in use: when this returns, no discard of them
  /// is in progress, so that a device may be given them. At any time. Waits for parts of discards that are in progress.
  void set_pinned(PageSet pages);
  /// Offers HvExtCallGetBootZeroedMemory to the guest, or no more. too_late once the guest has called it or
  /// HvExtCallQueryCapabilities, since it began or `reset`: it asks once, and goes by that. invalid_options without
  /// HvOptions::extended_hypercalls, and where a row of the embedder's answers it. Nothing has changed then. Whether a
  /// guest has asked is no part of its saved state: one that is restored is to be offered the same as before.
  [[nodiscard]] HvResult<void> offer_boot_zeroed_memory(bool is_offered);
  [[nodiscard]] bool offers_boot_zeroed_memory() const;
  /// The machine was reset: its guest has not asked yet, and calls that were to go on never will. The counts go on, and
  /// so does what was set. While no call is in progress. Hyperv::reset and Hyperv::restore do that.
  void reset();

  /// As they were given to `create`.
  [[nodiscard]] const HvOptions& options() const;
  /// The calls that there are: those of the options, offered or not, and the embedder's. Valid while this object is,
  /// and so are copies of its rows.
  [[nodiscard]] const HvCallTable& table() const;
  [[nodiscard]] const GuestMemory& memory() const;
  [[nodiscard]] HypercallCounts counts() const;
  [[nodiscard]] HeatCounts heat_counts() const;

private:
  struct State;
  explicit ExtendedHypercalls(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

} // namespace cppvmm
