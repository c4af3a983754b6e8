#include "support/beside.hpp"
#include "vcpu/exiting_guest.hpp"
#include <cstddef>
#include <cstdint>
#include <linux/kvm.h>
#include <span>
#include <string>
#include <variant>
import cppvmm.guest_memory;
import cppvmm.vcpu;

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

// From an exit to the next one, with the answer between them: a handler behind Vcpu::run, beside a switch behind
// KVM_RUN.

constexpr std::uint8_t out_port = 0x10;
constexpr std::uint8_t in_port = 0x11;
constexpr std::uint32_t msr = hyperv_msr_first; // of those that the VMM takes

Code port_loop() {
  Code code;
  code.raw({0xFF, 0xC0});     // inc eax
  code.raw({0xE6, out_port}); // out
  code.raw({0xE4, in_port});  // in
  return code.jump(0);
}

Code msr_loop() {
  Code code;
  code.raw({0xB9}).value(msr); // mov ecx
  const std::size_t begin = code.size();
  code.raw({0xFF, 0xC0}); // inc eax
  code.raw({0x0F, 0x30}); // wrmsr
  code.raw({0x0F, 0x32}); // rdmsr
  return code.jump(begin);
}

/// What a read gives: the guest goes on from it.
std::uint64_t answer_to(std::uint64_t written) { return written + 2; }

class PortHandler {
public:
  explicit PortHandler(Vcpu& vcpu) : vcpu_(vcpu) {}
  void operator()(const IoOut& out) {
    if (out.port != out_port || out.data.size() != 1) unexpected_exit("another port is written");
    written_ = std::to_integer<std::uint8_t>(out.data[0]);
    seen.add(written_);
  }
  void operator()(const IoIn& in) {
    if (in.port != in_port) unexpected_exit("another port is read");
    const std::byte answer{static_cast<std::uint8_t>(answer_to(written_))};
    value_or_throw(vcpu_.complete_io_in(std::span(&answer, 1)));
    seen.add(in.port);
  }
  void operator()(const Interrupted&) const {}
  template <class Other>
  void operator()(const Other& other) const {
    unexpected_exit(exit_name(other));
  }
  Seen seen;

private:
  Vcpu& vcpu_;
  std::uint8_t written_ = 0;
};

class MsrHandler {
public:
  explicit MsrHandler(Vcpu& vcpu) : vcpu_(vcpu) {}
  void operator()(const WriteMsr& write) {
    if (write.index != msr) unexpected_exit("another MSR is written");
    written_ = write.value;
    value_or_throw(vcpu_.complete_write_msr());
    seen.add(written_);
  }
  void operator()(const ReadMsr& read) {
    if (read.index != msr) unexpected_exit("another MSR is read");
    value_or_throw(vcpu_.complete_read_msr(answer_to(written_)));
    seen.add(read.index);
  }
  void operator()(const Interrupted&) const {}
  template <class Other>
  void operator()(const Other& other) const {
    unexpected_exit(exit_name(other));
  }
  Seen seen;

private:
  Vcpu& vcpu_;
  std::uint64_t written_ = 0;
};

/// The guest with its vCPU.
struct Machine {
  ExitingGuest guest;
  Vcpu vcpu;
  Machine(const Kvm& kvm, const Code& code, bool takes_msrs)
      : guest(kvm), vcpu(value_or_throw(guest.vm().create_vcpu(0))) {
    if (takes_msrs) value_or_throw(guest.vm().take_hyperv_msrs());
    value_or_throw(vcpu.set_cpuid(value_or_throw(kvm.supported_cpuid())));
    guest.start(vcpu, code);
  }
};

template <class Handler>
class Ours {
public:
  Ours(const Kvm& kvm, const Code& code, bool takes_msrs) : machine_(kvm, code, takes_msrs) {}
  void run_until(std::uint64_t exits) {
    while (handler_.seen.exits < exits)
      std::visit(handler_, value_or_throw(machine_.vcpu.run()));
  }
  [[nodiscard]] const Seen& seen() const { return handler_.seen; }

private:
  Machine machine_;
  Handler handler_{machine_.vcpu};
};

class Floor {
public:
  Floor(const Kvm& kvm, const Code& code, bool takes_msrs)
      : machine_(kvm, code, takes_msrs), run_(machine_.vcpu.descriptor(), kvm.capabilities().vcpu_mmap_bytes) {}
  void run_until(std::uint64_t exits) {
    while (seen_.exits < exits) {
      kvm_run& run = run_.next();
      switch (run.exit_reason) {
      case KVM_EXIT_IO:
        if (run.io.direction == KVM_EXIT_IO_OUT && run.io.port == out_port) {
          written_ = run_.io_data();
          seen_.add(written_);
        } else if (run.io.direction == KVM_EXIT_IO_IN && run.io.port == in_port) {
          run_.io_data() = static_cast<std::uint8_t>(answer_to(written_));
          seen_.add(run.io.port);
        } else {
          unexpected_exit("another port");
        }
        break;
      case KVM_EXIT_X86_WRMSR:
        if (run.msr.index != msr) unexpected_exit("another MSR is written");
        written_ = run.msr.data;
        run.msr.error = 0;
        seen_.add(written_);
        break;
      case KVM_EXIT_X86_RDMSR:
        if (run.msr.index != msr) unexpected_exit("another MSR is read");
        run.msr.data = answer_to(written_);
        run.msr.error = 0;
        seen_.add(run.msr.index);
        break;
      default:
        unexpected_exit("KVM_EXIT " + std::to_string(run.exit_reason));
      }
    }
  }
  [[nodiscard]] const Seen& seen() const { return seen_; }

private:
  Machine machine_;
  BareRun run_;
  std::uint64_t written_ = 0;
  Seen seen_;
};

constexpr const char* bare_loop = "a loop of KVM_RUN";

const Beside of_ports({"exits/port_io", 1.05, bare_loop}, with_kvm([](Measurement& measurement, const Kvm& kvm) {
                        Ours<PortHandler> ours(kvm, port_loop(), false);
                        Floor floor(kvm, port_loop(), false);
                        run_exits(measurement, ours, floor);
                      }));

const Beside of_msrs({"exits/msr", 1.05, bare_loop}, with_kvm([](Measurement& measurement, const Kvm& kvm) {
                       if (!has_msr_filter(kvm)) return measurement.skip(no_msr_filter);
                       Ours<MsrHandler> ours(kvm, msr_loop(), true);
                       Floor floor(kvm, msr_loop(), true);
                       run_exits(measurement, ours, floor);
                     }));

} // namespace
