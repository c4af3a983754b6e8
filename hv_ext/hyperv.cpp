module;
#include <array>
#include <cstdint>
#include <expected>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>
module cppvmm.hv_ext:hyperv.impl;
import :error;
import :extended_hypercalls;
import :hyperv;
import :hyperv_interface;
import :tlfs;
import cppvmm.guest_memory;
import cppvmm.vcpu;

namespace cppvmm {

struct Hyperv::State {
  HypercallTransport transport;
  ExtendedHypercalls hypercalls;
  HypervInterface interface; // transport `user`
  bool enforces_cpuid;       // transport `kernel`

  [[nodiscard]] HvResult<bool> answer(Vcpu& vcpu, const Hypercall& call);
  [[nodiscard]] HvResult<bool> answer(Vcpu& vcpu, const ReadMsr& access);
  [[nodiscard]] HvResult<bool> answer(Vcpu& vcpu, const WriteMsr& access);
  template <class Other>
  [[nodiscard]] HvResult<bool> answer(Vcpu&, const Other&) {
    return false;
  }
};

static std::unexpected<HvError> failed(const char* operation, const KvmError& cause) {
  return std::unexpected(HvError{.code = HvErrc::kvm, .operation = operation, .cause = cause});
}

static HvResult<bool> handled(const KvmResult<void>& done, const char* operation) {
  if (!done) return failed(operation, done.error());
  return true;
}

Hyperv::Hyperv(std::unique_ptr<State> state) : state_(std::move(state)) {}
Hyperv::~Hyperv() = default;
Hyperv::Hyperv(Hyperv&&) noexcept = default;
Hyperv& Hyperv::operator=(Hyperv&&) noexcept = default;

HvResult<Hyperv> Hyperv::create(Vm& vm, const GuestMemory& memory, HvOptions options,
                                std::optional<HypercallTransport> transport) {
  const Capabilities& kvm = vm.capabilities();
  const auto offered = choose_hypercall_transport(kvm);
  if (!transport) {
    if (!offered) return failed("choose a hypercall transport", offered.error());
    transport = *offered;
  }
  if (*transport == HypercallTransport::kernel && (!offered || *offered != HypercallTransport::kernel))
    return std::unexpected(
        HvError{.code = HvErrc::unsupported,
                .operation = "hypercall transport 'kernel': KVM does not forward extended hypercalls"});
  auto hypercalls = ExtendedHypercalls::create(memory, std::move(options));
  if (!hypercalls) return std::unexpected(hypercalls.error());
  if (*transport == HypercallTransport::user)
    if (auto taken = vm.take_hyperv_msrs(); !taken)
      return failed("hypercall transport 'user': take the Hyper-V MSRs", taken.error());
  return Hyperv(std::make_unique<State>(State{.transport = *transport,
                                              .hypercalls = std::move(*hypercalls),
                                              .interface = HypervInterface(memory, user_hypercall_code()),
                                              .enforces_cpuid = kvm.hyperv_enforce_cpuid}));
}

HypercallTransport Hyperv::transport() const { return state_->transport; }
const ExtendedHypercalls& Hyperv::hypercalls() const { return state_->hypercalls; }

HvResult<void> Hyperv::prepare(Vcpu& vcpu, std::vector<CpuidEntry> cpuid) const {
  constexpr std::uint32_t hypervisor_present = 1U << 31;
  std::erase_if(cpuid, [](const CpuidEntry& entry) { return (entry.function & 0xFFFF'FF00) == hv_cpuid_vendor; });
  for (CpuidEntry& entry : cpuid)
    if (entry.function == 1) entry.ecx |= hypervisor_present;
  for (const HvCpuidLeaf& leaf : hv_cpuid_leaves(state_->hypercalls.options()))
    cpuid.push_back({.function = leaf.function, .eax = leaf.eax, .ebx = leaf.ebx, .ecx = leaf.ecx, .edx = leaf.edx});
  if (auto set = vcpu.set_cpuid(cpuid); !set) return failed("set the Hyper-V CPUID leaves", set.error());
  if (state_->transport == HypercallTransport::user) {
    if (auto used = vcpu.use_user_hypercalls(); !used) return failed("trap the hypercall port", used.error());
  } else if (state_->enforces_cpuid) {
    if (auto enforced = vcpu.enforce_hyperv_cpuid(); !enforced)
      return failed("KVM_CAP_HYPERV_ENFORCE_CPUID", enforced.error());
  }
  return {};
}

HvResult<bool> Hyperv::State::answer(Vcpu& vcpu, const Hypercall& call) {
  if (transport == HypercallTransport::kernel) {
    const auto value = vcpu.msr(hv_msr_hypercall);
    if (!value) return failed("read KVM's HYPERCALL MSR", value.error());
    constexpr std::uint64_t enabled = 1;
    hypercalls.set_hypercall_page((*value & enabled) != 0 ? std::optional(GuestAddress(*value).page()) : std::nullopt);
  } else {
    if (!interface.takes_hypercalls()) return handled(vcpu.refuse_hypercall(), "refuse a hypercall");
    hypercalls.set_hypercall_page(interface.hypercall_page());
  }
  const HypercallResult result =
      hypercalls.handle(call.control, GuestAddress(call.input), GuestAddress(call.output), call.cpl);
  if (!result) return handled(vcpu.refuse_hypercall(), "refuse a hypercall");
  return handled(vcpu.complete_hypercall(*result), "complete a hypercall");
}

static bool is_hyperv_msr(std::uint32_t index) {
  return index >= hyperv_msr_first && index - hyperv_msr_first < hyperv_msr_count;
}

HvResult<bool> Hyperv::State::answer(Vcpu& vcpu, const ReadMsr& access) {
  if (transport != HypercallTransport::user || !is_hyperv_msr(access.index)) return false;
  const auto value = interface.read_msr(vcpu.id(), access.index);
  return handled(value ? vcpu.complete_read_msr(*value) : vcpu.refuse_msr(), "answer RDMSR");
}

HvResult<bool> Hyperv::State::answer(Vcpu& vcpu, const WriteMsr& access) {
  if (transport != HypercallTransport::user || !is_hyperv_msr(access.index)) return false;
  const bool taken = interface.write_msr(access.index, access.value);
  return handled(taken ? vcpu.complete_write_msr() : vcpu.refuse_msr(), "answer WRMSR");
}

HvResult<bool> Hyperv::handle(Vcpu& vcpu, const Exit& exit) {
  return std::visit([&](const auto& each) { return state_->answer(vcpu, each); }, exit);
}

HvResult<void> Hyperv::reset(Vcpu& vcpu) {
  state_->interface.reset();
  if (state_->transport != HypercallTransport::kernel) return {};
  // Both are the VM's, by whichever vCPU they are set. KVM ignores writes to HYPERCALL without an OS ID.
  constexpr std::array<MsrEntry, 2> at_power_on = {{{hv_msr_hypercall, 0}, {hv_msr_guest_os_id, 0}}};
  if (auto set = vcpu.set_msrs(at_power_on); !set) return failed("reset KVM's Hyper-V MSRs", set.error());
  return {};
}

} // namespace cppvmm
