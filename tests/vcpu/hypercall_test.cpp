#include <gtest/gtest.h>
#include <span>
#include <string>
#include <vector>

#include "support/machine_facts.hpp"

#include "calling_guest.hpp"

namespace cppvmm::test {
namespace {

// With registers through the kvm_run page, and by ioctl.
class UserHypercallTest : public BareGuestTest, public testing::WithParamInterface<bool> {
protected:
  void SetUp() override {
    BareGuestTest::SetUp();
    if (IsSkipped()) return;
    for (std::size_t i = 0; i < 3; ++i)
      memory.write(page + i, user_hypercall_code()[i]);
    load(call_page());
  }

  Vcpu make(std::uint32_t id = 0) {
    Vcpu vcpu = make_vcpu(id, {.sync_registers = GetParam()});
    if (const auto used = vcpu.use_user_hypercalls(); !used) throw std::runtime_error(used.error().message());
    return vcpu;
  }
};

INSTANTIATE_TEST_SUITE_P(Registers, UserHypercallTest, testing::Values(true, false),
                         [](const auto& chosen) { return chosen.param ? "Synchronised" : "ByIoctl"; });

TEST_P(UserHypercallTest, A64BitCallHasItsParametersAndChangesOnlyRax) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  const Registers before = distinct();
  ASSERT_KVM_OK(vcpu.set_registers(before));
  ASSERT_RUN(Hypercall, call, vcpu);
  EXPECT_EQ(call, (Hypercall{.control = before.rcx,
                             .input = before.rdx,
                             .output = before.r8,
                             .cpl = 0,
                             .long_mode = true,
                             .transport = HypercallTransport::user}));
  ASSERT_KVM_OK(vcpu.complete_hypercall(0xFEDC'BA98'7654'3210));
  EXPECT_EQ(vcpu.registers()->rax, 0xFEDC'BA98'7654'3210U);
  ASSERT_RUN(Hlt, hlt, vcpu);
  Registers after = before;
  after.rax = 0xFEDC'BA98'7654'3210;
  after.rip = after_hlt;
  EXPECT_EQ(vcpu.registers(), after);
}

TEST_P(UserHypercallTest, EveryCallOfManyGetsItsOwnResult) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  for (std::uint64_t i = 0; i < 20; ++i) {
    ASSERT_RUN(Hypercall, call, vcpu);
    ASSERT_KVM_OK(vcpu.complete_hypercall(i << 32 | i));
    ASSERT_RUN(Hlt, hlt, vcpu);
    EXPECT_EQ(vcpu.registers()->rax, i << 32 | i);
    Registers next = vcpu.registers().value(); // set by ioctl between two calls
    next.rcx = i;
    ASSERT_KVM_OK(vcpu.set_registers(next));
  }
}

TEST_P(UserHypercallTest, A32BitCallHasItsParametersInPairsAndChangesOnlyEdxEax) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_protected_mode(vcpu));
  const Registers before = distinct32();
  ASSERT_KVM_OK(vcpu.set_registers(before));
  ASSERT_RUN(Hypercall, call, vcpu);
  EXPECT_EQ(call, (Hypercall{.control = before.rdx << 32 | before.rax,
                             .input = before.rbx << 32 | before.rcx,
                             .output = before.rdi << 32 | before.rsi,
                             .cpl = 0,
                             .long_mode = false,
                             .transport = HypercallTransport::user}));
  ASSERT_KVM_OK(vcpu.complete_hypercall(0xFEDC'BA98'7654'3210));
  ASSERT_RUN(Hlt, hlt, vcpu);
  Registers after = before;
  after.rax = 0x7654'3210;
  after.rdx = 0xFEDC'BA98;
  after.rip = after_hlt;
  EXPECT_EQ(vcpu.registers(), after);
}

TEST_P(UserHypercallTest, A32BitSegmentInLongModeCallsAs32BitCode) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto special = vcpu.special_registers().value();
  special.cs = code32_segment(layout::code32_selector);
  ASSERT_KVM_OK(vcpu.set_special_registers(special));
  const Registers before = distinct32();
  ASSERT_KVM_OK(vcpu.set_registers(before));
  ASSERT_RUN(Hypercall, call, vcpu);
  EXPECT_FALSE(call.long_mode);
  EXPECT_EQ(call.control, before.rdx << 32 | before.rax);
  EXPECT_EQ(call.cpl, 0);
  ASSERT_KVM_OK(vcpu.complete_hypercall(0x0000'0001'0000'0002));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rax, 2U);
  EXPECT_EQ(vcpu.registers()->rdx, 1U);
}

TEST_P(UserHypercallTest, ARefusedCallIsInvalidOpcodeAtTheInstructionWithAllRegistersKept) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  const Registers before = distinct();
  ASSERT_KVM_OK(vcpu.set_registers(before));
  ASSERT_RUN(Hypercall, call, vcpu);
  ASSERT_KVM_OK(vcpu.refuse_hypercall());
  EXPECT_TRUE(is_bad_state(vcpu.refuse_hypercall())) << "answered already";
  EXPECT_TRUE(is_bad_state(vcpu.complete_hypercall(0))) << "answered already";
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
  Registers after = vcpu.registers().value();
  const auto frame = memory.read<ExceptionFrame>(after.rsp);
  EXPECT_EQ(frame.rip, page);
  EXPECT_EQ(frame.cs, layout::code64_selector);
  EXPECT_EQ(frame.rflags & ~std::uint64_t{1 << 16}, before.rflags);
  EXPECT_EQ(frame.rsp, before.rsp - 8) << "within the call";
  after.rsp = before.rsp;
  after.rip = before.rip;
  after.rflags = before.rflags;
  EXPECT_EQ(after, before);
}

TEST_P(UserHypercallTest, A32BitCallIsRefusedInTheSameWay) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_protected_mode(vcpu));
  ASSERT_RUN(Hypercall, call, vcpu);
  ASSERT_KVM_OK(vcpu.refuse_hypercall());
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
  EXPECT_EQ(memory.read<std::uint32_t>(vcpu.registers()->rsp), page);
}

TEST_P(UserHypercallTest, AGuestMayGoOnAfterARefusal) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  for (int i = 0; i < 3; ++i) {
    ASSERT_RUN(Hypercall, refused, vcpu);
    ASSERT_KVM_OK(vcpu.refuse_hypercall());
    ASSERT_RUN(IoOut, out, vcpu);
    EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
    ASSERT_KVM_OK(start_long_mode(vcpu));
    ASSERT_RUN(Hypercall, call, vcpu);
    ASSERT_KVM_OK(vcpu.complete_hypercall(7));
    ASSERT_RUN(Hlt, hlt, vcpu);
    EXPECT_EQ(vcpu.registers()->rax, 7U);
  }
}

