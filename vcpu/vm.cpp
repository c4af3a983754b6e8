module;
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <linux/kvm.h>
#include <map>
#include <span>
#include <utility>
module cppvmm.vcpu:vm.impl;
import :capabilities;
import :error;
import :file_descriptor;
import :hypercall;
import :ioctl;
import :state;
import :vcpu;
import :vm;

namespace cppvmm {

constexpr std::uint64_t page_mask = 4096 - 1;

Vm::Vm(FileDescriptor descriptor, const Capabilities& capabilities)
    : descriptor_(std::move(descriptor)), capabilities_(capabilities) {}

KvmResult<Vm> Vm::adopt(FileDescriptor descriptor, const Capabilities& capabilities) {
  // An ioctl that only a VM answers.
  kvm_clock_data clock{};
  if (const auto asked = kvm_set(descriptor.number(), KVM_GET_CLOCK, &clock, "KVM_GET_CLOCK of an adopted VM"); !asked)
    return std::unexpected(asked.error());
  return Vm(std::move(descriptor), capabilities);
}

KvmResult<int> Vm::check_extension(std::uint32_t number) const {
  return kvm_ioctl(descriptor(), KVM_CHECK_EXTENSION, std::uintptr_t{number}, "KVM_CHECK_EXTENSION of a VM", number);
}

// --- memory ---

KvmResult<void> Vm::set_memory_slot(const MemorySlot& slot) {
  const auto host = reinterpret_cast<std::uintptr_t>(slot.host_address);
  if (slot.bytes == 0 || ((slot.bytes | slot.guest_address | host) & page_mask) != 0 ||
      slot.guest_address + slot.bytes < slot.guest_address || host == 0)
    return failed(KvmErrc::invalid_argument, "Vm::set_memory_slot", slot.guest_address);
  if (slot.read_only && !capabilities_.read_only_memory)
    return failed(KvmErrc::unsupported, "KVM_CAP_READONLY_MEM", KVM_CAP_READONLY_MEM);
  kvm_userspace_memory_region region{};
  region.slot = slot.slot;
  region.flags = static_cast<std::uint32_t>((slot.read_only ? KVM_MEM_READONLY : 0) |
                                            (slot.log_dirty ? KVM_MEM_LOG_DIRTY_PAGES : 0));
  region.guest_phys_addr = slot.guest_address;
  region.memory_size = slot.bytes;
  region.userspace_addr = host;
  if (const auto set =
          kvm_set(descriptor(), KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION", slot.guest_address);
      !set)
    return set;
  slot_bytes_[slot.slot] = slot.bytes;
  return {};
}

KvmResult<void> Vm::remove_memory_slot(std::uint32_t slot) {
  kvm_userspace_memory_region region{};
  region.slot = slot;
  if (const auto set = kvm_set(descriptor(), KVM_SET_USER_MEMORY_REGION, &region,
                               "KVM_SET_USER_MEMORY_REGION to remove a slot", slot);
      !set)
    return set;
  slot_bytes_.erase(slot);
  return {};
}

KvmResult<void> Vm::dirty_log(std::uint32_t slot, std::span<std::uint64_t> bitmap) const {
  const auto known = slot_bytes_.find(slot);
  if (known == slot_bytes_.end()) return failed(KvmErrc::invalid_argument, "Vm::dirty_log: slot", slot);
  const std::uint64_t words = ((known->second >> 12) + 63) / 64;
  if (bitmap.size() < words) return failed(KvmErrc::invalid_argument, "Vm::dirty_log: 64-bit words expected", words);
  kvm_dirty_log log{};
  log.slot = slot;
  log.dirty_bitmap = bitmap.data();
  return kvm_set(descriptor(), KVM_GET_DIRTY_LOG, &log, "KVM_GET_DIRTY_LOG", slot);
}

// KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE alone: pages are still clean when logging starts.
KvmResult<void> Vm::enable_manual_dirty_log() {
  if (!capabilities_.manual_dirty_log)
    return failed(KvmErrc::unsupported, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
  enable.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
  return kvm_set(descriptor(), KVM_ENABLE_CAP, &enable, "KVM_ENABLE_CAP KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
}

KvmResult<void> Vm::clear_dirty_log(std::uint32_t slot, std::uint64_t first_page, std::uint32_t pages,
                                    std::span<const std::uint64_t> bitmap) const {
  const std::uint64_t words = (std::uint64_t{pages} + 63) / 64;
  if (bitmap.size() < words)
    return failed(KvmErrc::invalid_argument, "Vm::clear_dirty_log: 64-bit words expected", words);
  kvm_clear_dirty_log log{};
  log.slot = slot;
  log.num_pages = pages;
  log.first_page = first_page;
  log.dirty_bitmap = const_cast<std::uint64_t*>(bitmap.data()); // KVM only reads it
  return kvm_set(descriptor(), KVM_CLEAR_DIRTY_LOG, &log, "KVM_CLEAR_DIRTY_LOG", slot);
}

// --- the board ---

KvmResult<void> Vm::set_tss_address(std::uint32_t guest_address) {
  const auto set =
      kvm_ioctl(descriptor(), KVM_SET_TSS_ADDR, std::uintptr_t{guest_address}, "KVM_SET_TSS_ADDR", guest_address);
  if (!set) return std::unexpected(set.error());
  return {};
}

KvmResult<void> Vm::set_identity_map_address(std::uint64_t guest_address) {
  return kvm_set(descriptor(), KVM_SET_IDENTITY_MAP_ADDR, &guest_address, "KVM_SET_IDENTITY_MAP_ADDR", guest_address);
}

KvmResult<void> Vm::create_interrupt_controller() {
  return kvm_set(descriptor(), KVM_CREATE_IRQCHIP, nullptr, "KVM_CREATE_IRQCHIP");
}

KvmResult<void> Vm::create_interval_timer(bool dummy_speaker) {
  kvm_pit_config config{};
  config.flags = dummy_speaker ? KVM_PIT_SPEAKER_DUMMY : 0;
  return kvm_set(descriptor(), KVM_CREATE_PIT2, &config, "KVM_CREATE_PIT2");
}

KvmResult<void> Vm::set_interrupt_line(std::uint32_t line, bool active) {
  kvm_irq_level level{};
  level.irq = line;
  level.level = active;
  return kvm_set(descriptor(), KVM_IRQ_LINE, &level, "KVM_IRQ_LINE", line);
}

// --- state ---

KvmResult<InterruptController> Vm::interrupt_controller(InterruptChip chip) const {
  kvm_irqchip state{};
  state.chip_id = static_cast<std::uint32_t>(chip);
  if (const auto got = kvm_set(descriptor(), KVM_GET_IRQCHIP, &state, "KVM_GET_IRQCHIP", state.chip_id); !got)
    return std::unexpected(got.error());
  return std::bit_cast<InterruptController>(state);
}

KvmResult<void> Vm::set_interrupt_controller(const InterruptController& controller) {
  const auto state = std::bit_cast<kvm_irqchip>(controller);
  return kvm_set(descriptor(), KVM_SET_IRQCHIP, &state, "KVM_SET_IRQCHIP", state.chip_id);
}

KvmResult<IntervalTimer> Vm::interval_timer() const {
  IntervalTimer timer;
  static_assert(sizeof timer == sizeof(kvm_pit_state2));
  if (const auto got = kvm_set(descriptor(), KVM_GET_PIT2, &timer, "KVM_GET_PIT2"); !got)
    return std::unexpected(got.error());
  return timer;
}

KvmResult<void> Vm::set_interval_timer(const IntervalTimer& timer) {
  return kvm_set(descriptor(), KVM_SET_PIT2, &timer, "KVM_SET_PIT2");
}

KvmResult<VmClock> Vm::clock() const {
  VmClock clock;
  static_assert(sizeof clock == sizeof(kvm_clock_data));
  if (const auto got = kvm_set(descriptor(), KVM_GET_CLOCK, &clock, "KVM_GET_CLOCK"); !got)
    return std::unexpected(got.error());
  return clock;
}

// What KVM says of how it read the clock (KVM_CLOCK_TSC_STABLE and others) is no request; before Linux 5.16 it refuses
// any flag.
KvmResult<void> Vm::set_clock(const VmClock& clock) {
  auto state = std::bit_cast<kvm_clock_data>(clock);
  state.flags = 0;
  return kvm_set(descriptor(), KVM_SET_CLOCK, &state, "KVM_SET_CLOCK");
}

// --- MSRs ---

KvmResult<void> Vm::enable_user_space_msrs(std::uint32_t reasons) {
  if (const std::uint32_t missing = reasons & ~capabilities_.user_space_msr_reasons; missing != 0)
    return failed(KvmErrc::unsupported, "KVM_CAP_X86_USER_SPACE_MSR: reasons", missing);
  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_X86_USER_SPACE_MSR;
  enable.args[0] = reasons;
  return kvm_set(descriptor(), KVM_ENABLE_CAP, &enable, "KVM_ENABLE_CAP KVM_CAP_X86_USER_SPACE_MSR", reasons);
}

KvmResult<void> Vm::set_msr_filter(std::span<const MsrRange> denied) {
  static constexpr std::uint32_t max_count = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8;
  static std::array<std::uint8_t, KVM_MSR_FILTER_MAX_BITMAP_SIZE> deny_all{}; // a bit of 0 denies; KVM only reads it

  if (!capabilities_.msr_filter) return failed(KvmErrc::unsupported, "KVM_CAP_X86_MSR_FILTER", KVM_CAP_X86_MSR_FILTER);
  if (denied.size() > KVM_MSR_FILTER_MAX_RANGES)
    return failed(KvmErrc::invalid_argument, "Vm::set_msr_filter: ranges", denied.size());
  kvm_msr_filter filter{};
  filter.flags = KVM_MSR_FILTER_DEFAULT_ALLOW;
  for (std::size_t i = 0; i < denied.size(); ++i) {
    const MsrRange& range = denied[i];
    if (range.count == 0 || range.count > max_count || range.count - 1 > UINT32_MAX - range.first ||
        (!range.reads && !range.writes))
      return failed(KvmErrc::invalid_argument, "Vm::set_msr_filter", range.first);
    filter.ranges[i].flags = (range.reads ? KVM_MSR_FILTER_READ : 0U) | (range.writes ? KVM_MSR_FILTER_WRITE : 0U);
    filter.ranges[i].base = range.first;
    filter.ranges[i].nmsrs = range.count;
    filter.ranges[i].bitmap = deny_all.data();
  }
  return kvm_set(descriptor(), KVM_X86_SET_MSR_FILTER, &filter, "KVM_X86_SET_MSR_FILTER", denied.size());
}

KvmResult<void> Vm::take_hyperv_msrs(HypercallTransport transport) {
  if (transport == HypercallTransport::kernel)
    return failed(KvmErrc::invalid_argument, "Vm::take_hyperv_msrs: KVM owns them with transport 'kernel'");
  if (const auto enabled = enable_user_space_msrs(msr_reason_filter); !enabled) return enabled;
  const MsrRange hyperv{.first = hyperv_msr_first,
                        .count = transport == HypercallTransport::split ? split_msr_count : hyperv_msr_count};
  return set_msr_filter(std::span(&hyperv, 1));
}

// --- vCPUs ---

KvmResult<Vcpu> Vm::create_vcpu(std::uint32_t id, VcpuOptions options) {
  const auto created = kvm_ioctl(descriptor(), KVM_CREATE_VCPU, std::uintptr_t{id}, "KVM_CREATE_VCPU", id);
  if (!created) return std::unexpected(created.error());
  // How much XSAVE saves depends on what the process has asked for until the first vCPU (ARCH_REQ_XCOMP_GUEST_PERM).
  Capabilities capabilities = capabilities_;
  const auto xsave_bytes = check_extension(KVM_CAP_XSAVE2);
  if (!xsave_bytes) return std::unexpected(xsave_bytes.error());
  capabilities.xsave_bytes = static_cast<std::size_t>(*xsave_bytes);
  return Vcpu::adopt(FileDescriptor(*created), capabilities, id, options);
}

} // namespace cppvmm
