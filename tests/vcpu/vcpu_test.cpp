#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <utility>
#include <vector>

#include "support/bare_guest.hpp"

namespace cppvmm::test {
namespace {

std::vector<std::byte> bytes_of(std::initializer_list<int> values) {
  std::vector<std::byte> bytes;
  for (const int value : values)
    bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}

std::vector<std::byte> copy(std::span<const std::byte> bytes) { return {bytes.begin(), bytes.end()}; }

bool is_bad_state(const auto& result) { return !result && result.error().code == KvmErrc::bad_state; }

constexpr std::uint64_t no_memory = 0x3000'0000; // mapped by the page tables, backed by no slot

// Every test of what a guest sees runs with registers through the kvm_run page, and by ioctl.
class VcpuRunTest : public BareGuestTest, public testing::WithParamInterface<bool> {
protected:
  Vcpu make() { return make_vcpu(0, {.sync_registers = GetParam()}); }
};

INSTANTIATE_TEST_SUITE_P(Registers, VcpuRunTest, testing::Values(true, false),
                         [](const auto& chosen) { return chosen.param ? "Synchronised" : "ByIoctl"; });

TEST_P(VcpuRunTest, UsesSyncRegistersAsTold) {
  const Vcpu vcpu = make();
  EXPECT_EQ(vcpu.uses_sync_registers(), GetParam() && kvm->capabilities().sync_registers != 0);
}

TEST_P(VcpuRunTest, PortReadsAndWritesInRealMode) {
  Vcpu vcpu = make();
  load(Code{0xE4, 0x10}.out(0x11).hlt()); // in al, 0x10
  ASSERT_KVM_OK(start_real_mode(vcpu));
  ASSERT_RUN(IoIn, in, vcpu);
  EXPECT_EQ(in.port, 0x10);
  EXPECT_EQ(in.size, 1);
  EXPECT_EQ(in.count, 1U);
  ASSERT_KVM_OK(vcpu.complete_io_in(bytes_of({0x5A})));
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, 0x11);
  EXPECT_EQ(out.size, 1);
  EXPECT_EQ(out.count, 1U);
  EXPECT_EQ(copy(out.data), bytes_of({0x5A}));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rip, layout::code + 5);
}

TEST_P(VcpuRunTest, WidePortsInLongMode) {
  Vcpu vcpu = make();
  // mov edx, 0x1234; in eax, dx; out dx, eax; out dx, ax
  load(Code().mov_edx(0x1234).raw({0xED, 0xEF, 0x66, 0xEF}).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(IoIn, in, vcpu);
  EXPECT_EQ(in.port, 0x1234);
  EXPECT_EQ(in.size, 4);
  ASSERT_KVM_OK(vcpu.complete_io_in(bytes_of({1, 2, 3, 4})));
  {
    ASSERT_RUN(IoOut, out, vcpu);
    EXPECT_EQ(copy(out.data), bytes_of({1, 2, 3, 4}));
  }
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.size, 2);
  EXPECT_EQ(copy(out.data), bytes_of({1, 2}));
  ASSERT_RUN(Hlt, hlt, vcpu);
}

