module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <linux/kvm.h>
#include <memory>
#include <optional>
#include <span>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <utility>
#include <vector>
module cppvmm.vcpu:vcpu.impl;
import :capabilities;
import :convert;
import :cpuid;
import :error;
import :exit;
import :file_descriptor;
import :hypercall;
import :ioctl;
import :registers;
import :state;
import :stop;
import :stop_state;
import :vcpu;

namespace cppvmm {

static_assert(sync_general_registers == KVM_SYNC_X86_REGS && sync_special_registers == KVM_SYNC_X86_SREGS &&
              sync_events == KVM_SYNC_X86_EVENTS);
static_assert(msr_reason_invalid == KVM_MSR_EXIT_REASON_INVAL && msr_reason_unknown == KVM_MSR_EXIT_REASON_UNKNOWN &&
              msr_reason_filter == KVM_MSR_EXIT_REASON_FILTER);

constexpr std::uint32_t exit_memory_fault = 39; // KVM_EXIT_MEMORY_FAULT, newer than some distributions' headers

struct MemoryFaultFields { // kvm_run.memory_fault
  std::uint64_t flags, gpa, size;
};

constexpr std::uint64_t rflags_tf = 1U << 8;
constexpr std::uint64_t rflags_rf = 1U << 16;
constexpr std::uint64_t out_imm8_length = 2; // user_hypercall_code: E6 ib

namespace {

// What the last exit waits for.
enum class Waits : std::uint8_t { nothing, io_in, mmio_read, read_msr, write_msr, kernel_hypercall, user_hypercall };

// The kvm_run page and what KVM maps behind it.
class RunPage {
public:
  RunPage() = default;
  RunPage(const RunPage&) = delete;
  RunPage& operator=(const RunPage&) = delete;
  ~RunPage() {
    if (run_ != nullptr) munmap(run_, bytes_);
  }

  KvmResult<void> map(int descriptor, std::size_t bytes) {
    if (bytes < sizeof(kvm_run)) return failed(KvmErrc::unsupported, "KVM_GET_VCPU_MMAP_SIZE", bytes);
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped == MAP_FAILED) return os_failed("mmap of kvm_run", bytes);
    run_ = static_cast<kvm_run*>(mapped);
    bytes_ = bytes;
    return {};
  }

  [[nodiscard]] kvm_run* get() const { return run_; }

  // `count` accesses of `size` bytes at `offset`; nothing when they do not lie in the mapping.
  [[nodiscard]] std::optional<std::span<std::byte>> io_data(std::uint64_t offset, std::uint8_t size,
                                                            std::uint32_t count) const {
    const std::uint64_t length = std::uint64_t{size} * count;
    if (offset > bytes_ || length > bytes_ - offset) return std::nullopt;
    return std::span(reinterpret_cast<std::byte*>(run_) + offset, length);
  }

private:
  kvm_run* run_ = nullptr;
  std::size_t bytes_ = 0;
};

} // namespace

struct Vcpu::Impl {
  FileDescriptor descriptor;
  RunPage page;
  std::shared_ptr<StopState> stop;
  std::uint32_t id = 0;
  std::uint32_t sync = 0; // sync_* bits in use; special registers only while user hypercalls need them
  std::uint32_t sync_offered = 0;
  bool hyperv_cpuid = false;
  bool hyperv_enforce_cpuid = false;
  bool hyperv_synic = false;
  bool has_synic = false;
  std::size_t xsave_bytes = 0;
  std::size_t nested_state_bytes = 0;
  bool system_event_data = false;
  std::optional<std::uint8_t> hypercall_port;

  Waits waits = Waits::nothing;
  std::span<std::byte> read_data; // where the answer to io_in and mmio_read goes
  bool registers_in_page = false; // kvm_run holds the general registers as they are
  bool special_in_page = false;   // and the special ones
  // Somebody looked at them after the last exit: who does so once will again, and others need not pay for it.
  mutable bool registers_wanted = false;
  mutable bool special_wanted = false;
  bool hypercall_long_mode = false; // of user_hypercall
  kvm_regs hypercall_registers{};   // of user_hypercall

  [[nodiscard]] kvm_run& run() const { return *page.get(); }
  [[nodiscard]] int fd() const { return descriptor.number(); }

  ~Impl() {
    if (stop) stop->detach();
  }

  [[nodiscard]] KvmResult<kvm_regs> get_registers() const;
  [[nodiscard]] KvmResult<kvm_sregs> get_special_registers() const;
  KvmResult<void> put_registers(const kvm_regs& registers);
  KvmResult<void> inject(std::uint8_t vector, std::optional<std::uint32_t> error_code);
  KvmResult<void> finish_pending();
  KvmResult<kvm_regs> take_back_hypercall();

  KvmResult<Exit> decode();
  KvmResult<Exit> decode_io();
  KvmResult<Exit> decode_mmio();
  KvmResult<Exit> decode_user_hypercall();
  Exit decode_hyperv();
  [[nodiscard]] Exit decode_internal_error() const;
};

static std::unexpected<KvmError> moved_from(const char* operation) { return failed(KvmErrc::bad_state, operation); }

// --- making and moving ---

