#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <linux/kvm.h>
#include <optional>
#include <stop_token>
#include <string>
#include <sys/ioctl.h>
#include <thread>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "calling_guest.hpp"

// Rep hypercalls that are continued: over every transport, from 64-bit and 32-bit code.

namespace cppvmm::test {
namespace {

enum class Caller : std::uint8_t { code64, code32, code32_in_long_mode };

constexpr std::uint8_t vector = 30; // of an interrupt; any that has a gate and is no fault of the guest's
constexpr std::uint64_t rflags_tf = 1U << 8;
constexpr std::uint64_t rflags_if = 1U << 9;
constexpr std::uint64_t result = 0x0000'0008'0000'0000;

// HvExtCallMemoryHeatHint with a rep count of 8.
constexpr std::uint64_t control(std::uint64_t rep_start) { return rep_start << 48 | 8ULL << 32 | 0x8003; }

// The last: registers through the kvm_run page, else by ioctl.
class ContinuedHypercallTest : public BareGuestTest,
                               public testing::WithParamInterface<std::tuple<HypercallTransport, Caller, bool>> {
protected:
  void SetUp() override {
    BareGuestTest::SetUp();
    if (IsSkipped()) return;
    if (is_kernel() && !machine_facts().kvm_forwards) GTEST_SKIP() << "this KVM does not forward extended hypercalls";
    load(call_page());
  }

  [[nodiscard]] static HypercallTransport transport() { return std::get<0>(GetParam()); }
  [[nodiscard]] static Caller caller() { return std::get<1>(GetParam()); }
  [[nodiscard]] static bool is_kernel() { return transport() == HypercallTransport::kernel; }
  /// Interrupts and faults go to 64-bit handlers.
  [[nodiscard]] static bool in_long_mode() { return caller() != Caller::code32; }

  /// With the hypercall page.
  Vcpu make() {
    Vcpu vcpu = make_vcpu(0, {.sync_registers = std::get<2>(GetParam())});
    const auto write_page = [&](auto code) {
      value_or_throw(vcpu.use_user_hypercalls());
      for (std::size_t i = 0; i < code.size(); ++i)
        memory.write(page + i, code[i]);
    };
    if (transport() == HypercallTransport::user) {
      write_page(user_hypercall_code());
    } else if (transport() == HypercallTransport::split) {
      write_page(split_hypercall_code(hypercall_instruction()));
    } else {
      auto entries = kvm->supported_cpuid().value();
      for (const CpuidEntry& entry : kvm->supported_hv_cpuid().value())
        set_cpuid_entry(entries, entry);
      value_or_throw(vcpu.set_cpuid(entries));
      value_or_throw(vcpu.set_msrs(std::vector<MsrEntry>{{.index = hyperv_msr_first, .value = 1},
                                                         {.index = hyperv_msr_first + 1, .value = page | 1}}));
    }
    return vcpu;
  }

  /// Before the call, with registers that it returns: the first control word of all among them.
  static Registers start(Vcpu& vcpu, std::uint64_t more_flags = 0) {
    value_or_throw(in_long_mode() ? start_long_mode(vcpu) : start_protected_mode(vcpu));
    if (caller() == Caller::code32_in_long_mode) {
      auto special = vcpu.special_registers().value();
      special.cs = code32_segment(layout::code32_selector);
      value_or_throw(vcpu.set_special_registers(special));
    }
    Registers before = caller() == Caller::code64 ? distinct() : distinct32();
    before.rflags |= more_flags;
    put_control(before, control(0));
    value_or_throw(vcpu.set_registers(before));
    return before;
  }

  static void put_control(Registers& registers, std::uint64_t control) {
    if (caller() == Caller::code64) {
      registers.rcx = control;
    } else {
      registers.rdx = control >> 32;
      registers.rax = control & 0xFFFF'FFFF;
    }
  }

  [[nodiscard]] static Hypercall expected_call(const Registers& before, std::uint64_t control) {
    Hypercall call{.control = control,
                   .input = before.rdx,
                   .output = before.r8,
                   .cpl = 0,
                   .long_mode = is_kernel() || caller() == Caller::code64,
                   .transport = is_kernel() ? HypercallTransport::kernel : HypercallTransport::user};
    if (caller() != Caller::code64) {
      call.input = before.rbx << 32 | before.rcx;
      call.output = before.rdi << 32 | before.rsi;
    }
    return call;
  }

  /// The registers of a guest that is about to make the call with this control word.
  [[nodiscard]] Registers at_call(const Registers& before, std::uint64_t control) const {
    Registers registers = before;
    put_control(registers, control);
    registers.rsp -= caller() == Caller::code64 ? 8 : 4;
    registers.rip = page;
    while (!is_call(registers.rip))
      ++registers.rip;
    return registers;
  }

  /// Those behind the call, at the HLT.
  [[nodiscard]] static Registers after_call(const Registers& before, std::uint64_t control) {
    Registers registers = before;
    put_control(registers, control);
    if (caller() == Caller::code64) {
      registers.rax = result;
    } else {
      registers.rdx = result >> 32;
      registers.rax = result & 0xFFFF'FFFF;
    }
    registers.rip = after_hlt;
    return registers;
  }

  /// The handler of `number` writes to exception_port's port and returns.
  void load_returning_handler(unsigned number) {
    Code code = Code().out(static_cast<std::uint8_t>(0x40 + number));
    if (in_long_mode()) code.raw({0x48}); // iretq
    load(code.raw({0xCF}), layout::handlers + std::uint64_t{16} * number);
  }
  /// What an interrupt, or a fault without an error code, has pushed.
  [[nodiscard]] std::uint64_t pushed_rip(const Vcpu& vcpu) const {
    const std::uint64_t rsp = vcpu.registers().value().rsp;
    return in_long_mode() ? memory.read<std::uint64_t>(rsp) : memory.read<std::uint32_t>(rsp);
  }

  /// The call comes with this control word. Skips where KVM emulates 32-bit code, and a handler's IRET was to be.
  static void expect_call(Vcpu& vcpu, const Registers& before, std::uint64_t control) {
    const auto exit = run_on(vcpu);
    ASSERT_KVM_OK(exit);
    if (lacks_iret(*exit)) GTEST_SKIP() << "this KVM emulates no IRET of 32-bit code";
    ASSERT_TRUE(std::holds_alternative<Hypercall>(*exit)) << exit_name(*exit);
    EXPECT_EQ(std::get<Hypercall>(*exit), expected_call(before, control));
  }

  static bool lacks_iret(const Exit& exit) {
    const auto* const error = std::get_if<InternalError>(&exit);
    return error != nullptr && !error->instruction.empty() && error->instruction[0] == std::byte{0xCF};
  }

  /// It comes, is completed, and the guest is as it was but for control word and result.
  static void expect_completion(Vcpu& vcpu, const Registers& before, std::uint64_t control) {
    ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control));
    if (IsSkipped()) return;
    ASSERT_KVM_OK(vcpu.complete_hypercall(result));
    ASSERT_RUN(Hlt, hlt, vcpu);
    EXPECT_EQ(vcpu.registers(), after_call(before, control));
  }