TEST_P(VcpuRunTest, StringPortInstructionsCarryEveryAccess) {
  Vcpu vcpu = make();
  // rep insw; mov esi, free; mov ecx, 3; rep outsb
  load(Code{0xF3, 0x66, 0x6D}.raw({0xBE}).value<std::uint32_t>(layout::free).mov_ecx(3).raw({0xF3, 0x6E}).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto registers = vcpu.registers().value();
  registers.rcx = 2;
  registers.rdx = 0x20;
  registers.rdi = layout::free;
  ASSERT_KVM_OK(vcpu.set_registers(registers));
  std::vector<std::byte> sent;
  std::uint32_t asked = 0;
  while (asked < 4) { // KVM may split what the guest does in one instruction
    ASSERT_RUN(IoIn, in, vcpu);
    EXPECT_EQ(in.size, 2);
    std::vector<std::byte> answer(std::size_t{in.size} * in.count);
    for (std::byte& each : answer)
      each = static_cast<std::byte>(0xA0 + asked++);
    ASSERT_KVM_OK(vcpu.complete_io_in(answer));
  }
  while (sent.size() < 3) {
    ASSERT_RUN(IoOut, out, vcpu);
    EXPECT_EQ(out.size, 1);
    ASSERT_EQ(out.data.size(), out.count);
    sent.insert(sent.end(), out.data.begin(), out.data.end());
  }
  EXPECT_EQ(sent, bytes_of({0xA0, 0xA1, 0xA2}));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(memory.read<std::uint32_t>(layout::free), 0xA3A2'A1A0U);
}

TEST_P(VcpuRunTest, UnansweredReadsAreAllOnes) {
  Vcpu vcpu = make();
  load(Code{0xE5, 0x10, 0x89, 0xC1}.mov_rbx(no_memory).raw({0x48, 0x8B, 0x03}).hlt()); // in eax, 0x10; mov ecx, eax
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(IoIn, in, vcpu);
  ASSERT_RUN(MmioRead, read, vcpu);
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rcx, 0xFFFF'FFFFU);
  EXPECT_EQ(vcpu.registers()->rax, ~std::uint64_t{0});
}

TEST_P(VcpuRunTest, MmioReadsAndWrites) {
  Vcpu vcpu = make();
  // mov rax, [rbx]; mov [rbx + 16], ax
  load(Code().mov_rbx(no_memory).raw({0x48, 0x8B, 0x03, 0x66, 0x89, 0x43, 0x10}).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(MmioRead, read, vcpu);
  EXPECT_EQ(read.address, no_memory);
  EXPECT_EQ(read.size, 8U);
  ASSERT_KVM_OK(vcpu.complete_mmio_read(bytes_of({8, 7, 6, 5, 4, 3, 2, 1})));
  ASSERT_RUN(MmioWrite, write, vcpu);
  EXPECT_EQ(write.address, no_memory + 16);
  EXPECT_EQ(copy(write.data), bytes_of({8, 7}));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rax, 0x0102'0304'0506'0708U);
}

TEST_P(VcpuRunTest, AnswersOfTheWrongLengthAreRefusedAndTheExitStillWaits) {
  Vcpu vcpu = make();
  load(Code{0x66, 0xE5, 0x10}.mov_rbx(no_memory).raw({0x8B, 0x0B}).hlt()); // in ax, 0x10; mov ecx, [rbx]
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(IoIn, in, vcpu);
  const auto shorter = vcpu.complete_io_in(bytes_of({1}));
  ASSERT_FALSE(shorter);
  EXPECT_EQ(shorter.error().code, KvmErrc::invalid_argument);
  EXPECT_EQ(shorter.error().value, 2U);
  EXPECT_FALSE(vcpu.complete_io_in(bytes_of({1, 2, 3})));
  ASSERT_KVM_OK(vcpu.complete_io_in(bytes_of({0x34, 0x12})));
  ASSERT_RUN(MmioRead, read, vcpu);
  EXPECT_FALSE(vcpu.complete_mmio_read(bytes_of({1, 2, 3, 4, 5, 6, 7, 8})));
  ASSERT_KVM_OK(vcpu.complete_mmio_read(bytes_of({0x78, 0x56, 0, 0})));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rax & 0xFFFF, 0x1234U);
  EXPECT_EQ(vcpu.registers()->rcx, 0x5678U);
}

TEST_P(VcpuRunTest, AnswersWithoutAQuestionAreBadState) {
  Vcpu vcpu = make();
  const auto nothing_waits = [&] {
    EXPECT_TRUE(is_bad_state(vcpu.complete_io_in(bytes_of({1}))));
    EXPECT_TRUE(is_bad_state(vcpu.complete_mmio_read(bytes_of({1}))));
    EXPECT_TRUE(is_bad_state(vcpu.complete_read_msr(1)));
    EXPECT_TRUE(is_bad_state(vcpu.complete_write_msr()));
    EXPECT_TRUE(is_bad_state(vcpu.refuse_msr()));
    EXPECT_TRUE(is_bad_state(vcpu.complete_hypercall(1)));
    EXPECT_TRUE(is_bad_state(vcpu.continue_hypercall(1)));
    EXPECT_TRUE(is_bad_state(vcpu.refuse_hypercall()));
  };
  nothing_waits();
  load(Code{0xE4, 0x10}.out(0x11).hlt());
  ASSERT_KVM_OK(start_real_mode(vcpu));
  ASSERT_RUN(IoIn, in, vcpu);
  EXPECT_TRUE(is_bad_state(vcpu.complete_mmio_read(bytes_of({1}))));
  EXPECT_TRUE(is_bad_state(vcpu.complete_hypercall(1)));
  EXPECT_TRUE(is_bad_state(vcpu.continue_hypercall(1)));
  EXPECT_TRUE(is_bad_state(vcpu.inject_exception(ExceptionVector::invalid_opcode)));
  ASSERT_KVM_OK(vcpu.complete_io_in(bytes_of({1})));
  nothing_waits();
  ASSERT_RUN(IoOut, out, vcpu);
  nothing_waits();
}

TEST_P(VcpuRunTest, ATripleFaultIsAShutdown) {
  Vcpu vcpu = make();
  load(Code{0x0F, 0x0B}); // ud2
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto special = vcpu.special_registers().value();
  special.idt.limit = 0;
  ASSERT_KVM_OK(vcpu.set_special_registers(special));
  ASSERT_RUN(Shutdown, shutdown, vcpu);
}

TEST_P(VcpuRunTest, MsrAccessesThatTheFilterDeniesAreExits) {
  if (!kvm->capabilities().msr_filter) GTEST_SKIP() << "this KVM has no KVM_CAP_X86_MSR_FILTER";
  ASSERT_KVM_OK(vm->take_hyperv_msrs());
  Vcpu vcpu = make();
  load(Code()
           .mov_ecx(0x4000'0000)
           .mov_eax(0x1111'2222)
           .mov_edx(0x8100'0000)
           .raw({0x0F, 0x30}) // wrmsr
           .mov_ecx(0x4000'01FF)
           .raw({0x0F, 0x32}) // rdmsr
           .hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(WriteMsr, write, vcpu);
  EXPECT_EQ(write.index, 0x4000'0000U);
  EXPECT_EQ(write.value, 0x8100'0000'1111'2222U);
  EXPECT_EQ(write.reason, msr_reason_filter);
  EXPECT_TRUE(is_bad_state(vcpu.run())) << "unanswered";
  EXPECT_TRUE(is_bad_state(vcpu.complete_read_msr(0)));
  ASSERT_KVM_OK(vcpu.complete_write_msr());
  EXPECT_TRUE(is_bad_state(vcpu.complete_write_msr())) << "answered already";
  ASSERT_RUN(ReadMsr, read, vcpu);
  EXPECT_EQ(read.index, 0x4000'01FFU);
  EXPECT_EQ(read.reason, msr_reason_filter);
  EXPECT_TRUE(is_bad_state(vcpu.run())) << "unanswered";
  EXPECT_TRUE(is_bad_state(vcpu.complete_write_msr()));
  ASSERT_KVM_OK(vcpu.complete_read_msr(0xAAAA'BBBB'CCCC'DDDD));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rax, 0xCCCC'DDDDU);
  EXPECT_EQ(vcpu.registers()->rdx, 0xAAAA'BBBBU);
}

TEST_P(VcpuRunTest, RefusedMsrAccessesAreGeneralProtectionFaults) {
  if (!kvm->capabilities().msr_filter) GTEST_SKIP() << "this KVM has no KVM_CAP_X86_MSR_FILTER";
  ASSERT_KVM_OK(vm->take_hyperv_msrs());
  for (const bool is_write : {true, false}) {
    Vcpu vcpu = make_vcpu(is_write ? 0 : 1, {.sync_registers = GetParam()});
    load(Code().mov_ecx(0x4000'0002).raw({0x0F, is_write ? 0x30 : 0x32}).hlt());
    ASSERT_KVM_OK(start_long_mode(vcpu));
    if (is_write) {
      ASSERT_RUN(WriteMsr, write, vcpu);
    } else {
      ASSERT_RUN(ReadMsr, read, vcpu);
    }
    ASSERT_KVM_OK(vcpu.refuse_msr());
    ASSERT_RUN(IoOut, out, vcpu);
    EXPECT_EQ(out.port, exception_port(ExceptionVector::general_protection));
    const std::uint64_t frame = vcpu.registers()->rsp; // the error code, then the frame
    EXPECT_EQ(memory.read<std::uint64_t>(frame), 0U);
    EXPECT_EQ(memory.read<std::uint64_t>(frame + 8), layout::code + 5) << "RIP at the instruction";
  }
}

TEST_P(VcpuRunTest, AFilterCanDenyWritesAndLeaveReads) {
  if (!kvm->capabilities().msr_filter) GTEST_SKIP() << "this KVM has no KVM_CAP_X86_MSR_FILTER";
  constexpr std::uint32_t star = 0xC000'0081;
  ASSERT_KVM_OK(vm->enable_user_space_msrs(msr_reason_filter));
  ASSERT_KVM_OK(vm->set_msr_filter(std::array{MsrRange{.first = star, .count = 1, .reads = false}}));
  Vcpu vcpu = make();
  ASSERT_KVM_OK(vcpu.set_msrs(std::array{MsrEntry{.index = star, .value = 0x0008'0010'0000'0000}}));
  load(Code().mov_ecx(star).raw({0x0F, 0x32, 0x0F, 0x30}).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(WriteMsr, write, vcpu);
  EXPECT_EQ(write.index, star);
  EXPECT_EQ(write.value, 0x0008'0010'0000'0000U) << "as the guest read it";
  ASSERT_KVM_OK(vcpu.complete_write_msr());
  ASSERT_RUN(Hlt, hlt, vcpu);
}

TEST_P(VcpuRunTest, InjectedExceptionsAreDelivered) {
  Vcpu vcpu = make();
  load(Code{0x90}.hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_KVM_OK(vcpu.inject_exception(ExceptionVector::general_protection, 0x58));
  EXPECT_TRUE(is_bad_state(vcpu.inject_exception(ExceptionVector::invalid_opcode)));
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::general_protection));
  const std::uint64_t frame = vcpu.registers()->rsp;
  EXPECT_EQ(memory.read<std::uint64_t>(frame), 0x58U);
  EXPECT_EQ(memory.read<std::uint64_t>(frame + 8), layout::code);
}

TEST_P(VcpuRunTest, AnInjectedExceptionSurvivesThatRegistersAreSet) {
  Vcpu vcpu = make();
  load(Code{0x90}.hlt());
  load(Code{0x90}.hlt(), layout::free);
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_KVM_OK(vcpu.inject_exception(ExceptionVector::invalid_opcode));
  auto registers = vcpu.registers().value();
  registers.rip = layout::free;
  ASSERT_KVM_OK(vcpu.set_registers(registers));
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, exception_port(ExceptionVector::invalid_opcode));
  EXPECT_EQ(memory.read<ExceptionFrame>(vcpu.registers()->rsp).rip, layout::free);
}

TEST_P(VcpuRunTest, InterruptsAreInjectedWhenTheWindowOpens) {
  Vcpu vcpu = make();
  load(Code{0xFB, 0x90}.spin()); // sti; nop
  load(Code().out(0x77).hlt(), layout::free);
  memory.write<std::uint32_t>(4 * 0x21, static_cast<std::uint32_t>(layout::free >> 4 << 16));
  ASSERT_KVM_OK(start_real_mode(vcpu));
  ASSERT_KVM_OK(vcpu.request_interrupt_window(true));
  ASSERT_RUN(InterruptWindowOpen, open, vcpu);
  EXPECT_TRUE(vcpu.ready_for_interrupt());
  ASSERT_KVM_OK(vcpu.request_interrupt_window(false));
  ASSERT_KVM_OK(vcpu.inject_interrupt(0x21));
  ASSERT_RUN(IoOut, out, vcpu);
  EXPECT_EQ(out.port, 0x77);
}

TEST_P(VcpuRunTest, SingleStepsAreDebugExits) {
  Vcpu vcpu = make();
  load(Code{0x90, 0x90}.hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
  ASSERT_EQ(ioctl(vcpu.descriptor(), KVM_SET_GUEST_DEBUG, &debug), 0) << "errno " << errno;
  ASSERT_RUN(Debug, step, vcpu);
  EXPECT_EQ(step.exception, 1U);
  EXPECT_EQ(step.rip, layout::code + 1);
  EXPECT_NE(step.dr6 & 1U << 14, 0U);
}

TEST_P(VcpuRunTest, RegistersAreThoseOfTheGuest) {
  Vcpu vcpu = make();
  load(Code().mov_eax(0x1234'5678).mov_rbx(0x1122'3344'5566'7788).hlt().mov_eax(1).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  Registers before{.rsi = 1, .rdi = 2, .rsp = layout::stack, .rbp = 3, .r8 = 8, .r15 = 15, .rip = layout::code};
  ASSERT_KVM_OK(vcpu.set_registers(before));
  EXPECT_EQ(vcpu.registers(), before);
  {
    ASSERT_RUN(Hlt, hlt, vcpu);
  }
  Registers after = before;
  after.rax = 0x1234'5678;
  after.rbx = 0x1122'3344'5566'7788;
  after.rip = layout::code + 16;
  EXPECT_EQ(vcpu.registers(), after);
  after.rcx = 99; // set after a run, seen at once and after the next
  ASSERT_KVM_OK(vcpu.set_registers(after));
  EXPECT_EQ(vcpu.registers(), after);
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rcx, 99U);
  EXPECT_EQ(vcpu.registers()->rax, 1U);
}

TEST_P(VcpuRunTest, SpecialRegistersAreThoseOfTheGuest) {
  Vcpu vcpu = make();
  ASSERT_KVM_OK(vcpu.use_user_hypercalls()); // which synchronises them too
  load(Code{0x0F, 0x22, 0xD0}.hlt());        // mov cr2, rax
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto registers = vcpu.registers().value();
  registers.rax = 0xABC0;
  ASSERT_KVM_OK(vcpu.set_registers(registers));
  auto special = vcpu.special_registers().value();
  EXPECT_EQ(special.cr3, layout::pml4);
  EXPECT_EQ(special.efer, efer_lme | efer_lma);
  EXPECT_EQ(special.cs, code64_segment(layout::code64_selector));
  EXPECT_EQ(special.idt, (DescriptorTable{.base = layout::idt64, .limit = 32 * 16 - 1}));
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.special_registers()->cr2, 0xABC0U);
  special.cr2 = 0x1230;
  ASSERT_KVM_OK(vcpu.set_special_registers(special));
  EXPECT_EQ(vcpu.special_registers()->cr2, 0x1230U);
}

using VcpuTest = BareGuestTest;

TEST_F(VcpuTest, AdoptsADescriptorAndRunsIt) {
  Vcpu made = make_vcpu(5);
  auto copy_of = FileDescriptor::duplicate(made.descriptor());
  ASSERT_KVM_OK(copy_of);
  auto adopted = Vcpu::adopt(std::move(*copy_of), kvm->capabilities(), 5);
  ASSERT_KVM_OK(adopted);
  EXPECT_EQ(adopted->id(), 5U);
  load(Code().out(0x33).hlt());
  ASSERT_KVM_OK(start_long_mode(*adopted));
  ASSERT_RUN(IoOut, out, *adopted);
  EXPECT_EQ(out.port, 0x33);
}

TEST_F(VcpuTest, RefusesToAdoptWhatIsNoVcpu) {
  EXPECT_FALSE(Vcpu::adopt(FileDescriptor(), kvm->capabilities()));
  EXPECT_FALSE(Vcpu::adopt(FileDescriptor(open("/dev/null", O_RDWR | O_CLOEXEC)), kvm->capabilities()));
  EXPECT_FALSE(Vcpu::adopt(FileDescriptor::duplicate(vm->descriptor()).value(), kvm->capabilities()));
  EXPECT_FALSE(Vcpu::adopt(FileDescriptor::duplicate(kvm->descriptor()).value(), kvm->capabilities()));
}

TEST_F(VcpuTest, RefusesAKvmRunThatIsTooSmall) {
  Vcpu made = make_vcpu();
  Capabilities capabilities = kvm->capabilities();
  capabilities.vcpu_mmap_bytes = 1024;
  const auto adopted = Vcpu::adopt(FileDescriptor::duplicate(made.descriptor()).value(), capabilities);
  ASSERT_FALSE(adopted);
  EXPECT_EQ(adopted.error().code, KvmErrc::unsupported);
  EXPECT_EQ(adopted.error().value, 1024U);
}

// The data of port I/O lies behind kvm_run, in the second page of the mapping.
TEST_F(VcpuTest, PortDataOutsideOfTheMappingIsAnErrorAndNotAnAccess) {
  Vcpu made = make_vcpu();
  Capabilities capabilities = kvm->capabilities();
  capabilities.vcpu_mmap_bytes = 4096;
  auto adopted = Vcpu::adopt(FileDescriptor::duplicate(made.descriptor()).value(), capabilities);
  ASSERT_KVM_OK(adopted);
  load(Code().out(0x33).hlt());
  ASSERT_KVM_OK(start_long_mode(*adopted));
  EXPECT_TRUE(is_bad_state(run_on(*adopted)));
}

TEST_F(VcpuTest, AMovedFromVcpuRefusesEverything) {
  Vcpu vcpu = make_vcpu();
  Vcpu other = std::move(vcpu);
  // NOLINTBEGIN(bugprone-use-after-move): what it promises
  EXPECT_EQ(vcpu.descriptor(), -1);
  EXPECT_TRUE(is_bad_state(vcpu.run()));
  EXPECT_TRUE(is_bad_state(vcpu.registers()));
  EXPECT_TRUE(is_bad_state(vcpu.set_registers({})));
  EXPECT_TRUE(is_bad_state(vcpu.special_registers()));
  EXPECT_TRUE(is_bad_state(vcpu.set_special_registers({})));
  EXPECT_TRUE(is_bad_state(vcpu.set_cpuid({})));
  EXPECT_TRUE(is_bad_state(vcpu.cpuid()));
  EXPECT_TRUE(is_bad_state(vcpu.msr(0x10)));
  EXPECT_TRUE(is_bad_state(vcpu.mp_state()));
  EXPECT_TRUE(is_bad_state(vcpu.inject_exception(ExceptionVector::debug)));
  EXPECT_TRUE(is_bad_state(vcpu.complete_hypercall(0)));
  EXPECT_TRUE(is_bad_state(vcpu.continue_hypercall(0)));
  EXPECT_TRUE(is_bad_state(vcpu.refuse_hypercall()));
  EXPECT_TRUE(is_bad_state(vcpu.use_user_hypercalls()));
  vcpu.stop_handle().request_stop();
  EXPECT_FALSE(vcpu.acknowledge_stop());
  // NOLINTEND(bugprone-use-after-move)
  EXPECT_GE(other.descriptor(), 0);
}

TEST_F(VcpuTest, GuestsSeeTheCpuidThatWasSet) {
  Vcpu vcpu = make_vcpu();
  auto entries = kvm->supported_cpuid().value();
  set_cpuid_entry(
      entries,
      {.function = 0x4000'0000, .eax = 0x4000'0005, .ebx = 0x7263'694D, .ecx = 0x666F'736F, .edx = 0x7648'2074});
  ASSERT_KVM_OK(vcpu.set_cpuid(entries));
  const auto given = vcpu.cpuid();
  ASSERT_KVM_OK(given);
  ASSERT_NE(find_cpuid(*given, 0x4000'0000), nullptr);
  EXPECT_EQ(find_cpuid(*given, 0x4000'0000)->ebx, 0x7263'694DU);
  load(Code().mov_eax(0x4000'0000).raw({0x0F, 0xA2}).hlt()); // cpuid
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(Hlt, hlt, vcpu);
  const auto registers = vcpu.registers().value();
  EXPECT_EQ(registers.rax, 0x4000'0005U);
  EXPECT_EQ(registers.rbx, 0x7263'694DU);
  EXPECT_EQ(registers.rcx, 0x666F'736FU);
  EXPECT_EQ(registers.rdx, 0x7648'2074U);
}

TEST_F(VcpuTest, RefusesMoreCpuidThanKvmTakes) {
  Vcpu vcpu = make_vcpu();
  const auto set = vcpu.set_cpuid(std::vector<CpuidEntry>(257));
  ASSERT_FALSE(set);
  EXPECT_EQ(set.error().code, KvmErrc::invalid_argument);
}

TEST_F(VcpuTest, MsrsAreSetAndRead) {
  constexpr std::uint32_t star = 0xC000'0081;
  constexpr std::uint32_t lstar = 0xC000'0082;
  Vcpu vcpu = make_vcpu();
  const std::array set{MsrEntry{.index = star, .value = 0x0008'0010'0000'0000},
                       MsrEntry{.index = lstar, .value = 0x1234}};
  ASSERT_KVM_OK(vcpu.set_msrs(set));
  EXPECT_EQ(vcpu.msrs(std::array{star, lstar}), (std::vector<MsrEntry>{set.begin(), set.end()}));
  EXPECT_EQ(vcpu.msr(lstar), 0x1234U);
}

TEST_F(VcpuTest, MoreMsrsThanFitIntoOneRequestAreReadAndSet) {
  constexpr std::uint32_t lstar = 0xC000'0082;
  Vcpu vcpu = make_vcpu();
  std::vector<MsrEntry> entries;
  for (std::uint64_t i = 0; i < 300; ++i)
    entries.push_back({.index = lstar, .value = i});
  ASSERT_KVM_OK(vcpu.set_msrs(entries));
  EXPECT_EQ(vcpu.msr(lstar), 299U) << "in order";
  const auto read = vcpu.msrs(std::vector<std::uint32_t>(300, lstar));
  ASSERT_KVM_OK(read);
  EXPECT_EQ(read->size(), 300U);
}

TEST_F(VcpuTest, AnMsrThatKvmDoesNotGiveIsNamed) {
  constexpr std::uint32_t lstar = 0xC000'0082;
  constexpr std::uint32_t nobodys = 0x4ABC'DEF0;
  Vcpu vcpu = make_vcpu();
  const auto read = vcpu.msrs(std::array{lstar, nobodys});
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().code, KvmErrc::unsupported);
  EXPECT_EQ(read.error().value, nobodys);
  const auto set =
      vcpu.set_msrs(std::array{MsrEntry{.index = lstar, .value = 0x77}, MsrEntry{.index = nobodys, .value = 1}});
  ASSERT_FALSE(set);
  EXPECT_EQ(set.error().value, nobodys);
  EXPECT_EQ(vcpu.msr(lstar), 0x77U);
}

TEST_F(VcpuTest, RefusedSpecialRegistersAreAnError) {
  Vcpu vcpu = make_vcpu();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto special = vcpu.special_registers().value();
  special.cr4 &= ~cr4_pae; // long mode without PAE
  const auto set = vcpu.set_special_registers(special);
  ASSERT_FALSE(set);
  EXPECT_EQ(set.error().os_error, EINVAL);
}

// A dirty ring that is full: an exit that has no type of its own.
TEST_F(VcpuTest, UnknownExitsKeepTheirNumber) {
  constexpr std::uint32_t dirty_ring_full = 31; // KVM_EXIT_DIRTY_RING_FULL
  const int ring_bytes = kvm->check_extension(KVM_CAP_DIRTY_LOG_RING).value_or(0);
  if (ring_bytes < 4096) GTEST_SKIP() << "this KVM has no KVM_CAP_DIRTY_LOG_RING";
  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_DIRTY_LOG_RING;
  enable.args[0] = 4096 * 4; // entries of 16 bytes: 1024
  ASSERT_EQ(ioctl(vm->descriptor(), KVM_ENABLE_CAP, &enable), 0) << "errno " << errno;
  constexpr std::uint64_t address = 0x0800'0000;
  HostMemory more(2048 * 4096);
  ASSERT_KVM_OK(vm->set_memory_slot(
      {.slot = 1, .guest_address = address, .bytes = more.size(), .host_address = more.data(), .log_dirty = true}));
  Vcpu vcpu = make_vcpu();
  load(Code()
           .mov_rbx(address)
           .mov_ecx(2048)
           .raw({0x89, 0x03})                               // mov [rbx], eax
           .raw({0x48, 0x81, 0xC3, 0x00, 0x10, 0x00, 0x00}) // add rbx, 4096
           .raw({0xE2, 0xF5})                               // loop to the mov
           .hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(UnknownExit, unknown, vcpu);
  EXPECT_EQ(unknown.reason, dirty_ring_full);
  EXPECT_STREQ(exit_name(*unknown_exit_), "UnknownExit");
}

TEST_F(VcpuTest, AnInstructionThatCannotBeFetchedIsAnInternalError) {
  Vcpu vcpu = make_vcpu();
  ASSERT_KVM_OK(start_long_mode(vcpu, no_memory));
  ASSERT_RUN(InternalError, error, vcpu);
  EXPECT_EQ(error.suberror, static_cast<std::uint32_t>(KVM_INTERNAL_ERROR_EMULATION));
  EXPECT_LE(error.data.size(), 16U);
  EXPECT_LE(error.instruction.size(), 15U);
}

/// A slot of two pages, and a guest that accesses the second: a read, or a write.
class DeniedMemory : public BareGuestTest, public testing::WithParamInterface<bool> {
protected:
  static constexpr std::uint64_t address = 0x0800'0000;

  void run_against(const HostMemory& more) {
    ASSERT_KVM_OK(
        vm->set_memory_slot({.slot = 1, .guest_address = address, .bytes = more.size(), .host_address = more.data()}));
    vcpu.emplace(make_vcpu());
    // mov eax, [rbx] or mov [rbx], eax
    load(Code().mov_rbx(address + page_size).mov_eax(7).raw({GetParam() ? 0x89 : 0x8B, 0x03}).out(0x10).hlt());
    ASSERT_KVM_OK(start_long_mode(*vcpu));
    const auto exit = run_on(*vcpu);
    ASSERT_TRUE(exit) << exit.error().message();
    if (std::holds_alternative<MmioRead>(*exit) || std::holds_alternative<MmioWrite>(*exit))
      GTEST_SKIP() << "this KVM emulates the access, and makes it MMIO";
    ASSERT_TRUE(std::holds_alternative<MemoryFault>(*exit)) << exit_name(*exit);
    const auto& fault = std::get<MemoryFault>(*exit);
    EXPECT_EQ(fault.os_error, EFAULT);
    // Linux 6.12 does not name the address of such memory.
    if (fault.address) EXPECT_EQ(*fault.address & ~(page_size - 1), address + page_size);
  }
  /// The access is made once there is memory.
  void expect_to_go_on(const HostMemory& more) {
    ASSERT_RUN(IoOut, out, *vcpu);
    EXPECT_EQ(more.read<std::uint32_t>(page_size), GetParam() ? 7U : 0U);
  }

  static constexpr std::uint64_t page_size = 0x1000;
  std::optional<Vcpu> vcpu;
};

INSTANTIATE_TEST_SUITE_P(Accesses, DeniedMemory, testing::Bool(),
                         [](const auto& info) { return info.param ? "Write" : "Read"; });

TEST_P(DeniedMemory, ThatIsProtectedIsAMemoryFault) {
  const HostMemory more(2 * page_size);
  ASSERT_EQ(mprotect(more.data() + page_size, page_size, PROT_NONE), 0);
  ASSERT_NO_FATAL_FAILURE(run_against(more));
  if (IsSkipped()) return;
  ASSERT_EQ(mprotect(more.data() + page_size, page_size, PROT_READ | PROT_WRITE), 0);
  expect_to_go_on(more);
}

TEST_P(DeniedMemory, ThatIsBeyondItsFilesEndIsAMemoryFault) {
  const HostMemory more(2 * page_size);
  const int file = memfd_create("truncated", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(file, page_size), 0);
  ASSERT_NE(mmap(more.data(), more.size(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0), MAP_FAILED);
  run_against(more);
  if (!IsSkipped() && !HasFatalFailure()) {
    EXPECT_EQ(ftruncate(file, 2 * page_size), 0);
    expect_to_go_on(more);
  }
  close(file);
}

TEST_P(DeniedMemory, ThatIsUnmappedIsAMemoryFault) {
  const HostMemory more(2 * page_size);
  void* const space = more.data() + page_size;
  ASSERT_EQ(munmap(space, page_size), 0);
  run_against(more);
  // Nobody else may get the place.
  ASSERT_EQ(mmap(space, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
            space);
  if (!IsSkipped() && !HasFatalFailure()) expect_to_go_on(more);
}

TEST_F(VcpuTest, AGuestCrashIsASystemEvent) {
  if (!kvm->capabilities().hyperv_cpuid)
    GTEST_SKIP() << "this KVM has no Hyper-V face, whose crash MSRs make the event";
  Vcpu vcpu = make_vcpu();
  auto entries = kvm->supported_cpuid().value();
  for (const CpuidEntry& entry : kvm->supported_hv_cpuid().value())
    set_cpuid_entry(entries, entry);
  ASSERT_KVM_OK(vcpu.set_cpuid(entries));
  // HV_X64_MSR_CRASH_CTL, bit 63: notify
  load(Code().mov_ecx(0x4000'0105).mov_eax(0).mov_edx(0x8000'0000).raw({0x0F, 0x30}).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(SystemEvent, event, vcpu);
  EXPECT_EQ(event.type, static_cast<std::uint32_t>(KVM_SYSTEM_EVENT_CRASH));
  EXPECT_LE(event.data.size(), 16U);
}

} // namespace
} // namespace cppvmm::test