Vcpu::Vcpu(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Vcpu::Vcpu(Vcpu&&) noexcept = default;
Vcpu& Vcpu::operator=(Vcpu&&) noexcept = default;
Vcpu::~Vcpu() = default;

KvmResult<Vcpu> Vcpu::adopt(FileDescriptor descriptor, const Capabilities& capabilities, std::uint32_t id,
                            VcpuOptions options) {
  if (!capabilities.immediate_exit)
    return failed(KvmErrc::unsupported, "KVM_CAP_IMMEDIATE_EXIT", KVM_CAP_IMMEDIATE_EXIT);
  // An ioctl that only a vCPU answers.
  kvm_mp_state state{};
  if (const auto asked = kvm_set(descriptor.number(), KVM_GET_MP_STATE, &state, "KVM_GET_MP_STATE of an adopted vCPU");
      !asked)
    return std::unexpected(asked.error());
  auto impl = std::make_unique<Impl>();
  if (const auto mapped = impl->page.map(descriptor.number(), capabilities.vcpu_mmap_bytes); !mapped)
    return std::unexpected(mapped.error());
  if (const auto installed = install_stop_signal(); !installed) return std::unexpected(installed.error());
  impl->descriptor = std::move(descriptor);
  impl->stop = std::make_shared<StopState>(&impl->run().immediate_exit);
  impl->id = id;
  impl->sync_offered = options.sync_registers ? capabilities.sync_registers : 0;
  impl->sync = impl->sync_offered & sync_general_registers;
  impl->hyperv_cpuid = capabilities.hyperv_cpuid;
  impl->hyperv_enforce_cpuid = capabilities.hyperv_enforce_cpuid;
  impl->hyperv_synic = capabilities.hyperv_synic;
  impl->xsave_bytes = std::max(legacy_xsave_bytes, capabilities.xsave_bytes);
  impl->nested_state_bytes = capabilities.nested_state_bytes;
  impl->system_event_data = capabilities.system_event_data;
  return Vcpu(std::move(impl));
}

std::uint32_t Vcpu::id() const { return impl_ ? impl_->id : 0; }

int Vcpu::descriptor() const { return impl_ ? impl_->fd() : -1; }

bool Vcpu::uses_sync_registers() const { return impl_ && impl_->sync != 0; }

// --- CPUID ---

KvmResult<void> Vcpu::set_cpuid(std::span<const CpuidEntry> entries) {
  if (!impl_) return moved_from("Vcpu::set_cpuid");
  if (entries.size() > CpuidTable::capacity)
    return failed(KvmErrc::invalid_argument, "Vcpu::set_cpuid", entries.size());
  const auto table = std::make_unique<CpuidTable>();
  table->count = static_cast<std::uint32_t>(entries.size());
  std::ranges::transform(entries, table->entries.begin(), [](const CpuidEntry& entry) {
    kvm_cpuid_entry2 to{};
    to.function = entry.function;
    to.index = entry.index;
    to.flags = entry.index_significant ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
    to.eax = entry.eax;
    to.ebx = entry.ebx;
    to.ecx = entry.ecx;
    to.edx = entry.edx;
    return to;
  });
  return kvm_set(impl_->fd(), set_cpuid2_request, table.get(), "KVM_SET_CPUID2", entries.size());
}

KvmResult<std::vector<CpuidEntry>> Vcpu::cpuid() const {
  if (!impl_) return moved_from("Vcpu::cpuid");
  return get_cpuid(impl_->fd(), get_cpuid2_request, "KVM_GET_CPUID2");
}

KvmResult<std::vector<CpuidEntry>> Vcpu::supported_hv_cpuid() const {
  if (!impl_) return moved_from("Vcpu::supported_hv_cpuid");
  if (!impl_->hyperv_cpuid) return failed(KvmErrc::unsupported, "KVM_CAP_HYPERV_CPUID", KVM_CAP_HYPERV_CPUID);
  return get_cpuid(impl_->fd(), get_supported_hv_cpuid_request, "KVM_GET_SUPPORTED_HV_CPUID of a vCPU");
}

// --- registers ---

KvmResult<kvm_regs> Vcpu::Impl::get_registers() const {
  registers_wanted = true;
  if (registers_in_page) return run().s.regs.regs;
  kvm_regs registers{};
  if (const auto got = kvm_set(fd(), KVM_GET_REGS, &registers, "KVM_GET_REGS"); !got)
    return std::unexpected(got.error());
  return registers;
}

KvmResult<kvm_sregs> Vcpu::Impl::get_special_registers() const {
  special_wanted = true;
  if (special_in_page) return run().s.regs.sregs;
  kvm_sregs registers{};
  if (const auto got = kvm_set(fd(), KVM_GET_SREGS, &registers, "KVM_GET_SREGS"); !got)
    return std::unexpected(got.error());
  return registers;
}

KvmResult<void> Vcpu::Impl::put_registers(const kvm_regs& registers) {
  if (const auto set = kvm_set(fd(), KVM_SET_REGS, &registers, "KVM_SET_REGS", registers.rip); !set) return set;
  run().kvm_dirty_regs = 0;
  registers_in_page = false;
  return {};
}

KvmResult<Registers> Vcpu::registers() const {
  if (!impl_) return moved_from("Vcpu::registers");
  const auto got = impl_->get_registers();
  if (!got) return std::unexpected(got.error());
  return from_kvm(*got);
}

KvmResult<void> Vcpu::set_registers(const Registers& registers) {
  if (!impl_) return moved_from("Vcpu::set_registers");
  return impl_->put_registers(to_kvm(registers));
}

KvmResult<SpecialRegisters> Vcpu::special_registers() const {
  if (!impl_) return moved_from("Vcpu::special_registers");
  const auto got = impl_->get_special_registers();
  if (!got) return std::unexpected(got.error());
  return from_kvm(*got);
}

KvmResult<void> Vcpu::set_special_registers(const SpecialRegisters& registers) {
  if (!impl_) return moved_from("Vcpu::set_special_registers");
  const kvm_sregs to = to_kvm(registers);
  if (const auto set = kvm_set(impl_->fd(), KVM_SET_SREGS, &to, "KVM_SET_SREGS", to.efer); !set) return set;
  impl_->special_in_page = false;
  return {};
}

KvmResult<std::uint64_t> Vcpu::msr(std::uint32_t index) const {
  if (!impl_) return moved_from("Vcpu::msr");
  MsrTable<1> table;
  table.count = 1;
  table.entries[0].index = index;
  const auto got = kvm_ioctl(impl_->fd(), get_msrs_request, &table, "KVM_GET_MSRS", index);
  if (!got) return std::unexpected(got.error());
  if (*got < 1) return failed(KvmErrc::unsupported, "KVM_GET_MSRS", index);
  return table.entries[0].data;
}

KvmResult<std::vector<MsrEntry>> Vcpu::msrs(std::span<const std::uint32_t> indices) const {
  if (!impl_) return moved_from("Vcpu::msrs");
  std::vector<MsrEntry> result;
  result.reserve(indices.size());
  while (!indices.empty()) {
    const auto part = indices.first(std::min<std::size_t>(indices.size(), most_msrs));
    MsrTable<most_msrs> table;
    table.count = static_cast<std::uint32_t>(part.size());
    for (std::size_t i = 0; i < part.size(); ++i)
      table.entries[i].index = part[i];
    const auto got = kvm_ioctl(impl_->fd(), get_msrs_request, &table, "KVM_GET_MSRS", part[0]);
    if (!got) return std::unexpected(got.error());
    const auto count = static_cast<std::size_t>(*got);
    if (count < part.size()) return failed(KvmErrc::unsupported, "KVM_GET_MSRS", part[count]);
    for (std::size_t i = 0; i < part.size(); ++i)
      result.push_back({.index = part[i], .value = table.entries[i].data});
    indices = indices.subspan(part.size());
  }
  return result;
}

KvmResult<void> Vcpu::set_msrs(std::span<const MsrEntry> entries) {
  if (!impl_) return moved_from("Vcpu::set_msrs");
  impl_->special_in_page = false; // some of these are among them
  while (!entries.empty()) {
    const auto part = entries.first(std::min<std::size_t>(entries.size(), most_msrs));
    MsrTable<most_msrs> table;
    table.count = static_cast<std::uint32_t>(part.size());
    for (std::size_t i = 0; i < part.size(); ++i) {
      table.entries[i].index = part[i].index;
      table.entries[i].data = part[i].value;
    }
    const auto set = kvm_ioctl(impl_->fd(), set_msrs_request, &table, "KVM_SET_MSRS", part[0].index);
    if (!set) return std::unexpected(set.error());
    const auto count = static_cast<std::size_t>(*set);
    if (count < part.size()) return failed(KvmErrc::unsupported, "KVM_SET_MSRS", part[count].index);
    entries = entries.subspan(part.size());
  }
  return {};
}

// A structure of the kernel's, whose bytes `State` has.
template <class Kernel, class State>
static KvmResult<State> get_state(int descriptor, unsigned long request, const char* operation) {
  static_assert(sizeof(State) == sizeof(Kernel));
  State state;
  if (const auto got = kvm_set(descriptor, request, &state, operation); !got) return std::unexpected(got.error());
  return state;
}

KvmResult<VcpuEvents> Vcpu::events() const {
  if (!impl_) return moved_from("Vcpu::events");
  return get_state<kvm_vcpu_events, VcpuEvents>(impl_->fd(), KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS");
}

KvmResult<void> Vcpu::set_events(const VcpuEvents& events) {
  if (!impl_) return moved_from("Vcpu::set_events");
  impl_->special_in_page = false; // some of these are among them
  return kvm_set(impl_->fd(), KVM_SET_VCPU_EVENTS, &events, "KVM_SET_VCPU_EVENTS");
}

KvmResult<DebugRegisters> Vcpu::debug_registers() const {
  if (!impl_) return moved_from("Vcpu::debug_registers");
  return get_state<kvm_debugregs, DebugRegisters>(impl_->fd(), KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS");
}

KvmResult<void> Vcpu::set_debug_registers(const DebugRegisters& registers) {
  if (!impl_) return moved_from("Vcpu::set_debug_registers");
  return kvm_set(impl_->fd(), KVM_SET_DEBUGREGS, &registers, "KVM_SET_DEBUGREGS");
}

KvmResult<ExtendedControlRegisters> Vcpu::extended_control_registers() const {
  if (!impl_) return moved_from("Vcpu::extended_control_registers");
  return get_state<kvm_xcrs, ExtendedControlRegisters>(impl_->fd(), KVM_GET_XCRS, "KVM_GET_XCRS");
}

KvmResult<void> Vcpu::set_extended_control_registers(const ExtendedControlRegisters& registers) {
  if (!impl_) return moved_from("Vcpu::set_extended_control_registers");
  return kvm_set(impl_->fd(), KVM_SET_XCRS, &registers, "KVM_SET_XCRS");
}

KvmResult<Xsave> Vcpu::xsave() const {
  if (!impl_) return moved_from("Vcpu::xsave");
  Xsave state{.bytes = std::vector<std::byte>(impl_->xsave_bytes)};
  const bool is_larger = impl_->xsave_bytes > legacy_xsave_bytes;
  if (const auto got = kvm_set(impl_->fd(), is_larger ? get_xsave2_request : get_xsave_request, state.bytes.data(),
                               is_larger ? "KVM_GET_XSAVE2" : "KVM_GET_XSAVE");
      !got)
    return std::unexpected(got.error());
  return state;
}

KvmResult<void> Vcpu::set_xsave(const Xsave& xsave) {
  if (!impl_) return moved_from("Vcpu::set_xsave");
  if (xsave.bytes.size() != impl_->xsave_bytes)
    return failed(KvmErrc::invalid_argument, "Vcpu::set_xsave: bytes", xsave.bytes.size());
  return kvm_set(impl_->fd(), set_xsave_request, xsave.bytes.data(), "KVM_SET_XSAVE");
}

KvmResult<NestedState> Vcpu::nested_state() const {
  if (!impl_) return moved_from("Vcpu::nested_state");
  if (impl_->nested_state_bytes < sizeof(kvm_nested_state))
    return failed(KvmErrc::unsupported, "KVM_CAP_NESTED_STATE", KVM_CAP_NESTED_STATE);
  NestedState state{.bytes = std::vector<std::byte>(impl_->nested_state_bytes)};
  kvm_nested_state head{};
  head.size = static_cast<std::uint32_t>(state.bytes.size());
  std::memcpy(state.bytes.data(), &head, sizeof head);
  if (const auto got = kvm_set(impl_->fd(), KVM_GET_NESTED_STATE, state.bytes.data(), "KVM_GET_NESTED_STATE"); !got)
    return std::unexpected(got.error());
  std::memcpy(&head, state.bytes.data(), sizeof head);
  state.bytes.resize(std::min<std::size_t>(head.size, state.bytes.size()));
  return state;
}

KvmResult<void> Vcpu::set_nested_state(const NestedState& nested) {
  if (!impl_) return moved_from("Vcpu::set_nested_state");
  impl_->special_in_page = false; // some of these are among them
  if (impl_->nested_state_bytes < sizeof(kvm_nested_state))
    return failed(KvmErrc::unsupported, "KVM_CAP_NESTED_STATE", KVM_CAP_NESTED_STATE);
  kvm_nested_state head{};
  const bool has_head = nested.bytes.size() >= sizeof head;
  if (has_head) std::memcpy(&head, nested.bytes.data(), sizeof head);
  // KVM reads as many as are said.
  if (!has_head || head.size != nested.bytes.size() || nested.bytes.size() > impl_->nested_state_bytes)
    return failed(KvmErrc::invalid_argument, "Vcpu::set_nested_state: bytes", nested.bytes.size());
  return kvm_set(impl_->fd(), KVM_SET_NESTED_STATE, nested.bytes.data(), "KVM_SET_NESTED_STATE");
}

KvmResult<LocalApic> Vcpu::local_apic() const {
  if (!impl_) return moved_from("Vcpu::local_apic");
  return get_state<kvm_lapic_state, LocalApic>(impl_->fd(), KVM_GET_LAPIC, "KVM_GET_LAPIC");
}

KvmResult<void> Vcpu::set_local_apic(const LocalApic& apic) {
  if (!impl_) return moved_from("Vcpu::set_local_apic");
  impl_->special_in_page = false; // some of these are among them
  return kvm_set(impl_->fd(), KVM_SET_LAPIC, &apic, "KVM_SET_LAPIC");
}

KvmResult<std::uint32_t> Vcpu::tsc_khz() const {
  if (!impl_) return moved_from("Vcpu::tsc_khz");
  const auto khz = kvm_ioctl(impl_->fd(), KVM_GET_TSC_KHZ, std::uintptr_t{0}, "KVM_GET_TSC_KHZ");
  if (!khz) return std::unexpected(khz.error());
  if (*khz <= 0) return failed(KvmErrc::unsupported, "KVM_GET_TSC_KHZ");
  return static_cast<std::uint32_t>(*khz);
}

KvmResult<void> Vcpu::set_tsc_khz(std::uint32_t khz) {
  if (!impl_) return moved_from("Vcpu::set_tsc_khz");
  const auto set = kvm_ioctl(impl_->fd(), KVM_SET_TSC_KHZ, std::uintptr_t{khz}, "KVM_SET_TSC_KHZ", khz);
  if (!set) return std::unexpected(set.error());
  return {};
}

KvmResult<MpState> Vcpu::mp_state() const {
  if (!impl_) return moved_from("Vcpu::mp_state");
  kvm_mp_state state{};
  if (const auto got = kvm_set(impl_->fd(), KVM_GET_MP_STATE, &state, "KVM_GET_MP_STATE"); !got)
    return std::unexpected(got.error());
  return static_cast<MpState>(state.mp_state);
}

KvmResult<void> Vcpu::set_mp_state(MpState state) {
  if (!impl_) return moved_from("Vcpu::set_mp_state");
  const kvm_mp_state to{.mp_state = static_cast<std::uint32_t>(state)};
  return kvm_set(impl_->fd(), KVM_SET_MP_STATE, &to, "KVM_SET_MP_STATE", to.mp_state);
}

// --- exceptions and interrupts ---

KvmResult<void> Vcpu::Impl::inject(std::uint8_t vector, std::optional<std::uint32_t> error_code) {
  kvm_vcpu_events events{};
  if (const auto got = kvm_set(fd(), KVM_GET_VCPU_EVENTS, &events, "KVM_GET_VCPU_EVENTS"); !got) return got;
  if (events.exception.injected != 0 || events.exception.pending != 0)
    return failed(KvmErrc::bad_state, "an exception waits already", events.exception.nr);
  events.exception.injected = 1;
  events.exception.pending = 0;
  events.exception.nr = vector;
  events.exception.has_error_code = error_code.has_value();
  events.exception.error_code = error_code.value_or(0);
  events.flags = 0; // of the rest, leave what may be left
  return kvm_set(fd(), KVM_SET_VCPU_EVENTS, &events, "KVM_SET_VCPU_EVENTS", vector);
}

KvmResult<void> Vcpu::inject_exception(ExceptionVector vector, std::optional<std::uint32_t> error_code) {
  if (!impl_) return moved_from("Vcpu::inject_exception");
  if (impl_->waits != Waits::nothing)
    return failed(KvmErrc::bad_state, "Vcpu::inject_exception: an exit waits for its answer");
  return impl_->inject(static_cast<std::uint8_t>(vector), error_code);
}

KvmResult<void> Vcpu::inject_interrupt(std::uint8_t vector) {
  if (!impl_) return moved_from("Vcpu::inject_interrupt");
  const kvm_interrupt interrupt{.irq = vector};
  return kvm_set(impl_->fd(), KVM_INTERRUPT, &interrupt, "KVM_INTERRUPT", vector);
}

bool Vcpu::ready_for_interrupt() const { return impl_ && impl_->run().ready_for_interrupt_injection != 0; }

KvmResult<void> Vcpu::request_interrupt_window(bool wanted) {
  if (!impl_) return moved_from("Vcpu::request_interrupt_window");
  impl_->run().request_interrupt_window = wanted;
  return {};
}

// --- running ---

KvmResult<Exit> Vcpu::run() {
  if (!impl_) return moved_from("Vcpu::run");
  Impl& impl = *impl_;
  switch (impl.waits) {
  case Waits::read_msr:
  case Waits::write_msr:
  case Waits::kernel_hypercall:
  case Waits::user_hypercall:
    return failed(KvmErrc::bad_state, "Vcpu::run: an exit waits for its answer");
  case Waits::nothing:
  case Waits::io_in:
  case Waits::mmio_read:
    break;
  }
  impl.waits = Waits::nothing;
  if (const auto unblocked = unblock_stop_signal(); !unblocked) return std::unexpected(unblocked.error());

  kvm_run& run = impl.run();
  const std::uint32_t stored = impl.sync & ((impl.registers_wanted ? sync_general_registers : 0U) |
                                            (impl.special_wanted ? sync_special_registers : 0U));
  impl.registers_wanted = false;
  impl.special_wanted = false;
  run.kvm_valid_regs = stored;
  run.exit_reason = KVM_EXIT_UNKNOWN; // older kernels leave it as it was when KVM_RUN fails
  impl.stop->enter();
  const int result = ioctl(impl.fd(), KVM_RUN, 0);
  const int error = result < 0 ? errno : 0;
  // EAGAIN: a processor that waits for its start-up was kicked, and may go on.
  const bool interrupted = error == EINTR || error == EAGAIN || (error == 0 && run.exit_reason == KVM_EXIT_INTR);
  const bool stopped = impl.stop->leave(interrupted);

  const bool stores_general = (stored & sync_general_registers) != 0;
  const bool stores_special = (stored & sync_special_registers) != 0;
  if (error == 0) {
    impl.registers_in_page = stores_general;
    impl.special_in_page = stores_special;
  } else if (!interrupted) {
    impl.registers_in_page = false;
    impl.special_in_page = false;
  } else {
    // KVM has stored those that it was asked for, or has not come as far as to change any. What it has not taken from
    // the page is still there.
    impl.registers_in_page &= stores_general || (run.kvm_dirty_regs & KVM_SYNC_X86_REGS) != 0;
    impl.special_in_page &= stores_special;
  }
  if (interrupted) return Interrupted{.stop_requested = stopped};
  if (error == 0) return impl.decode();
  if (error == EFAULT || error == EHWPOISON) {
    if (run.exit_reason != exit_memory_fault) return MemoryFault{.os_error = error};
    MemoryFaultFields fields;
    static_assert(sizeof fields <= sizeof run.padding);
    std::memcpy(&fields, run.padding, sizeof fields);
    return MemoryFault{.flags = fields.flags, .address = fields.gpa, .size = fields.size, .os_error = error};
  }
  errno = error;
  return os_failed("KVM_RUN", run.exit_reason);
}

StopHandle Vcpu::stop_handle() const { return impl_ ? StopHandle(impl_->stop) : StopHandle(); }

bool Vcpu::acknowledge_stop() { return impl_ && impl_->stop->acknowledge(); }

// Has KVM finish what the last exit left open, without running the guest.
KvmResult<void> Vcpu::Impl::finish_pending() {
  run().kvm_valid_regs = sync;
  stop->force_immediate_exit();
  int error = 0;
  do
    error = ioctl(fd(), KVM_RUN, 0) < 0 ? errno : 0;
  while (error == EAGAIN);
  stop->end_immediate_exit();
  registers_in_page = false;
  special_in_page = false;
  if (error == 0 || error == EINTR) return {}; // 0: a single step that was asked for ended with the instruction
  errno = error;
  return os_failed("KVM_RUN with immediate_exit");
}

// --- exits ---

KvmResult<Exit> Vcpu::Impl::decode() {
  kvm_run& page_run = run();
  switch (page_run.exit_reason) {
  case KVM_EXIT_IO:
    return decode_io();
  case KVM_EXIT_MMIO:
    return decode_mmio();
  case KVM_EXIT_HYPERV:
    return decode_hyperv();
  case KVM_EXIT_INTERNAL_ERROR:
    return decode_internal_error();
  case KVM_EXIT_HLT:
    return Hlt{};
  case KVM_EXIT_SHUTDOWN:
    return Shutdown{};
  case KVM_EXIT_IRQ_WINDOW_OPEN:
    return InterruptWindowOpen{};
  case KVM_EXIT_IOAPIC_EOI:
    return IoApicEoi{.vector = page_run.eoi.vector};
  case KVM_EXIT_FAIL_ENTRY:
    return FailEntry{.hardware_reason = page_run.fail_entry.hardware_entry_failure_reason,
                     .cpu = page_run.fail_entry.cpu};
  case KVM_EXIT_DEBUG:
    return Debug{.exception = page_run.debug.arch.exception,
                 .rip = page_run.debug.arch.pc,
                 .dr6 = page_run.debug.arch.dr6,
                 .dr7 = page_run.debug.arch.dr7};
  case KVM_EXIT_X86_RDMSR:
    waits = Waits::read_msr;
    return ReadMsr{.index = page_run.msr.index, .reason = page_run.msr.reason};
  case KVM_EXIT_X86_WRMSR:
    waits = Waits::write_msr;
    return WriteMsr{.index = page_run.msr.index, .value = page_run.msr.data, .reason = page_run.msr.reason};
  case KVM_EXIT_SYSTEM_EVENT: {
    // Before KVM_CAP_SYSTEM_EVENT_DATA the count is padding, and the first value the flags.
    const std::size_t count =
        system_event_data ? std::min<std::size_t>(page_run.system_event.ndata, std::size(page_run.system_event.data))
                          : 1;
    return SystemEvent{.type = page_run.system_event.type,
                       .data = {reinterpret_cast<const std::uint64_t*>(page_run.system_event.data), count}};
  }
  case KVM_EXIT_UNKNOWN:
    return UnknownExit{.reason = KVM_EXIT_UNKNOWN, .hardware_reason = page_run.hw.hardware_exit_reason};
  default:
    return UnknownExit{.reason = page_run.exit_reason};
  }
}

KvmResult<Exit> Vcpu::Impl::decode_io() {
  const auto io = run().io;
  const auto data = page.io_data(io.data_offset, io.size, io.count);
  if (!data) return failed(KvmErrc::bad_state, "KVM_EXIT_IO: data outside of kvm_run", io.data_offset);
  if (io.direction == KVM_EXIT_IO_IN) {
    std::ranges::fill(*data, std::byte{0xFF});
    waits = Waits::io_in;
    read_data = *data;
    return IoIn{.port = io.port, .size = io.size, .count = io.count};
  }
  const IoOut out{.port = io.port, .size = io.size, .count = io.count, .data = *data};
  if (hypercall_port && out.port == *hypercall_port && out.size == 1 && out.count == 1) return decode_user_hypercall();
  return out;
}

KvmResult<Exit> Vcpu::Impl::decode_mmio() {
  auto& mmio = run().mmio;
  if (mmio.len > sizeof mmio.data) return failed(KvmErrc::bad_state, "KVM_EXIT_MMIO: more data than fits", mmio.len);
  const auto data = std::as_writable_bytes(std::span(mmio.data)).first(mmio.len);
  if (mmio.is_write != 0) return MmioWrite{.address = mmio.phys_addr, .data = data};
  std::ranges::fill(data, std::byte{0xFF});
  waits = Waits::mmio_read;
  read_data = data;
  return MmioRead{.address = mmio.phys_addr, .size = mmio.len};
}

Exit Vcpu::Impl::decode_hyperv() {
  const kvm_hyperv_exit& hyperv = run().hyperv;
  if (hyperv.type != KVM_EXIT_HYPERV_HCALL) return HypervEvent{.type = hyperv.type};
  waits = Waits::kernel_hypercall;
  return Hypercall{.control = hyperv.u.hcall.input,
                   .input = hyperv.u.hcall.params[0],
                   .output = hyperv.u.hcall.params[1],
                   .cpl = 0,
                   .long_mode = true,
                   .transport = HypercallTransport::kernel};
}

// The 32-bit convention's pair of registers.
static std::uint64_t pair(std::uint64_t high, std::uint64_t low) { return high << 32 | (low & 0xFFFF'FFFF); }

static void put_edx_eax(kvm_regs& registers, std::uint64_t value) {
  registers.rdx = value >> 32;
  registers.rax = value & 0xFFFF'FFFF;
}

static bool is_64_bit_code(const kvm_sregs& special) { return (special.efer & efer_lma) != 0 && special.cs.l != 0; }

KvmResult<Exit> Vcpu::Impl::decode_user_hypercall() {
  const auto general = get_registers();
  if (!general) return std::unexpected(general.error());
  const auto special = get_special_registers();
  if (!special) return std::unexpected(special.error());
  Hypercall call{.cpl = 3, .transport = HypercallTransport::user};
  if ((special->cr0 & cr0_pe) != 0) call.cpl = special->ss.dpl & 3;
  call.long_mode = is_64_bit_code(*special);
  if (call.long_mode) {
    call.control = general->rcx;
    call.input = general->rdx;
    call.output = general->r8;
  } else {
    call.control = pair(general->rdx, general->rax);
    call.input = pair(general->rbx, general->rcx);
    call.output = pair(general->rdi, general->rsi);
  }
  waits = Waits::user_hypercall;
  hypercall_long_mode = call.long_mode;
  hypercall_registers = *general;
  return call;
}

Exit Vcpu::Impl::decode_internal_error() const {
  const auto& internal = run().internal;
  const std::size_t count = std::min<std::size_t>(internal.ndata, std::size(internal.data));
  InternalError error{.suberror = internal.suberror,
                      .data = {reinterpret_cast<const std::uint64_t*>(internal.data), count}};
  // The flags and the instruction fill three values.
  const auto& emulation = run().emulation_failure;
  if (internal.suberror == KVM_INTERNAL_ERROR_EMULATION && count >= 3 &&
      (emulation.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0)
    error.instruction = std::as_bytes(std::span(emulation.insn_bytes))
                            .first(std::min<std::size_t>(emulation.insn_size, std::size(emulation.insn_bytes)));
  return error;
}

// --- answers ---

KvmResult<void> Vcpu::complete_io_in(std::span<const std::byte> data) {
  if (!impl_ || impl_->waits != Waits::io_in) return failed(KvmErrc::bad_state, "Vcpu::complete_io_in");
  if (data.size() != impl_->read_data.size())
    return failed(KvmErrc::invalid_argument, "Vcpu::complete_io_in: bytes expected", impl_->read_data.size());
  std::ranges::copy(data, impl_->read_data.begin());
  impl_->waits = Waits::nothing;
  return {};
}

KvmResult<void> Vcpu::complete_mmio_read(std::span<const std::byte> data) {
  if (!impl_ || impl_->waits != Waits::mmio_read) return failed(KvmErrc::bad_state, "Vcpu::complete_mmio_read");
  if (data.size() != impl_->read_data.size())
    return failed(KvmErrc::invalid_argument, "Vcpu::complete_mmio_read: bytes expected", impl_->read_data.size());
  std::ranges::copy(data, impl_->read_data.begin());
  impl_->waits = Waits::nothing;
  return {};
}

KvmResult<void> Vcpu::complete_read_msr(std::uint64_t value) {
  if (!impl_ || impl_->waits != Waits::read_msr) return failed(KvmErrc::bad_state, "Vcpu::complete_read_msr");
  impl_->run().msr.error = 0;
  impl_->run().msr.data = value;
  impl_->waits = Waits::nothing;
  return {};
}

KvmResult<void> Vcpu::complete_write_msr() {
  if (!impl_ || impl_->waits != Waits::write_msr) return failed(KvmErrc::bad_state, "Vcpu::complete_write_msr");
  impl_->run().msr.error = 0;
  impl_->waits = Waits::nothing;
  return {};
}

KvmResult<void> Vcpu::refuse_msr() {
  if (!impl_ || (impl_->waits != Waits::read_msr && impl_->waits != Waits::write_msr))
    return failed(KvmErrc::bad_state, "Vcpu::refuse_msr");
  impl_->run().msr.error = 1;
  impl_->waits = Waits::nothing;
  return {};
}

KvmResult<void> Vcpu::complete_hypercall(std::uint64_t result) {
  if (!impl_) return moved_from("Vcpu::complete_hypercall");
  Impl& impl = *impl_;
  if (impl.waits == Waits::kernel_hypercall) {
    impl.run().hyperv.u.hcall.result = result;
    impl.waits = Waits::nothing;
    return {};
  }
  if (impl.waits != Waits::user_hypercall) return failed(KvmErrc::bad_state, "Vcpu::complete_hypercall");
  kvm_regs registers = impl.hypercall_registers;
  if (impl.hypercall_long_mode) {
    registers.rax = result;
  } else {
    put_edx_eax(registers, result);
  }
  if ((impl.sync & sync_general_registers) != 0) {
    impl.run().s.regs.regs = registers;
    impl.run().kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    impl.registers_in_page = true;
  } else if (const auto put = impl.put_registers(registers); !put) {
    return put;
  }
  impl.waits = Waits::nothing;
  return {};
}

// Ends the hypercall that waits as if it had not been made. Its registers, RIP at the trapping instruction: those that
// the guest gets are for the caller to set.
KvmResult<kvm_regs> Vcpu::Impl::take_back_hypercall() {
  kvm_regs registers = hypercall_registers;
  if (waits == Waits::kernel_hypercall) {
    const auto got = get_registers();
    if (!got) return std::unexpected(got.error());
    registers = *got;
    run().hyperv.u.hcall.result = 0;
  }
  // The step below is none that a guest which single-steps itself may see: DR6 tells it, and an exception that
  // KVM_SET_REGS drops.
  const bool steps_itself = (registers.rflags & rflags_tf) != 0;
  kvm_debugregs debug{};
  if (steps_itself) {
    if (const auto got = kvm_set(fd(), KVM_GET_DEBUGREGS, &debug, "KVM_GET_DEBUGREGS"); !got)
      return std::unexpected(got.error());
  }
  // KVM that runs the guest on the processor stops at the instruction and steps over it when KVM_RUN is called again;
  // KVM that emulates it has stepped over it already. Let the step happen, then go back.
  if (const auto finished = finish_pending(); !finished) return std::unexpected(finished.error());
  const auto after = get_registers();
  if (!after) return std::unexpected(after.error());
  if (after->rip == registers.rip) {
    registers.rip -= out_imm8_length;
    if (!hypercall_long_mode) registers.rip &= 0xFFFF'FFFF;
  }
  if (steps_itself) {
    if (const auto put = kvm_set(fd(), KVM_SET_DEBUGREGS, &debug, "KVM_SET_DEBUGREGS"); !put)
      return std::unexpected(put.error());
  }
  return registers;
}

KvmResult<void> Vcpu::continue_hypercall(std::uint64_t control) {
  if (!impl_) return moved_from("Vcpu::continue_hypercall");
  Impl& impl = *impl_;
  bool long_mode = impl.hypercall_long_mode;
  if (impl.waits == Waits::kernel_hypercall) {
    const auto special = impl.get_special_registers();
    if (!special) return std::unexpected(special.error());
    long_mode = is_64_bit_code(*special);
  } else if (impl.waits != Waits::user_hypercall) {
    return failed(KvmErrc::bad_state, "Vcpu::continue_hypercall");
  }
  auto registers = impl.take_back_hypercall();
  if (!registers) return std::unexpected(registers.error());
  if (long_mode) {
    registers->rcx = control;
  } else {
    put_edx_eax(*registers, control);
  }
  if (const auto put = impl.put_registers(*registers); !put) return put;
  impl.waits = Waits::nothing;
  return {};
}

KvmResult<void> Vcpu::refuse_hypercall() {
  if (!impl_) return moved_from("Vcpu::refuse_hypercall");
  Impl& impl = *impl_;
  if (impl.waits != Waits::user_hypercall && impl.waits != Waits::kernel_hypercall)
    return failed(KvmErrc::bad_state, "Vcpu::refuse_hypercall");
  auto registers = impl.take_back_hypercall();
  if (!registers) return std::unexpected(registers.error());
  registers->rflags |= rflags_rf; // as every fault pushes it (Intel SDM vol. 3, 18.3.1.1)
  if (const auto put = impl.put_registers(*registers); !put) return put;
  impl.waits = Waits::nothing;
  return impl.inject(static_cast<std::uint8_t>(ExceptionVector::invalid_opcode), std::nullopt);
}

// --- hypercalls ---

KvmResult<void> Vcpu::use_user_hypercalls(std::uint8_t port) {
  if (!impl_) return moved_from("Vcpu::use_user_hypercalls");
  if (port == unusable_hypercall_port) return failed(KvmErrc::invalid_argument, "Vcpu::use_user_hypercalls", port);
  impl_->hypercall_port = port;
  // A call's privilege level and mode come with the special registers.
  if ((impl_->sync & sync_general_registers) != 0) impl_->sync |= impl_->sync_offered & sync_special_registers;
  return {};
}

KvmResult<void> Vcpu::enable_hyperv_synic() {
  if (!impl_) return moved_from("Vcpu::enable_hyperv_synic");
  if (!impl_->hyperv_synic) return failed(KvmErrc::unsupported, "KVM_CAP_HYPERV_SYNIC2", KVM_CAP_HYPERV_SYNIC2);
  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_HYPERV_SYNIC2;
  auto enabled = kvm_set(impl_->fd(), KVM_ENABLE_CAP, &enable, "KVM_ENABLE_CAP KVM_CAP_HYPERV_SYNIC2");
  impl_->has_synic = enabled.has_value() || impl_->has_synic;
  return enabled;
}

bool Vcpu::has_hyperv_synic() const { return impl_ && impl_->has_synic; }

KvmResult<void> Vcpu::enforce_hyperv_cpuid(bool enforced) {
  if (!impl_) return moved_from("Vcpu::enforce_hyperv_cpuid");
  if (!impl_->hyperv_enforce_cpuid)
    return failed(KvmErrc::unsupported, "KVM_CAP_HYPERV_ENFORCE_CPUID", KVM_CAP_HYPERV_ENFORCE_CPUID);
  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_HYPERV_ENFORCE_CPUID;
  enable.args[0] = enforced;
  return kvm_set(impl_->fd(), KVM_ENABLE_CAP, &enable, "KVM_ENABLE_CAP KVM_CAP_HYPERV_ENFORCE_CPUID");
}

} // namespace cppvmm
