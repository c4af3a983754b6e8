module;
#include <cstdint>
#include <optional>
export module cppvmm.hv_calls:reference_time;
import :overlay_page;

namespace cppvmm {

/// What a guest's time is made of.
export struct HvTimeSource {
  /// Of the guest's TSC, which runs alike on all vCPUs: above 10 MHz (KVM_GET_TSC_KHZ, times 1000).
  std::uint64_t tsc_hz = 0;
  /// Of the local APIC's timer: KVM's own has 1 GHz (Linux arch/x86/kvm/lapic.h, APIC_BUS_CYCLE_NS_DEFAULT). 0: the
  /// frequencies are not told, for a guest wants both.
  std::uint64_t apic_hz = 0;
  friend bool operator==(const HvTimeSource&, const HvTimeSource&) = default;
};

/// The reference time at a TSC, in units of 100 ns: ((tsc * scale) >> 64) + offset (TLFS "Partition Reference TSC
/// Mechanism").
export struct HvTscScale {
  std::uint64_t scale = 0;
  std::int64_t offset = 0;

  /// Nothing for a TSC of 10 MHz or slower, whose scale would be no 64-bit number.
  [[nodiscard]] static std::optional<HvTscScale> of(std::uint64_t tsc_hz);
  /// Modulo 2^64.
  [[nodiscard]] std::uint64_t time_at(std::uint64_t tsc) const;
  /// The same, with the offset that makes it `time` at `tsc`.
  [[nodiscard]] HvTscScale through(std::uint64_t tsc, std::uint64_t time) const;
};

/// The reference TSC page: `sequence` is another one whenever scale or offset change; 0 says that the page tells
/// nothing.
export [[nodiscard]] HvPage hv_reference_tsc_page(std::uint32_t sequence, const HvTscScale& scale);

} // namespace cppvmm
