module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
module cppvmm.hv_calls:hyperv_interface.impl;
import :error;
import :hyperv_interface;
import :overlay_page;
import :reference_time;
import :state;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

constexpr std::uint64_t hypercall_locked = 2;

struct HypervInterface::State {
  const GuestMemory& memory;
  HvPage code{};
  mutable std::mutex mutex;
  std::uint64_t guest_os_id = 0;
  std::uint64_t hypercall = 0;
  OverlayPage overlay{code};
  std::optional<HvTimeSource> source; // nothing: there is no time
  HvTscScale scale;
  std::uint32_t sequence = 0;
  std::uint64_t reference_tsc = 0;
  HvPage time{};
  OverlayPage time_overlay{time};
  std::uint64_t last_time = 0; // that TIME_REF_COUNT was

  explicit State(const GuestMemory& guest_memory) : memory(guest_memory) {}

  /// Writes HYPERCALL; false is #GP.
  [[nodiscard]] bool write_hypercall(std::uint64_t value);
  /// Writes REFERENCE_TSC; false is #GP.
  [[nodiscard]] bool write_reference_tsc(std::uint64_t value);
  void reset();
  [[nodiscard]] HvResult<void> restore(const HvState& saved);
  [[nodiscard]] HvResult<void> restore_time(const HvState& saved);
  void set_scale(const HvTscScale& chosen, std::uint32_t last_sequence);
  /// TIME_REF_COUNT, read by a vCPU with this TSC.
  [[nodiscard]] std::uint64_t read_time(std::uint64_t tsc);
};

HypervInterface::HypervInterface(const GuestMemory& memory, std::span<const std::byte> code)
    : state_(std::make_unique<State>(memory)) {
  constexpr std::byte int3{0xCC};
  state_->code.fill(int3);
  std::ranges::copy(code.first(std::min(code.size(), state_->code.size())), state_->code.begin());
}

HypervInterface::~HypervInterface() = default;
HypervInterface::HypervInterface(HypervInterface&&) noexcept = default;
HypervInterface& HypervInterface::operator=(HypervInterface&&) noexcept = default;

HvResult<void> HypervInterface::set_time(const HvTimeSource& source) {
  const auto refused = [&](const char* why) {
    return std::unexpected(HvError{.code = HvErrc::invalid_options, .operation = why, .value = source.tsc_hz});
  };
  const auto scale = HvTscScale::of(source.tsc_hz);
  if (!scale) return refused("time by a TSC of 10 MHz or slower");
  const std::lock_guard lock(state_->mutex);
  if (state_->source == source) return {};
  if (state_->source) return refused("time by two sources");
  state_->source = source;
  state_->set_scale(*scale, 0);
  return {};
}

std::uint64_t HypervInterface::State::read_time(std::uint64_t tsc) {
  // By their difference: before the offset's zero, time is negative.
  const std::uint64_t now = scale.time_at(tsc);
  last_time = static_cast<std::int64_t>(now - last_time) > 0 ? now : last_time + 1;
  return last_time;
}

std::optional<std::uint64_t> HypervInterface::read_msr(std::uint32_t vp_index, std::uint32_t msr,
                                                       std::uint64_t tsc) const {
  const std::lock_guard lock(state_->mutex);
  const bool has_frequencies = state_->source && state_->source->apic_hz != 0;
  switch (msr) {
  case hv_msr_time_ref_count:
    if (!state_->source) return std::nullopt;
    return state_->read_time(tsc);
  case hv_msr_reference_tsc:
    if (!state_->source) return std::nullopt;
    return state_->reference_tsc;
  case hv_msr_tsc_frequency:
    if (!has_frequencies) return std::nullopt;
    return state_->source->tsc_hz;
  case hv_msr_apic_frequency:
    if (!has_frequencies) return std::nullopt;
    return state_->source->apic_hz;
  case hv_msr_guest_os_id:
    return state_->guest_os_id;
  case hv_msr_hypercall:
    return state_->hypercall;
  case hv_msr_vp_index:
    return vp_index;
  default:
    return std::nullopt;
  }
}

bool HypervInterface::State::write_hypercall(std::uint64_t value) {
  if ((hypercall & hypercall_locked) != 0) return false;
  if (guest_os_id == 0) return true;
  if ((value & hv_hypercall_enabled) == 0)
    overlay.lift(memory);
  else if (GuestAddress(value).page() == time_overlay.page() || !overlay.lay(memory, GuestAddress(value).page()))
    return false;
  hypercall = value;
  return true;
}

