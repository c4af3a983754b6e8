module;
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <variant>
#include <vector>
module cppvmm.hv_ext:hyperv.impl;
import :cpuid;
import :error;
import :hyperv;
import :synthetic_msrs;
import cppvmm.guest_memory;
import cppvmm.hv_calls;
import cppvmm.vcpu;

namespace cppvmm {

constexpr std::uint32_t msr_tsc = 0x10; // IA32_TIME_STAMP_COUNTER

struct Hyperv::State {
  HypercallTransport transport;
  ExtendedHypercalls hypercalls;
  HypervInterface interface; // transports `user` and `split`
  bool can_enforce_cpuid;
  /// Ours and KVM's are written as one.
  std::unique_ptr<std::mutex> os_id_writes = std::make_unique<std::mutex>();

  /// Whether the VMM, and not KVM, has this MSR.
  [[nodiscard]] bool owns_msr(std::uint32_t index) const;
  /// KVM's copy of GUEST_OS_ID: with one, KVM takes hypercalls (arch/x86/kvm/hyperv.h, kvm_hv_hypercall_enabled).
  [[nodiscard]] HypervResult<void> tell_os_id(Vcpu& vcpu, std::uint64_t id) const;
  /// Tells the trace, if there is one.
  template <class Event>
  void trace(const Event& event) const {
    if (const HvTrace& told = hypercalls.options().trace) told(event);
  }
  /// The time that its CPUID grants the guest.
  [[nodiscard]] HypervResult<void> give_time(const HvTimeSource& time, const ShownCpuid& shown);