TEST_P(UserHypercallTest, TheCallersPrivilegeLevelIsReportedAndItsRefusalSeenByTheGuest) {
  for (const std::uint8_t cpl : {std::uint8_t{1}, std::uint8_t{2}}) {
    Vcpu vcpu = make(cpl);
    ASSERT_KVM_OK(start_long_mode(vcpu, layout::code, cpl));
    ASSERT_RUN(Hypercall, call, vcpu);
    EXPECT_EQ(call.cpl, cpl);
    ASSERT_KVM_OK(vcpu.refuse_hypercall());
    ASSERT_RUN(IoOut, out, vcpu);
    EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
    const auto frame = memory.read<ExceptionFrame>(vcpu.registers()->rsp);
    EXPECT_EQ(frame.rip, page);
    EXPECT_EQ(frame.cs & 3, cpl);
    EXPECT_EQ(frame.rsp, layout::user_stack - 8);
  }
}

TEST_P(UserHypercallTest, ACallFromUserModeIsReportedAndItsRefusalSeenByTheGuest) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu, layout::code, 3));
  const auto exit = run_on(vcpu);
  ASSERT_KVM_OK(exit);
  if (const auto* const out = std::get_if<IoOut>(&*exit);
      out != nullptr && out->port == exception_port(ExceptionVector::general_protection)) {
    const auto frame = memory.read<ExceptionFrame>(vcpu.registers()->rsp + 8);
    if ((frame.rflags & 0x3000) == 0) GTEST_SKIP() << "this KVM does not keep IOPL at CPL 3, so user mode has no ports";
  }
  ASSERT_TRUE(std::holds_alternative<Hypercall>(*exit)) << exit_name(*exit);
  EXPECT_EQ(std::get<Hypercall>(*exit).cpl, 3);
  ASSERT_KVM_OK(vcpu.refuse_hypercall());
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
  const auto frame = memory.read<ExceptionFrame>(vcpu.registers()->rsp);
  EXPECT_EQ(frame.rip, page);
  EXPECT_EQ(frame.cs & 3, 3U);
  EXPECT_EQ(frame.rsp, layout::user_stack - 8);
}