  [[nodiscard]] std::vector<std::byte> image() const { return {memory.data(), memory.data() + memory.size()}; }

private:
  /// The instruction at `rip` is the one that traps.
  [[nodiscard]] bool is_call(std::uint64_t rip) const {
    if (!is_kernel()) return memory.read<std::uint8_t>(rip) == 0xE6;
    const auto last = memory.read<std::uint8_t>(rip + 2);
    return memory.read<std::uint16_t>(rip) == 0x010F && (last == 0xC1 || last == 0xD9);
  }
};

std::string name_of(const testing::TestParamInfo<std::tuple<HypercallTransport, Caller, bool>>& chosen) {
  const auto [transport, caller, synchronised] = chosen.param;
  std::string name = to_string(transport);
  name += caller == Caller::code64 ? "64" : caller == Caller::code32 ? "32" : "32InLongMode";
  return name + (synchronised ? "Synchronised" : "ByIoctl");
}

INSTANTIATE_TEST_SUITE_P(
    Ways, ContinuedHypercallTest,
    testing::Combine(testing::Values(HypercallTransport::kernel, HypercallTransport::split, HypercallTransport::user),
                     testing::Values(Caller::code64, Caller::code32, Caller::code32_in_long_mode), testing::Bool()),
    name_of);

TEST_P(ContinuedHypercallTest, IsMadeAgainWithTheNewControlWordAndChangesNothingElse) {
  Vcpu vcpu = make();
  const Registers before = start(vcpu);
  std::vector<std::byte> memory_at_first;
  std::uint64_t rep_start = 0;
  for (; rep_start < 7; ++rep_start) {
    ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(rep_start)));
    if (rep_start == 0) memory_at_first = image();
    ASSERT_KVM_OK(vcpu.continue_hypercall(control(rep_start + 1)));
    if (rep_start % 2 == 0) EXPECT_EQ(vcpu.registers(), at_call(before, control(rep_start + 1)));
  }
  expect_completion(vcpu, before, control(rep_start));
  EXPECT_TRUE(image() == memory_at_first) << "the guest's memory has changed";
}

