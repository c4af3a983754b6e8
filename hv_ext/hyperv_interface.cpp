module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
module cppvmm.hv_ext:hyperv_interface.impl;
import :extended_hypercalls;
import :hyperv_interface;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

constexpr std::uint64_t hypercall_enable = 1;
constexpr std::uint64_t hypercall_locked = 2;

std::array<HvCpuidLeaf, 7> hv_cpuid_leaves(const HvOptions& options) {
  // "Microsoft Hv" is what Linux compares the vendor with; Windows goes by the interface "Hv#1". Leaf 4's EBX says how
  // often a spinlock is tried before the hypervisor is told: never.
  return {{
      {.function = hv_cpuid_vendor,
       .eax = hv_cpuid_hardware,
       .ebx = 0x7263'694D,
       .ecx = 0x666F'736F,
       .edx = 0x7648'2074},
      {.function = hv_cpuid_interface, .eax = 0x3123'7648},
      {.function = hv_cpuid_version},
      {.function = hv_cpuid_features,
       .eax = hv_feature_eax_hypercall_msrs | hv_feature_eax_vp_index_msr,
       .ebx = options.extended_hypercalls ? hv_feature_ebx_extended_hypercalls : 0},
      {.function = hv_cpuid_recommendations, .ebx = 0xFFFF'FFFF},
      {.function = hv_cpuid_limits},
      {.function = hv_cpuid_hardware},
  }};
}

struct HypervInterface::State {
  const GuestMemory& memory;
  std::array<std::byte, page_size> page{};
  mutable std::mutex mutex;
  std::uint64_t guest_os_id = 0;
  std::uint64_t hypercall = 0;

  explicit State(const GuestMemory& guest_memory) : memory(guest_memory) {}

  /// Writes HYPERCALL; false is #GP.
  [[nodiscard]] bool write_hypercall(std::uint64_t value);
};

HypervInterface::HypervInterface(const GuestMemory& memory, std::span<const std::byte> code)
    : state_(std::make_unique<State>(memory)) {
  constexpr std::byte int3{0xCC};
  state_->page.fill(int3);
  std::ranges::copy(code.first(std::min(code.size(), state_->page.size())), state_->page.begin());
}

HypervInterface::~HypervInterface() = default;
HypervInterface::HypervInterface(HypervInterface&&) noexcept = default;
HypervInterface& HypervInterface::operator=(HypervInterface&&) noexcept = default;

std::optional<std::uint64_t> HypervInterface::read_msr(std::uint32_t vp_index, std::uint32_t msr) const {
  const std::lock_guard lock(state_->mutex);
  switch (msr) {
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
  if ((value & hypercall_enable) != 0) {
    const GuestAddress address(value & ~(page_size - 1));
    if (!memory.write(address, page)) return false;
  }
  hypercall = value;
  return true;
}

bool HypervInterface::write_msr(std::uint32_t msr, std::uint64_t value) {
  const std::lock_guard lock(state_->mutex);
  switch (msr) {
  case hv_msr_guest_os_id:
    state_->guest_os_id = value;
    if (value == 0) state_->hypercall &= ~hypercall_enable;
    return true;
  case hv_msr_hypercall:
    return state_->write_hypercall(value);
  default:
    return false;
  }
}

std::optional<PageNumber> HypervInterface::hypercall_page() const {
  const std::lock_guard lock(state_->mutex);
  if ((state_->hypercall & hypercall_enable) == 0) return std::nullopt;
  return GuestAddress(state_->hypercall).page();
}

bool HypervInterface::takes_hypercalls() const {
  const std::lock_guard lock(state_->mutex);
  return state_->guest_os_id != 0;
}

void HypervInterface::reset() {
  const std::lock_guard lock(state_->mutex);
  state_->guest_os_id = 0;
  state_->hypercall = 0;
}

} // namespace cppvmm