TEST_P(UserHypercallTest, RealModeCountsAsUnprivileged) {
  Vcpu vcpu = make();
  load(Code().out(user_hypercall_port).hlt());
  ASSERT_KVM_OK(start_real_mode(vcpu));
  ASSERT_RUN(Hypercall, call, vcpu);
  EXPECT_EQ(call.cpl, 3);
  EXPECT_FALSE(call.long_mode);
}

TEST_P(UserHypercallTest, AnUnansweredCallIsNotRunOver) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(Hypercall, call, vcpu);
  EXPECT_TRUE(is_bad_state(vcpu.run()));
  EXPECT_TRUE(is_bad_state(vcpu.complete_io_in({})));
  ASSERT_KVM_OK(vcpu.complete_hypercall(3));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rax, 3U);
}

TEST_P(UserHypercallTest, AnExceptionInjectedAfterTheAnswerIsTakenAfterTheCall) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(Hypercall, call, vcpu);
  ASSERT_KVM_OK(vcpu.complete_hypercall(0x77));
  ASSERT_KVM_OK(vcpu.inject_exception(ExceptionVector::general_protection, 0));
  EXPECT_EQ(vcpu.registers()->rax, 0x77U);
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::general_protection));
  EXPECT_EQ(vcpu.registers()->rax, 0x77U);
  EXPECT_EQ(memory.read<std::uint64_t>(vcpu.registers()->rsp + 8), page + 2) << "behind the trapping instruction";
}