TEST_P(ContinuedHypercallTest, TheWholeControlWordIsTheNewOne) {
  Vcpu vcpu = make();
  const Registers before = start(vcpu);
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(0)));
  constexpr std::uint64_t other = 0x0FFF'0FFF'07FE'8041; // the highest code, and all other bits that are forwarded
  ASSERT_KVM_OK(vcpu.continue_hypercall(other));
  expect_completion(vcpu, before, other);
}

TEST_P(ContinuedHypercallTest, CallsAfterItAreCallsOfTheirOwn) {
  Vcpu vcpu = make();
  const Registers before = start(vcpu);
  for (int i = 0; i < 3; ++i) {
    ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(0)));
    ASSERT_KVM_OK(vcpu.continue_hypercall(control(5)));
    ASSERT_NO_FATAL_FAILURE(expect_completion(vcpu, before, control(5)));
    ASSERT_KVM_OK(vcpu.set_registers(before)); // RIP is at the call
  }
}

TEST_P(ContinuedHypercallTest, AnInterruptBetweenTheStepsIsDeliveredAndTheCallGoesOn) {
  Vcpu vcpu = make();
  load_returning_handler(vector);
  for (const bool early : {false, true}) {
    const Registers before = start(vcpu, rflags_if);
    ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(0)));
    EXPECT_TRUE(vcpu.ready_for_interrupt());
    if (early) ASSERT_KVM_OK(vcpu.inject_interrupt(vector));
    ASSERT_KVM_OK(vcpu.continue_hypercall(control(3)));
    if (!early) ASSERT_KVM_OK(vcpu.inject_interrupt(vector));
    {
      ASSERT_RUN(IoOut, out, vcpu);
      EXPECT_EQ(out.port, 0x40 + vector);
      const Registers next = at_call(before, control(3));
      EXPECT_EQ(pushed_rip(vcpu), next.rip);
      EXPECT_EQ(vcpu.registers()->rcx, next.rcx);
      EXPECT_EQ(vcpu.registers()->rax, next.rax);
    }
    ASSERT_NO_FATAL_FAILURE(expect_completion(vcpu, before, control(3)));
    if (IsSkipped()) return;
  }
}

TEST_P(ContinuedHypercallTest, TheInterruptWindowOpensBetweenTheSteps) {
  Vcpu vcpu = make();
  const Registers before = start(vcpu, rflags_if);
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(0)));
  ASSERT_KVM_OK(vcpu.continue_hypercall(control(3)));
  ASSERT_KVM_OK(vcpu.request_interrupt_window(true));
  {
    const auto exit = run_on(vcpu);
    ASSERT_KVM_OK(exit);
    if (std::holds_alternative<Hypercall>(*exit))
      GTEST_SKIP() << "this KVM emulates the call before it looks at the window";
    ASSERT_TRUE(std::holds_alternative<InterruptWindowOpen>(*exit)) << exit_name(*exit);
    EXPECT_EQ(vcpu.registers(), at_call(before, control(3)));
  }
  ASSERT_KVM_OK(vcpu.request_interrupt_window(false));
  expect_completion(vcpu, before, control(3));
}

TEST_P(ContinuedHypercallTest, AnInterruptOfKvmsControllerIsDeliveredBetweenTheSteps) {
  ASSERT_KVM_OK(vm->create_interrupt_controller());
  load(Code{0xE8}.value(static_cast<std::int32_t>(page - (layout::code + 5))).out(0x10)); // HLT would not exit
  Vcpu vcpu = make();
  load_returning_handler(vector);
  const Registers before = start(vcpu, rflags_if);
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(0)));
  ASSERT_KVM_OK(vcpu.continue_hypercall(control(3)));
  auto apic = vcpu.local_apic().value();
  apic.bytes[0xF1] |= std::byte{1};                             // spurious-interrupt vector: the APIC is enabled
  apic.bytes[0x200 + vector / 8] |= std::byte{1 << vector % 8}; // interrupt requests, the first 32 of them
  ASSERT_KVM_OK(vcpu.set_local_apic(apic));
  {
    ASSERT_RUN(IoOut, out, vcpu);
    EXPECT_EQ(out.port, 0x40 + vector);
    EXPECT_EQ(pushed_rip(vcpu), at_call(before, control(3)).rip);
  }
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(3)));
  if (IsSkipped()) return;
  ASSERT_KVM_OK(vcpu.complete_hypercall(result));
  ASSERT_RUN(IoOut, done, vcpu);
  EXPECT_EQ(done.port, 0x10);
  Registers after = after_call(before, control(3));
  after.rip = vcpu.registers()->rip;
  EXPECT_EQ(vcpu.registers(), after);
}