  [[nodiscard]] HypervResult<bool> answer(Vcpu& vcpu, const Hypercall& call);
  [[nodiscard]] HypervResult<bool> answer(Vcpu& vcpu, const ReadMsr& access);
  [[nodiscard]] HypervResult<bool> answer(Vcpu& vcpu, const WriteMsr& access);
  template <class Other>
  [[nodiscard]] HypervResult<bool> answer(Vcpu&, const Other&) {
    return false;
  }
};

static std::unexpected<HypervError> failed(const char* operation, const KvmError& cause) {
  return std::unexpected(HypervError{.code = HypervErrc::kvm, .operation = operation, .cause = cause});
}

static HypervResult<bool> handled(const KvmResult<void>& done, const char* operation) {
  if (!done) return failed(operation, done.error());
  return true;
}

Hyperv::Hyperv(std::unique_ptr<State> state) : state_(std::move(state)) {}
Hyperv::~Hyperv() = default;
Hyperv::Hyperv(Hyperv&&) noexcept = default;
Hyperv& Hyperv::operator=(Hyperv&&) noexcept = default;

HypervResult<Hyperv> Hyperv::create(Vm& vm, const GuestMemory& memory, HvOptions options,
                                    std::optional<HypercallTransport> transport) {
  const Capabilities& kvm = vm.capabilities();
  const auto offered = choose_hypercall_transport(kvm);
  if (!transport) {
    if (!offered) return failed("choose a hypercall transport", offered.error());
    transport = *offered;
  }
  if (*transport == HypercallTransport::kernel && !kvm.forwards_extended_hypercalls)
    return std::unexpected(
        HypervError{.code = HypervErrc::unsupported,
                    .operation = "hypercall transport 'kernel': KVM does not forward extended hypercalls"});
  if (*transport == HypercallTransport::split && !kvm.hyperv_cpuid)
    return std::unexpected(HypervError{.code = HypervErrc::unsupported,
                                       .operation = "hypercall transport 'split': KVM has no Hyper-V of its own"});
  auto hypercalls = ExtendedHypercalls::create(memory, std::move(options));
  if (!hypercalls)
    return std::unexpected(HypervError{
        .code = HypervErrc::invalid_options, .operation = "make the extended hypercalls", .cause = hypercalls.error()});
  if (*transport != HypercallTransport::kernel)
    if (auto taken = vm.take_hyperv_msrs(*transport); !taken)
      return failed("take the Hyper-V MSRs that the VMM answers", taken.error());
  constexpr auto port_only = user_hypercall_code();
  const auto both_ways = split_hypercall_code(hypercall_instruction());
  const bool is_split = *transport == HypercallTransport::split;
  return Hyperv(std::make_unique<State>(
      State{.transport = *transport,
            .hypercalls = std::move(*hypercalls),
            .interface = HypervInterface(memory, is_split ? std::span<const std::byte>(both_ways) : port_only),
            .can_enforce_cpuid = kvm.hyperv_enforce_cpuid}));
}

HypercallTransport Hyperv::transport() const { return state_->transport; }
const ExtendedHypercalls& Hyperv::hypercalls() const { return state_->hypercalls; }
ExtendedHypercalls& Hyperv::hypercalls() { return state_->hypercalls; }

HypervResult<void> Hyperv::State::give_time(const HvTimeSource& time, const ShownCpuid& shown) {
  const CpuidEntry* const features = find_cpuid(shown.entries, hv_cpuid_features);
  const std::uint32_t granted = features == nullptr ? 0 : features->eax;
  const auto refused = [](const char* why) {
    return std::unexpected(HypervError{.code = HypervErrc::invalid_options, .operation = why});
  };
  const bool wants_frequencies = (granted & hv_feature_eax_frequency_msrs) != 0;
  if (!wants_frequencies && (granted & (hv_feature_eax_time_ref_count | hv_feature_eax_reference_tsc)) == 0) return {};
  if (time.tsc_hz == 0) return refused("CPUID leaves with a time that there is none of");
  if (wants_frequencies && time.apic_hz == 0) return refused("CPUID leaves with frequencies that are not known");
  if (auto set = interface.set_time({.tsc_hz = time.tsc_hz, .apic_hz = wants_frequencies ? time.apic_hz : 0}); !set)
    return std::unexpected(
        HypervError{.code = HypervErrc::invalid_options, .operation = "give the guest time", .cause = set.error()});
  return {};
}

HypervResult<void> Hyperv::prepare(Vcpu& vcpu, std::vector<CpuidEntry> cpuid, const HypervCpuid& hyperv) const {
  const bool has_our_time = state_->transport == HypercallTransport::user;
  const HvTimeSource time = has_our_time && hyperv.with_time ? user_time(vcpu) : HvTimeSource{};
  const auto shown = compose_cpuid(std::move(cpuid), hyperv, state_->hypercalls.options(), time);
  if (!shown) return std::unexpected(shown.error());
  if (has_our_time)
    if (auto given = state_->give_time(time, *shown); !given) return given;
  if (auto set = vcpu.set_cpuid(shown->entries); !set) return failed("set the Hyper-V CPUID leaves", set.error());
  for (const CpuidEntry& entry : shown->entries)
    if (is_hypervisor_leaf(entry.function))
      state_->trace(HvCpuidGiven{.vp_index = vcpu.id(),
                                 .function = entry.function,
                                 .eax = entry.eax,
                                 .ebx = entry.ebx,
                                 .ecx = entry.ecx,
                                 .edx = entry.edx});
  if (state_->transport != HypercallTransport::kernel)
    if (auto used = vcpu.use_user_hypercalls(); !used) return failed("trap the hypercall port", used.error());
  if (hyperv.enforce.value_or(state_->transport != HypercallTransport::user && shown->is_minimal &&
                              state_->can_enforce_cpuid))
    if (auto enforced = vcpu.enforce_hyperv_cpuid(); !enforced)
      return failed("KVM_CAP_HYPERV_ENFORCE_CPUID", enforced.error());
  return {};
}

HypervResult<bool> Hyperv::State::answer(Vcpu& vcpu, const Hypercall& call) {
  const HvCall arrived{.control = call.control,
                       .input = GuestAddress(call.input),
                       .output = GuestAddress(call.output),
                       .cpl = call.cpl,
                       .vp_index = vcpu.id()};
  if (transport == HypercallTransport::kernel) {
    const auto value = vcpu.msr(hv_msr_hypercall);
    if (!value) return failed("read KVM's HYPERCALL MSR", value.error());
    hypercalls.set_hypercall_page((*value & hv_hypercall_enabled) != 0 ? std::optional(GuestAddress(*value).page())
                                                                       : std::nullopt);
  } else {
    if (!interface.takes_hypercalls()) {
      trace(HvCallEnded{.call = arrived, .no_result = HvNoResult::undefined_opcode});
      return handled(vcpu.refuse_hypercall(), "refuse a hypercall");
    }
    hypercalls.set_hypercall_page(interface.hypercall_page());
    hypercalls.set_reference_tsc_page(interface.reference_tsc_page());
  }
  const HvCallProgress progress = hypercalls.handle_some(arrived);
  if (progress && progress->is_done) return handled(vcpu.complete_hypercall(progress->value), "complete a hypercall");
  if (progress) return handled(vcpu.continue_hypercall(progress->value), "continue a hypercall");
  if (progress.error() == HvNoResult::not_ours) return false;
  return handled(vcpu.refuse_hypercall(), "refuse a hypercall");
}

bool Hyperv::State::owns_msr(std::uint32_t index) const {
  switch (transport) {
  case HypercallTransport::kernel:
    break;
  case HypercallTransport::split:
    return index >= hyperv_msr_first && index - hyperv_msr_first < split_msr_count;
  case HypercallTransport::user:
    return index >= hyperv_msr_first && index - hyperv_msr_first < hyperv_msr_count;
  }
  return false;
}

HypervResult<void> Hyperv::State::tell_os_id(Vcpu& vcpu, std::uint64_t id) const {
  if (transport == HypercallTransport::user) return {};
  const MsrEntry entry{hv_msr_guest_os_id, id};
  if (auto set = vcpu.set_msrs(std::span(&entry, 1)); !set) return failed("set KVM's GUEST_OS_ID", set.error());
  return {};
}

HypervResult<bool> Hyperv::State::answer(Vcpu& vcpu, const ReadMsr& access) {
  if (!owns_msr(access.index)) return false;
  std::uint64_t tsc = 0;
  if (access.index == hv_msr_time_ref_count) {
    const auto now = vcpu.msr(msr_tsc);
    if (!now) return failed("read a vCPU's TSC", now.error());
    tsc = *now;
  }
  const auto value = interface.read_msr(vcpu.id(), access.index, tsc);
  trace(HvMsrTouched{
      .vp_index = vcpu.id(), .access = HvMsrAccess::read, .index = access.index, .value = value, .is_refused = !value});
  return handled(value ? vcpu.complete_read_msr(*value) : vcpu.refuse_msr(), "answer RDMSR");
}

HypervResult<bool> Hyperv::State::answer(Vcpu& vcpu, const WriteMsr& access) {
  if (!owns_msr(access.index)) return false;
  const auto write = [&]() -> HypervResult<bool> {
    const std::lock_guard lock(*os_id_writes);
    const bool was_taken = interface.write_msr(access.index, access.value);
    if (was_taken && access.index == hv_msr_guest_os_id)
      if (auto told = tell_os_id(vcpu, access.value); !told) return std::unexpected(told.error());
    return was_taken;
  };
  const auto taken = write();
  if (!taken) return taken;
  trace(HvMsrTouched{.vp_index = vcpu.id(),
                     .access = HvMsrAccess::write,
                     .index = access.index,
                     .value = access.value,
                     .is_refused = !*taken});
  return handled(*taken ? vcpu.complete_write_msr() : vcpu.refuse_msr(), "answer WRMSR");
}

HypervResult<bool> Hyperv::handle(Vcpu& vcpu, const Exit& exit) {
  return std::visit([&](const auto& each) { return state_->answer(vcpu, each); }, exit);
}

HypervResult<void> Hyperv::trace_held_msrs(const Vcpu& vcpu) const {
  if (!state_->hypercalls.options().trace || state_->transport == HypercallTransport::user) return {};
  auto held = synthetic_msrs(vcpu);
  if (!held) return std::unexpected(held.error());
  if (state_->transport == HypercallTransport::kernel) {
    const auto own = state(vcpu);
    if (!own) return std::unexpected(own.error());
    held->push_back({hv_msr_guest_os_id, own->guest_os_id});
    held->push_back({hv_msr_hypercall, own->hypercall});
  }
  for (const MsrEntry& entry : *held)
    state_->trace(
        HvMsrTouched{.vp_index = vcpu.id(), .access = HvMsrAccess::held, .index = entry.index, .value = entry.value});
  return {};
}

/// KVM's two MSRs of the VM's, by whichever vCPU they are set. KVM ignores writes to HYPERCALL without an OS ID.
static HypervResult<void> set_kvm_msrs(Vcpu& vcpu, std::uint64_t guest_os_id, std::uint64_t hypercall) {
  const std::array<MsrEntry, 3> in_order = {{{hv_msr_guest_os_id, guest_os_id == 0 ? 1 : guest_os_id},
                                             {hv_msr_hypercall, hypercall},
                                             {hv_msr_guest_os_id, guest_os_id}}};
  if (auto set = vcpu.set_msrs(in_order); !set) return failed("set KVM's Hyper-V MSRs", set.error());
  return {};
}

HypervResult<void> Hyperv::reset(Vcpu& vcpu) {
  state_->interface.reset();
  state_->hypercalls.reset();
  if (state_->transport == HypercallTransport::user) return {};
  if (auto done = reset_synthetic_msrs(vcpu); !done) return done;
  if (state_->transport == HypercallTransport::kernel) return set_kvm_msrs(vcpu, 0, 0);
  return state_->tell_os_id(vcpu, 0);
}

HypervResult<HvState> Hyperv::state(const Vcpu& vcpu) const {
  if (state_->transport == HypercallTransport::split) return state_->interface.state();
  if (state_->transport == HypercallTransport::user) {
    const auto tsc = vcpu.msr(msr_tsc);
    if (!tsc) return failed("read a vCPU's TSC", tsc.error());
    return state_->interface.state(*tsc);
  }
  constexpr std::array<std::uint32_t, 2> indices = {hv_msr_guest_os_id, hv_msr_hypercall};
  const auto found = vcpu.msrs(indices);
  if (!found) return failed("read KVM's Hyper-V MSRs", found.error());
  return HvState{.guest_os_id = (*found)[0].value, .hypercall = (*found)[1].value};
}

HypervResult<void> Hyperv::restore(Vcpu& vcpu, const HvState& state) {
  const auto refused = [](const HvError& cause) {
    return std::unexpected(HypervError{
        .code = HypervErrc::invalid_state, .operation = "restore what the guest has set up", .cause = cause});
  };
  if (state_->transport == HypercallTransport::kernel) {
    if (auto checked = check_hv_state(state); !checked) return refused(checked.error());
    if (state.reference_tsc_sequence != 0)
      return refused({.code = HvErrc::invalid_state,
                      .operation = "a guest that had time of ours, where it is KVM's",
                      .value = state.reference_tsc_sequence});
    state_->hypercalls.reset();
    return set_kvm_msrs(vcpu, state.guest_os_id, state.hypercall);
  }
  if (const auto time = state_->interface.time_source()) {
    const auto khz = vcpu.tsc_khz();
    if (!khz) return failed("read a vCPU's TSC frequency", khz.error());
    if (std::uint64_t{*khz} * 1000 != time->tsc_hz)
      return refused({.code = HvErrc::invalid_state,
                      .operation = "a TSC of another frequency than when CPUID was set",
                      .value = std::uint64_t{*khz} * 1000});
  }
  if (auto restored = state_->interface.restore(state); !restored) return refused(restored.error());
  state_->hypercalls.reset();
  return state_->tell_os_id(vcpu, state.guest_os_id);
}

} // namespace cppvmm