bool HypervInterface::State::write_reference_tsc(std::uint64_t value) {
  if (!source) return false;
  if ((value & hv_reference_tsc_enabled) == 0)
    time_overlay.lift(memory);
  else if (GuestAddress(value).page() == overlay.page() || !time_overlay.lay(memory, GuestAddress(value).page()))
    return false;
  reference_tsc = value;
  return true;
}

bool HypervInterface::write_msr(std::uint32_t msr, std::uint64_t value) {
  const std::lock_guard lock(state_->mutex);
  switch (msr) {
  case hv_msr_guest_os_id:
    state_->guest_os_id = value;
    if (value == 0) {
      state_->hypercall &= ~hv_hypercall_enabled;
      state_->overlay.lift(state_->memory);
    }
    return true;
  case hv_msr_hypercall:
    return state_->write_hypercall(value);
  case hv_msr_reference_tsc:
    return state_->write_reference_tsc(value);
  default:
    return false;
  }
}

std::optional<PageNumber> HypervInterface::hypercall_page() const {
  const std::lock_guard lock(state_->mutex);
  return state_->overlay.page();
}

std::optional<HvTimeSource> HypervInterface::time_source() const {
  const std::lock_guard lock(state_->mutex);
  return state_->source;
}

std::optional<PageNumber> HypervInterface::reference_tsc_page() const {
  const std::lock_guard lock(state_->mutex);
  return state_->time_overlay.page();
}

bool HypervInterface::takes_hypercalls() const {
  const std::lock_guard lock(state_->mutex);
  return state_->guest_os_id != 0;
}

void HypervInterface::State::reset() {
  guest_os_id = 0;
  hypercall = 0;
  overlay.drop();
  reference_tsc = 0;
  time_overlay.drop();
  if (source) set_scale({.scale = scale.scale}, sequence);
  last_time = 0;
}

void HypervInterface::State::set_scale(const HvTscScale& chosen, std::uint32_t last_sequence) {
  scale = chosen;
  // Another one than the guest knows, and never 0.
  sequence = last_sequence % (std::numeric_limits<std::uint32_t>::max() - 1) + 1;
  time = hv_reference_tsc_page(sequence, scale);
}

void HypervInterface::reset() {
  const std::lock_guard lock(state_->mutex);
  state_->reset();
}

HvState HypervInterface::state(std::uint64_t tsc) const {
  const std::lock_guard lock(state_->mutex);
  HvState saved{.guest_os_id = state_->guest_os_id,
                .hypercall = state_->hypercall,
                .hypercall_page_covers = state_->overlay.covered()};
  if (!state_->source) return saved;
  saved.reference_tsc = state_->reference_tsc;
  saved.reference_tsc_page_covers = state_->time_overlay.covered();
  saved.reference_tsc_sequence = state_->sequence;
  saved.tsc = tsc;
  // Negative by a TSC that a guest set back: what it has saved has to be restorable.
  const std::uint64_t time = state_->scale.time_at(tsc);
  saved.reference_time = time >> 63 != 0 ? 0 : time;
  return saved;
}

static std::unexpected<HvError> invalid_state(const char* operation, std::uint64_t value) {
  return std::unexpected(HvError{.code = HvErrc::invalid_state, .operation = operation, .value = value});
}

HvResult<void> HypervInterface::State::restore_time(const HvState& saved) {
  if (saved.reference_tsc_sequence == 0) return {};
  if (!source) return invalid_state("restore a guest that had time where there is none", saved.reference_tsc_sequence);
  set_scale(scale.through(saved.tsc, saved.reference_time), saved.reference_tsc_sequence);
  last_time = saved.reference_time;
  if ((saved.reference_tsc & hv_reference_tsc_enabled) != 0)
    if (const PageNumber page = GuestAddress(saved.reference_tsc).page();
        !time_overlay.lay_again(memory, page, saved.reference_tsc_page_covers))
      return invalid_state("restore a reference TSC page that is not the guest's to write", page.value());
  reference_tsc = saved.reference_tsc;
  return {};
}

HvResult<void> HypervInterface::State::restore(const HvState& saved) {
  reset();
  if ((saved.hypercall & hv_hypercall_enabled) != 0)
    if (const PageNumber page = GuestAddress(saved.hypercall).page();
        !overlay.lay_again(memory, page, saved.hypercall_page_covers))
      return invalid_state("restore a hypercall page that is not the guest's to write", page.value());
  guest_os_id = saved.guest_os_id;
  hypercall = saved.hypercall;
  return restore_time(saved);
}

HvResult<void> HypervInterface::restore(const HvState& state) {
  const std::lock_guard lock(state_->mutex);
  auto restored = check_hv_state(state);
  if (restored) restored = state_->restore(state);
  if (!restored) state_->reset();
  return restored;
}

} // namespace cppvmm
