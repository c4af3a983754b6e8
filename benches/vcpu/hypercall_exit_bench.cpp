#include "support/beside.hpp"
#include "vcpu/exiting_guest.hpp"
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <linux/kvm.h>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <sys/ioctl.h>
#include <system_error>
#include <variant>
import cppvmm.guest_memory;
import cppvmm.hv_ext;
import cppvmm.vcpu;

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

// HvExtCallQueryCapabilities from the guest's hypercall page and back, answered in its memory: through Hyperv::handle,
// beside a loop that knows this one call.

constexpr std::uint64_t query_capabilities = 0x8001;
constexpr std::uint64_t hypercall_page = ExitingGuest::free;
constexpr std::uint64_t output = ExitingGuest::free + 0x1000;
constexpr std::uint64_t result = ExitingGuest::free + 0x2000; // where the guest puts RAX

Code calling_guest() {
  Code code;
  code.wrmsr(hv_msr_guest_os_id, 0x8100'0000'0000'0001);
  code.wrmsr(hv_msr_hypercall, hypercall_page | hv_hypercall_enabled);
  const std::size_t begin = code.size();
  code.raw({0xB9}).value(static_cast<std::uint32_t>(query_capabilities));       // mov ecx
  code.raw({0x31, 0xD2});                                                       // xor edx, edx
  code.raw({0x41, 0xB8}).value(static_cast<std::uint32_t>(output));             // mov r8d
  code.raw({0xB8}).value(static_cast<std::uint32_t>(hypercall_page));           // mov eax
  code.raw({0xFF, 0xD0});                                                       // call rax
  code.raw({0x48, 0x89, 0x04, 0x25}).value(static_cast<std::uint32_t>(result)); // mov [result], rax
  return code.jump(begin);
}

/// The guest with its vCPU, which has Hyper-V's CPUID.
struct Machine {
  ExitingGuest guest;
  Hyperv hyperv;
  Vcpu vcpu;
  Machine(const Kvm& kvm, HypercallTransport transport)
      : guest(kvm), hyperv(value_or_throw(Hyperv::create(guest.vm(), guest.memory(), {}, transport))),
        vcpu(value_or_throw(guest.vm().create_vcpu(0))) {
    value_or_throw(hyperv.prepare(vcpu, value_or_throw(kvm.supported_cpuid())));
    guest.write(result, ~std::uint64_t{0});
    guest.start(vcpu, calling_guest());
  }
};

class Ours {
public:
  Ours(const Kvm& kvm, HypercallTransport transport) : machine_(kvm, transport) {}
  void run_until(std::uint64_t exits) {
    while (seen_.exits < exits) {
      const Exit exit = value_or_throw(machine_.vcpu.run());
      if (const auto* const call = std::get_if<Hypercall>(&exit)) seen_.add(call->control ^ call->output);
      if (!value_or_throw(machine_.hyperv.handle(machine_.vcpu, exit)) && !std::holds_alternative<Interrupted>(exit))
        unexpected_exit(exit_name(exit));
    }
  }
  [[nodiscard]] const Seen& seen() const { return seen_; }
  [[nodiscard]] const ExitingGuest& guest() const { return machine_.guest; }

private:
  Machine machine_;
  Seen seen_;
};

class Floor {
public:
  Floor(const Kvm& kvm, HypercallTransport transport, std::uint64_t capabilities)
      : machine_(kvm, transport), run_(machine_.vcpu.descriptor(), kvm.capabilities().vcpu_mmap_bytes),
        is_split_(transport == HypercallTransport::split), capabilities_(capabilities) {
    // A call comes with its registers and the caller's privilege.
    constexpr std::uint32_t wanted = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
    in_page_ = (kvm.capabilities().sync_registers & wanted) == wanted;
    if (in_page_ && transport != HypercallTransport::kernel) run_.page().kvm_valid_regs = wanted;
  }
  void run_until(std::uint64_t exits) {
    while (seen_.exits < exits) {
      kvm_run& run = run_.next();
      switch (run.exit_reason) {
      case KVM_EXIT_HYPERV:
        if (run.hyperv.type != KVM_EXIT_HYPERV_HCALL) unexpected_exit("KVM_EXIT_HYPERV");
        run.hyperv.u.hcall.result = answer(run.hyperv.u.hcall.input, run.hyperv.u.hcall.params[1]);
        break;
      case KVM_EXIT_IO:
        if (run.io.direction != KVM_EXIT_IO_OUT || run.io.port != user_hypercall_port) unexpected_exit("another port");
        take_call(run);
        break;
      case KVM_EXIT_X86_WRMSR:
        if (run.msr.index == hv_msr_hypercall) write_page();
        run.msr.error = 0;
        break;
      default:
        unexpected_exit("KVM_EXIT " + std::to_string(run.exit_reason));
      }
    }
  }
  [[nodiscard]] const Seen& seen() const { return seen_; }
  [[nodiscard]] const ExitingGuest& guest() const { return machine_.guest; }

private:
  [[nodiscard]] std::uint64_t answer(std::uint64_t control, std::uint64_t to) {
    seen_.add(control ^ to);
    if (control != query_capabilities || to > ExitingGuest::bytes - sizeof capabilities_ || to % 8 != 0) return 5;
    machine_.guest.write(to, capabilities_);
    return 0;
  }
  void take_call(kvm_run& run) {
    if (in_page_) {
      if (run.s.regs.sregs.ss.dpl != 0 || (run.s.regs.sregs.efer & efer_lma) == 0) unexpected_exit("no 64-bit kernel");
      kvm_regs& registers = run.s.regs.regs;
      registers.rax = answer(registers.rcx, registers.r8);
      run.kvm_dirty_regs = KVM_SYNC_X86_REGS;
      return;
    }
    kvm_regs registers{};
    kvm_sregs special{};
    ask(KVM_GET_REGS, &registers);
    ask(KVM_GET_SREGS, &special);
    if (special.ss.dpl != 0 || (special.efer & efer_lma) == 0) unexpected_exit("no 64-bit kernel");
    registers.rax = answer(registers.rcx, registers.r8);
    ask(KVM_SET_REGS, &registers);
  }
  void ask(unsigned long request, void* what) const {
    if (ioctl(run_.vcpu(), request, what) != 0)
      throw std::system_error(errno, std::generic_category(), "an ioctl of the floor's vCPU");
  }
  void write_page() const {
    constexpr auto port_only = user_hypercall_code();
    const auto both_ways = split_hypercall_code(hypercall_instruction());
    const auto code = is_split_ ? std::span<const std::byte>(both_ways) : std::span<const std::byte>(port_only);
    std::memcpy(machine_.guest.at(hypercall_page), code.data(), code.size());
  }

  Machine machine_;
  BareRun run_;
  bool is_split_;
  std::uint64_t capabilities_;
  bool in_page_ = false;
  Seen seen_;
};

/// The guest has its answer; the last one may be under way.
bool has_answer(const ExitingGuest& guest, std::uint64_t capabilities) {
  return guest.read(result) == 0 && guest.read(output) == capabilities;
}

const char* missing(const Kvm& kvm, HypercallTransport transport) {
  switch (transport) {
  case HypercallTransport::kernel:
    return kvm.capabilities().forwards_extended_hypercalls ? nullptr : "this KVM does not forward extended hypercalls";
  case HypercallTransport::split:
    if (!kvm.capabilities().hyperv_cpuid) return "this KVM has no Hyper-V of its own";
    break;
  case HypercallTransport::user:
    break;
  }
  return has_msr_filter(kvm) ? nullptr : no_msr_filter;
}

auto hypercalls_over(HypercallTransport transport) {
  return with_kvm([transport](Measurement& measurement, const Kvm& kvm) {
    if (const char* const what = missing(kvm, transport)) return measurement.skip(what);
    Ours ours(kvm, transport);
    // What ours answers is what the floor is to answer.
    ours.run_until(1);
    const std::uint64_t capabilities = ours.guest().read(output);
    Floor floor(kvm, transport, capabilities);
    floor.run_until(1);
    if (capabilities == 0) return measurement.fail("the guest is told no capability");
    run_exits(measurement, ours, floor);
    if (!has_answer(ours.guest(), capabilities) || !has_answer(floor.guest(), capabilities))
      measurement.fail("a guest has not its answer");
  });
}

constexpr const char* bare_loop = "a loop of KVM_RUN";

const Beside over_kernel({"exits/hypercall_kernel", 1.05, bare_loop}, hypercalls_over(HypercallTransport::kernel));
const Beside over_split({"exits/hypercall_split", 1.05, bare_loop}, hypercalls_over(HypercallTransport::split));
const Beside over_user({"exits/hypercall_user", 1.05, bare_loop}, hypercalls_over(HypercallTransport::user));

} // namespace