TEST_P(UserHypercallTest, OtherWritesToThePortStayPortWrites) {
  Vcpu vcpu = make();
  // out port, ax; out port, eax; in al, port
  load(Code{0x66, 0xE7, user_hypercall_port, 0xE7, user_hypercall_port, 0xE4, user_hypercall_port}.hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  for (const std::uint8_t size : {std::uint8_t{2}, std::uint8_t{4}}) {
    ASSERT_RUN(IoOut, out, vcpu);
    EXPECT_EQ(out.port, user_hypercall_port);
    EXPECT_EQ(out.size, size);
  }
  ASSERT_RUN(IoIn, in, vcpu);
  EXPECT_EQ(in.port, user_hypercall_port);
}

TEST_P(UserHypercallTest, IsOffUntilAskedForAndTakesThePortThatItIsGiven) {
  Vcpu vcpu = make_vcpu(0, {.sync_registers = GetParam()});
  load(Code().out(user_hypercall_port).out(0xE8).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, user_hypercall_port);
  const auto quirk = vcpu.use_user_hypercalls(unusable_hypercall_port);
  ASSERT_FALSE(quirk);
  EXPECT_EQ(quirk.error().code, KvmErrc::invalid_argument);
  ASSERT_KVM_OK(vcpu.use_user_hypercalls(0xE8));
  ASSERT_RUN(Hypercall, call, vcpu);
  ASSERT_KVM_OK(vcpu.complete_hypercall(0));
  ASSERT_RUN(Hlt, hlt, vcpu);
}

TEST_P(UserHypercallTest, AStopRequestNeitherLosesTheResultNorTheRefusal) {
  Vcpu vcpu = make();
  const StopHandle handle = vcpu.stop_handle();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  {
    ASSERT_RUN(Hypercall, call, vcpu);
    handle.request_stop();
    ASSERT_KVM_OK(vcpu.complete_hypercall(0x99));
    ASSERT_RUN(Interrupted, interrupted, vcpu);
    EXPECT_TRUE(interrupted.stop_requested);
    EXPECT_EQ(vcpu.registers()->rax, 0x99U);
    ASSERT_RUN(Hlt, hlt, vcpu);
    EXPECT_EQ(vcpu.registers()->rax, 0x99U);
  }
  ASSERT_RUN(Hypercall, call, vcpu);
  handle.request_stop();
  ASSERT_KVM_OK(vcpu.refuse_hypercall());
  EXPECT_TRUE(handle.stop_requested()) << "still to be acknowledged by run()";
  ASSERT_RUN(Interrupted, interrupted, vcpu);
  EXPECT_TRUE(interrupted.stop_requested);
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
  EXPECT_EQ(memory.read<ExceptionFrame>(vcpu.registers()->rsp).rip, page);
}

// KVM owns the Hyper-V MSRs and the page.
class KernelHypercallTest : public BareGuestTest, public testing::WithParamInterface<bool> {
protected:
  void SetUp() override {
    BareGuestTest::SetUp();
    if (IsSkipped()) return;
    if (!machine_facts().kvm_forwards) GTEST_SKIP() << "this KVM does not forward extended hypercalls";
  }

  // In long mode, behind a guest that has set the hypercall page up.
  void start(Vcpu& vcpu) {
    auto entries = kvm->supported_cpuid().value();
    for (const CpuidEntry& entry : kvm->supported_hv_cpuid().value())
      set_cpuid_entry(entries, entry);
    ASSERT_KVM_OK(vcpu.set_cpuid(entries));
    load(Code()
             .mov_ecx(0x4000'0000)
             .mov_eax(1)
             .mov_edx(0x8100'0000)
             .raw({0x0F, 0x30}) // GUEST_OS_ID
             .mov_ecx(0x4000'0001)
             .mov_eax(static_cast<std::uint32_t>(page) | 1)
             .mov_edx(0)
             .raw({0x0F, 0x30}) // HYPERCALL
             .hlt());
    ASSERT_KVM_OK(start_long_mode(vcpu));
    ASSERT_RUN(Hlt, hlt, vcpu);
    load(call_page());
  }
  Vcpu make() { return make_vcpu(0, {.sync_registers = GetParam()}); }
};

INSTANTIATE_TEST_SUITE_P(Registers, KernelHypercallTest, testing::Values(true, false),
                         [](const auto& chosen) { return chosen.param ? "Synchronised" : "ByIoctl"; });

Registers calling(std::uint64_t control) {
  Registers registers = distinct();
  registers.rcx = control;
  registers.rdx = 0;
  registers.r8 = 0x1'2000;
  return registers;
}

TEST_P(KernelHypercallTest, ForwardedCallsHaveTheirParametersAndGetTheirResult) {
  Vcpu vcpu = make();
  ASSERT_NO_FATAL_FAILURE(start(vcpu));
  for (const std::uint64_t control : {0x8001U, 0x8002U, 0x8041U}) {
    const Registers before = calling(control);
    ASSERT_KVM_OK(vcpu.set_registers(before));
    ASSERT_RUN(Hypercall, call, vcpu);
    EXPECT_EQ(call, (Hypercall{.control = control,
                               .input = 0,
                               .output = 0x1'2000,
                               .cpl = 0,
                               .long_mode = true,
                               .transport = HypercallTransport::kernel}));
    EXPECT_TRUE(is_bad_state(vcpu.run())) << "unanswered";
    ASSERT_KVM_OK(vcpu.complete_hypercall(0x0000'0003'0000'0005));
    EXPECT_TRUE(is_bad_state(vcpu.complete_hypercall(0))) << "answered already";
    ASSERT_RUN(Hlt, hlt, vcpu);
    Registers after = before;
    after.rax = 0x0000'0003'0000'0005;
    after.rip = after_hlt;
    EXPECT_EQ(vcpu.registers(), after);
  }
}

TEST_P(KernelHypercallTest, OtherCallsAreKvmsOwn) {
  Vcpu vcpu = make();
  ASSERT_NO_FATAL_FAILURE(start(vcpu));
  ASSERT_KVM_OK(vcpu.set_registers(calling(0x8042)));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rax, 2U) << "HV_STATUS_INVALID_HYPERCALL_CODE";
}

TEST_P(KernelHypercallTest, ARefusedCallIsInvalidOpcodeAtTheInstructionWithAllRegistersKept) {
  Vcpu vcpu = make();
  ASSERT_NO_FATAL_FAILURE(start(vcpu));
  const Registers before = calling(0x8001);
  ASSERT_KVM_OK(vcpu.set_registers(before));
  ASSERT_RUN(Hypercall, call, vcpu);
  const std::uint64_t trapped_at = vcpu.registers()->rip;
  ASSERT_KVM_OK(vcpu.refuse_hypercall());
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
  Registers after = vcpu.registers().value();
  EXPECT_EQ(memory.read<ExceptionFrame>(after.rsp).rip, trapped_at);
  after.rsp = before.rsp;
  after.rip = before.rip;
  after.rflags = before.rflags;
  EXPECT_EQ(after, before);
}

TEST_P(KernelHypercallTest, EnforcedCpuidMakesKvmRefuseWhatItDoesNotGrant) {
  if (!kvm->capabilities().hyperv_enforce_cpuid) GTEST_SKIP() << "this KVM has no KVM_CAP_HYPERV_ENFORCE_CPUID";
  Vcpu vcpu = make();
  ASSERT_NO_FATAL_FAILURE(start(vcpu));
  ASSERT_KVM_OK(vcpu.set_registers(calling(0x8001)));
  ASSERT_KVM_OK(vcpu.enforce_hyperv_cpuid());
  {
    ASSERT_RUN(Hypercall, call, vcpu);
    ASSERT_KVM_OK(vcpu.complete_hypercall(0));
    ASSERT_RUN(Hlt, hlt, vcpu);
  }
  auto entries = kvm->supported_cpuid().value();
  for (CpuidEntry entry : kvm->supported_hv_cpuid().value()) {
    if (entry.function == 0x4000'0003) entry.ebx &= ~(1U << 20);
    set_cpuid_entry(entries, entry);
  }
  Vcpu denied = make_vcpu(2, {.sync_registers = GetParam()});
  ASSERT_KVM_OK(denied.set_cpuid(entries));
  ASSERT_KVM_OK(denied.enforce_hyperv_cpuid());
  ASSERT_KVM_OK(start_long_mode(denied));
  ASSERT_KVM_OK(denied.set_registers(calling(0x8001)));
  ASSERT_RUN(Hlt, hlt, denied);
  EXPECT_EQ(denied.registers()->rax, 6U) << "HV_STATUS_ACCESS_DENIED";
}

using EnforcedCpuidTest = BareGuestTest;

TEST_F(EnforcedCpuidTest, IsUnsupportedWhereKvmLacksIt) {
  if (kvm->capabilities().hyperv_enforce_cpuid) GTEST_SKIP() << "this KVM has KVM_CAP_HYPERV_ENFORCE_CPUID";
  Vcpu vcpu = make_vcpu();
  const auto enforced = vcpu.enforce_hyperv_cpuid();
  ASSERT_FALSE(enforced);
  EXPECT_EQ(enforced.error().code, KvmErrc::unsupported);
}

// The page that sends extended calls to the port, and all others to KVM.
class SplitHypercallTest : public UserHypercallTest {
protected:
  void SetUp() override {
    UserHypercallTest::SetUp();
    if (IsSkipped()) return;
    const auto code = split_hypercall_code(hypercall_instruction());
    for (std::size_t i = 0; i < code.size(); ++i)
      memory.write(page + i, code[i]);
  }

  /// Runs until the call came, or has been answered by KVM.
  [[nodiscard]] static std::string way(Vcpu& vcpu) {
    const auto exit = run_on(vcpu);
    return exit ? exit_name(*exit) : exit.error().message();
  }
};

INSTANTIATE_TEST_SUITE_P(Registers, SplitHypercallTest, testing::Values(true, false),
                         [](const auto& chosen) { return chosen.param ? "Synchronised" : "ByIoctl"; });

TEST_P(SplitHypercallTest, A64BitExtendedCallHasItsParametersAndChangesOnlyRax) {
  std::uint32_t id = 0;
  for (const std::uint64_t code : {0x8001U, 0x8002U, 0x8041U}) {
    Vcpu vcpu = make(id++);
    ASSERT_KVM_OK(start_long_mode(vcpu));
    Registers before = distinct();
    before.rcx = 0xA0A0'0000'0001'0000 | code;
    before.rax = 0x8000; // what says nothing here
    ASSERT_KVM_OK(vcpu.set_registers(before));
    ASSERT_RUN(Hypercall, call, vcpu);
    EXPECT_EQ(call, (Hypercall{.control = before.rcx,
                               .input = before.rdx,
                               .output = before.r8,
                               .cpl = 0,
                               .long_mode = true,
                               .transport = HypercallTransport::user}));
    ASSERT_KVM_OK(vcpu.complete_hypercall(0xFEDC'BA98'7654'3210));
    ASSERT_RUN(Hlt, hlt, vcpu);
    Registers after = before;
    after.rax = 0xFEDC'BA98'7654'3210;
    after.rip = after_hlt;
    EXPECT_EQ(vcpu.registers(), after);
  }
}

TEST_P(SplitHypercallTest, A32BitExtendedCallHasItsParametersInPairsAndChangesOnlyEdxEax) {
  std::uint32_t id = 0;
  for (const std::uint64_t code : {0x8001U, 0x8002U, 0x8041U}) {
    Vcpu vcpu = make(id++);
    ASSERT_KVM_OK(start_protected_mode(vcpu));
    Registers before = distinct32();
    before.rax = 0x5051'0000 | code;
    before.rcx = 0x8000; // what says nothing here
    ASSERT_KVM_OK(vcpu.set_registers(before));
    ASSERT_RUN(Hypercall, call, vcpu);
    EXPECT_EQ(call, (Hypercall{.control = before.rdx << 32 | before.rax,
                               .input = before.rbx << 32 | before.rcx,
                               .output = before.rdi << 32 | before.rsi,
                               .cpl = 0,
                               .long_mode = false,
                               .transport = HypercallTransport::user}));
    ASSERT_KVM_OK(vcpu.complete_hypercall(0xFEDC'BA98'7654'3210));
    ASSERT_RUN(Hlt, hlt, vcpu);
    Registers after = before;
    after.rax = 0x7654'3210;
    after.rdx = 0xFEDC'BA98;
    after.rip = after_hlt;
    EXPECT_EQ(vcpu.registers(), after);
  }
}

TEST_P(SplitHypercallTest, A32BitSegmentInLongModeCallsAs32BitCode) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto special = vcpu.special_registers().value();
  special.cs = code32_segment(layout::code32_selector);
  ASSERT_KVM_OK(vcpu.set_special_registers(special));
  Registers before = distinct32();
  before.rax = 0x8001;
  ASSERT_KVM_OK(vcpu.set_registers(before));
  ASSERT_RUN(Hypercall, call, vcpu);
  EXPECT_FALSE(call.long_mode);
  ASSERT_KVM_OK(vcpu.complete_hypercall(2));
  ASSERT_RUN(Hlt, hlt, vcpu);
  Registers after = before;
  after.rax = 2;
  after.rdx = 0;
  after.rip = after_hlt;
  EXPECT_EQ(vcpu.registers(), after);
}

TEST_P(SplitHypercallTest, ARefusedCallIsInvalidOpcodeAtTheInstructionWithAllRegistersKept) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  const Registers before = distinct();
  ASSERT_KVM_OK(vcpu.set_registers(before));
  ASSERT_RUN(Hypercall, call, vcpu);
  ASSERT_KVM_OK(vcpu.refuse_hypercall());
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
  Registers after = vcpu.registers().value();
  const auto frame = memory.read<ExceptionFrame>(after.rsp);
  EXPECT_EQ(memory.read<std::uint8_t>(frame.rip), 0xE6) << "the OUT";
  EXPECT_EQ(frame.rsp, before.rsp - 8) << "within the call";
  after.rsp = before.rsp;
  after.rip = before.rip;
  after.rflags = before.rflags;
  EXPECT_EQ(after, before);
}

TEST_P(SplitHypercallTest, OtherCallsGoToKvmAndChangeOnlyTheResult) {
  if (!machine_facts().kvm_hyperv) GTEST_SKIP() << "this KVM has no Hyper-V";
  constexpr MsrEntry os_id{0x4000'0000, 1};
  std::vector<CpuidEntry> cpuid = *kvm->supported_cpuid();
  set_cpuid_entry(cpuid, {.function = 0x4000'0000, .eax = 0x4000'0006});
  set_cpuid_entry(cpuid, {.function = 0x4000'0001, .eax = 0x3123'7648});
  std::uint32_t id = 0;
  for (const std::uint64_t code : {0x0008U, 0x7FFFU, 0x8000U, 0x8042U, 0xFFFFU, 0x00FFU})
    for (const bool long_mode : {true, false}) {
      Vcpu vcpu = make(id++);
      ASSERT_KVM_OK(vcpu.set_cpuid(cpuid));
      ASSERT_KVM_OK(vcpu.set_msrs(std::span(&os_id, 1)));
      ASSERT_KVM_OK(long_mode ? start_long_mode(vcpu) : start_protected_mode(vcpu));
      Registers before = long_mode ? distinct() : distinct32();
      (long_mode ? before.rcx : before.rax) = code;
      if (!long_mode) before.rdx = 0;
      ASSERT_KVM_OK(vcpu.set_registers(before));
      EXPECT_EQ(way(vcpu), "Hlt") << std::hex << code;
      Registers after = before;
      after.rax = code == 8 ? 0 : 2; // HvCallNotifyLongSpinWait, and codes that KVM does not have
      after.rip = after_hlt;
      EXPECT_EQ(vcpu.registers(), after) << std::hex << code << (long_mode ? " from 64-bit code" : " from 32-bit code");
    }
}

TEST_P(SplitHypercallTest, ExtendedCallsAreToldApartByTheirWholeCode) {
  Vcpu vcpu = make();
  for (std::uint64_t code = 0x8001; code <= 0x8041; ++code) {
    ASSERT_KVM_OK(start_long_mode(vcpu));
    Registers registers = distinct();
    registers.rcx = code;
    ASSERT_KVM_OK(vcpu.set_registers(registers));
    ASSERT_RUN(Hypercall, call, vcpu);
    EXPECT_EQ(call.control, code);
    ASSERT_KVM_OK(vcpu.complete_hypercall(0));
    EXPECT_EQ(way(vcpu), "Hlt");
  }
}

} // namespace
} // namespace cppvmm::test
