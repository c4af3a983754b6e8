module;
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
export module cppvmm.hv_calls:hyperv_interface;
import :error;
import :reference_time;
import :state;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

/// The Hyper-V interface for a VMM whose kernel has none: the partition's synthetic MSRs, the hypercall page and the
/// reference TSC page. Safe to use from any thread.
///
/// Either page lies over one of the guest's (TLFS "GPA Overlay Pages"): enabling it writes into guest RAM, and what the
/// guest's page held comes back when the page is moved or disabled. (KVM leaves there what it wrote.) One that was
/// moved from may only be assigned to or destroyed.
export class HypervInterface {
public:
  /// `memory` must outlive this object. `code` is what the hypercall page holds from its first byte on (the rest of
  /// the page is filled with int3); at most a page of it is used.
  HypervInterface(const GuestMemory& memory, std::span<const std::byte> code);
  ~HypervInterface();
  HypervInterface(HypervInterface&&) noexcept;
  HypervInterface& operator=(HypervInterface&&) noexcept;

  /// Gives the guest time: the MSRs TIME_REF_COUNT and REFERENCE_TSC, and with HvTimeSource::apic_hz TSC_FREQUENCY and
  /// APIC_FREQUENCY. It begins when the TSC is 0. Before the vCPUs run; the same again changes nothing. invalid_options
  /// for a TSC of 10 MHz or slower, or another source than before (HvError::value is the frequency).
  [[nodiscard]] HvResult<void> set_time(const HvTimeSource& source);

  /// RDMSR by the vCPU with this VP index; nothing: inject #GP. `tsc` is that vCPU's TSC now, which TIME_REF_COUNT
  /// needs and nothing else: until a reset it never goes back and no two reads are the same, on whichever vCPU. (A
  /// guest that sets a TSC ahead has set its counter ahead.)
  [[nodiscard]] std::optional<std::uint64_t> read_msr(std::uint32_t vp_index, std::uint32_t msr,
                                                      std::uint64_t tsc = 0) const;

  /// WRMSR; false: inject #GP, nothing changed. Per TLFS "Establishing the Hypercall Interface":
  /// - GUEST_OS_ID: any value; 0 disables the hypercall page.
  /// - HYPERCALL: ignored while GUEST_OS_ID is 0; bit 0 enables the page at bits 63:12, another write moves it; bit 1
  ///   locks the MSR: further writes are #GP until `reset`.
  /// - REFERENCE_TSC, where there is time: bit 0 enables the page at bits 63:12.
  /// - For either, a page that is not the guest's to write is #GP, and so is one that the other lies over: what it
  ///   covers could not come back.
  /// - The others are read-only, or there are none: #GP.
  [[nodiscard]] bool write_msr(std::uint32_t msr, std::uint64_t value);

  /// Where the hypercall page is, if enabled; and the reference TSC page.
  [[nodiscard]] std::optional<PageNumber> hypercall_page() const;
  [[nodiscard]] std::optional<PageNumber> reference_tsc_page() const;
  /// What set_time was given.
  [[nodiscard]] std::optional<HvTimeSource> time_source() const;

  /// Whether the guest has said who it is: GUEST_OS_ID is not 0. Until then a hypercall is #UD, whatever code leads to
  /// it: a page that was enabled before a reset holds its code still. As in KVM, where a copy of the page's code goes
  /// on calling when the page is disabled.
  [[nodiscard]] bool takes_hypercalls() const;

  /// Back to the state at power-on: the MSRs are 0, and no longer locked. Guest memory stays as it is. Time is
  /// that of the TSC again, as after set_time. For a reset of the machine in place, once its vCPUs have stopped: an
  /// answer in progress would go to memory of the next boot's.
  void reset();

  /// What the guest has set up, to be saved beside its memory. `tsc` is the TSC of one of its vCPUs, none of which
  /// runs; where there is time.
  [[nodiscard]] HvState state(std::uint64_t tsc = 0) const;
  /// Puts it back, into memory that is there already; in a VM whose vCPUs do not run, after set_time. The hypercall
  /// page gets the code of this object: another's may have been there. Time goes on from where it was at the TSC that
  /// the state was made with, by the frequency that this object has; so vCPUs whose TSC is not behind that one see it
  /// go on.
  ///
  /// invalid_state as check_hv_state, for a page that is not the guest's to write (HvError::value is its page number),
  /// and for a guest that had time where there is none (its sequence). Then nothing is set up, as at power-on; what was
  /// written to the guest's memory stays.
  [[nodiscard]] HvResult<void> restore(const HvState& state);

private:
  struct State;
  std::unique_ptr<State> state_;
};

} // namespace cppvmm