TEST_P(ContinuedHypercallTest, AStopRequestFindsTheGuestAtTheCall) {
  Vcpu vcpu = make();
  const StopHandle handle = vcpu.stop_handle();
  const Registers before = start(vcpu);
  std::uint64_t rep_start = 0;
  for (const bool early : {false, true}) {
    ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(rep_start)));
    if (early) handle.request_stop();
    ASSERT_KVM_OK(vcpu.continue_hypercall(control(++rep_start)));
    if (!early) handle.request_stop();
    ASSERT_RUN(Interrupted, interrupted, vcpu);
    EXPECT_TRUE(interrupted.stop_requested);
    EXPECT_EQ(vcpu.registers(), at_call(before, control(rep_start)));
  }
  expect_completion(vcpu, before, control(rep_start));
}

TEST_P(ContinuedHypercallTest, StopRequestsOfAnotherThreadFindTheGuestAtTheCall) {
  Vcpu vcpu = make();
  const Registers before = start(vcpu);
  std::uint64_t rep_start = 0;
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(0)));
  std::atomic<bool> done = false;
  const std::jthread stopper([&, handle = vcpu.stop_handle()](const std::stop_token& end) {
    for (int i = 0; i < 200 && !end.stop_requested(); ++i) {
      handle.request_stop();
      while (handle.stop_requested() && !end.stop_requested())
        std::this_thread::yield();
    }
    done = true;
  });
  for (int calls = 1; !done || calls < 200; ++calls) {
    rep_start = (rep_start + 1) % 8;
    ASSERT_KVM_OK(vcpu.continue_hypercall(control(rep_start)));
    for (;;) {
      const auto exit = vcpu.run();
      ASSERT_KVM_OK(exit);
      if (const auto* const call = std::get_if<Hypercall>(&*exit)) {
        ASSERT_EQ(*call, expected_call(before, control(rep_start)));
        break;
      }
      ASSERT_TRUE(std::holds_alternative<Interrupted>(*exit)) << exit_name(*exit);
      ASSERT_EQ(vcpu.registers(), at_call(before, control(rep_start)));
    }
  }
  ASSERT_KVM_OK(vcpu.complete_hypercall(result));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers(), after_call(before, control(rep_start)));
}

TEST_P(ContinuedHypercallTest, ASingleStepEndsWithTheLastStepOnly) {
  Vcpu vcpu = make();
  const Registers before = start(vcpu);
  const auto debug = [&](std::uint32_t how) {
    kvm_guest_debug wanted{};
    wanted.control = how;
    ASSERT_EQ(ioctl(vcpu.descriptor(), KVM_SET_GUEST_DEBUG, &wanted), 0) << "errno " << errno;
  };
  for (std::uint64_t rep_start = 0; rep_start < 3; ++rep_start) {
    ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(rep_start)));
    ASSERT_KVM_OK(vcpu.continue_hypercall(control(rep_start + 1)));
    EXPECT_EQ(vcpu.registers(), at_call(before, control(rep_start + 1)));
    debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP);
  }
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(3)));
  ASSERT_KVM_OK(vcpu.complete_hypercall(result));
  {
    ASSERT_RUN(Debug, step, vcpu);
    EXPECT_NE(step.rip, at_call(before, control(3)).rip);
  }
  debug(0);
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers(), after_call(before, control(3)));
}

TEST_P(ContinuedHypercallTest, AGuestThatStepsItselfSeesNoStepBeforeTheLast) {
  Vcpu vcpu = make();
  load_returning_handler(static_cast<unsigned>(ExceptionVector::debug));
  const auto to_call = [&] {
    for (;;) {
      const auto exit = run_on(vcpu);
      ASSERT_KVM_OK(exit);
      if (std::holds_alternative<Hypercall>(*exit)) return;
      if (lacks_iret(*exit)) GTEST_SKIP() << "this KVM emulates no IRET of 32-bit code";
      ASSERT_TRUE(std::holds_alternative<IoOut>(*exit)) << exit_name(*exit);
    }
  };
  for (const bool refused : {false, true}) {
    const Registers before = start(vcpu, rflags_tf);
    ASSERT_NO_FATAL_FAILURE(to_call());
    if (IsSkipped()) return;
    auto debug = vcpu.debug_registers().value();
    constexpr std::size_t dr6_second_byte = 33;
    debug.bytes[dr6_second_byte] &= ~std::byte{0x40}; // BS, as a handler clears it
    ASSERT_KVM_OK(vcpu.set_debug_registers(debug));
    ASSERT_KVM_OK(vcpu.continue_hypercall(control(1)));
    EXPECT_EQ(vcpu.debug_registers(), debug);
    EXPECT_EQ(vcpu.registers(), at_call(before, control(1)));
    ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(1)));
    if (refused) {
      ASSERT_KVM_OK(vcpu.refuse_hypercall());
      EXPECT_EQ(vcpu.debug_registers(), debug);
    } else {
      ASSERT_KVM_OK(vcpu.complete_hypercall(result));
    }
    ASSERT_RUN(IoOut, out, vcpu);
    EXPECT_EQ(out.port, exception_port(refused ? ExceptionVector::invalid_opcode : ExceptionVector::debug));
    EXPECT_EQ(pushed_rip(vcpu) == at_call(before, control(1)).rip, refused);
  }
}

TEST_P(ContinuedHypercallTest, MayBeRefusedInTheEnd) {
  Vcpu vcpu = make();
  const Registers before = start(vcpu);
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(0)));
  ASSERT_KVM_OK(vcpu.continue_hypercall(control(2)));
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(2)));
  ASSERT_KVM_OK(vcpu.refuse_hypercall());
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
  Registers expected = at_call(before, control(2));
  EXPECT_EQ(pushed_rip(vcpu), expected.rip);
  Registers after = vcpu.registers().value();
  expected.rip = after.rip;
  expected.rsp = after.rsp;
  after.rflags = expected.rflags;
  EXPECT_EQ(after, expected);
}

TEST_P(ContinuedHypercallTest, AStateTakenBetweenTheStepsMakesTheCallElsewhere) {
  std::optional<Vcpu> vcpu(make());
  const Registers before = start(*vcpu);
  ASSERT_NO_FATAL_FAILURE(expect_call(*vcpu, before, control(0)));
  ASSERT_KVM_OK(vcpu->continue_hypercall(control(4)));
  vcpu->stop_handle().request_stop();
  {
    ASSERT_RUN(Interrupted, interrupted, *vcpu);
  }
  const auto special = vcpu->special_registers().value();
  const auto registers = vcpu->registers().value();
  const auto debug = vcpu->debug_registers().value();
  const auto events = vcpu->events().value();
  vcpu.reset();
  auto created = kvm->create_vm();
  ASSERT_TRUE(created) << created.error().message();
  vm.emplace(std::move(*created));
  ASSERT_KVM_OK(vm->set_tss_address(0xFFFB'D000));
  ASSERT_KVM_OK(vm->set_memory_slot({.bytes = memory.size(), .host_address = memory.data()}));

  vcpu.emplace(make());
  ASSERT_KVM_OK(vcpu->set_special_registers(special));
  ASSERT_KVM_OK(vcpu->set_registers(registers));
  ASSERT_KVM_OK(vcpu->set_debug_registers(debug));
  ASSERT_KVM_OK(vcpu->set_events(events));
  expect_completion(*vcpu, before, control(4));
}

TEST_P(ContinuedHypercallTest, IsOnlyOneThatWaits) {
  Vcpu vcpu = make();
  const Registers before = start(vcpu);
  EXPECT_TRUE(is_bad_state(vcpu.continue_hypercall(control(1)))) << "not yet made";
  ASSERT_NO_FATAL_FAILURE(expect_call(vcpu, before, control(0)));
  ASSERT_KVM_OK(vcpu.continue_hypercall(control(1)));
  EXPECT_TRUE(is_bad_state(vcpu.continue_hypercall(control(2)))) << "answered already";
  EXPECT_TRUE(is_bad_state(vcpu.complete_hypercall(0))) << "answered already";
  EXPECT_TRUE(is_bad_state(vcpu.refuse_hypercall())) << "answered already";
  expect_completion(vcpu, before, control(1));
  EXPECT_TRUE(is_bad_state(vcpu.continue_hypercall(control(2)))) << "completed";
}

} // namespace
} // namespace cppvmm::test
