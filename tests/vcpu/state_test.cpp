#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <linux/kvm.h>
#include <optional>
#include <span>
#include <vector>

#include "support/bare_guest.hpp"

// What KVM keeps of a VM, taken and put back.

namespace cppvmm::test {
namespace {

constexpr std::uint8_t port = 0x10;

class State : public BareGuestTest {
protected:
  void SetUp() override {
    BareGuestTest::SetUp();
    if (!IsSkipped()) ASSERT_KVM_OK(vm->create_interrupt_controller());
  }
};

TEST_F(State, OfAVcpuIsPutBackAsItWasTaken) {
  Vcpu vcpu = make_vcpu();
  const auto same = [&](auto take, auto put) {
    const auto taken = (vcpu.*take)();
    ASSERT_TRUE(taken) << taken.error().message();
    const auto done = (vcpu.*put)(*taken);
    ASSERT_TRUE(done) << done.error().message();
    EXPECT_EQ((vcpu.*take)(), taken);
  };
  same(&Vcpu::events, &Vcpu::set_events);
  same(&Vcpu::debug_registers, &Vcpu::set_debug_registers);
  same(&Vcpu::extended_control_registers, &Vcpu::set_extended_control_registers);
  same(&Vcpu::xsave, &Vcpu::set_xsave);
  same(&Vcpu::local_apic, &Vcpu::set_local_apic);
  const auto khz = vcpu.tsc_khz();
  ASSERT_TRUE(khz) << khz.error().message();
  EXPECT_GT(*khz, 100'000U);
  ASSERT_KVM_OK(vcpu.set_tsc_khz(*khz));
  EXPECT_EQ(vcpu.tsc_khz(), *khz);
}

TEST_F(State, OfAnXsaveOfAnotherSizeIsRefused) {
  Vcpu vcpu = make_vcpu();
  auto xsave = *vcpu.xsave();
  EXPECT_GE(xsave.bytes.size(), 4096U);
  xsave.bytes.resize(100);
  const auto refused = vcpu.set_xsave(xsave);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, KvmErrc::invalid_argument);
}

TEST_F(State, OfAGuestsOwnGuestsIsPutBackAsItWasTaken) {
  Vcpu vcpu = make_vcpu();
  const auto taken = vcpu.nested_state();
  if (kvm->capabilities().nested_state_bytes == 0) {
    ASSERT_FALSE(taken);
    EXPECT_EQ(taken.error().code, KvmErrc::unsupported);
    EXPECT_FALSE(vcpu.set_nested_state({}));
    GTEST_SKIP() << "this KVM's guests have no guests";
  }
  ASSERT_TRUE(taken) << taken.error().message();
  EXPECT_GE(taken->bytes.size(), 128U);
  EXPECT_LE(taken->bytes.size(), kvm->capabilities().nested_state_bytes);
  ASSERT_KVM_OK(vcpu.set_nested_state(*taken));
  EXPECT_EQ(vcpu.nested_state(), taken);
  // KVM would read behind the end.
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{7}, taken->bytes.size() - 1, taken->bytes.size() + 1}) {
    auto other = *taken;
    other.bytes.resize(bytes);
    const auto refused = vcpu.set_nested_state(other);
    ASSERT_FALSE(refused) << bytes;
    EXPECT_EQ(refused.error().code, KvmErrc::invalid_argument);
  }
}

TEST_F(State, OfTheBoardIsPutBackAsItWasTaken) {
  for (const auto chip : {InterruptChip::pic_master, InterruptChip::pic_slave, InterruptChip::io_apic}) {
    const auto taken = vm->interrupt_controller(chip);
    ASSERT_TRUE(taken) << taken.error().message();
    ASSERT_KVM_OK(vm->set_interrupt_controller(*taken));
    EXPECT_EQ(vm->interrupt_controller(chip), taken);
  }
  EXPECT_NE(*vm->interrupt_controller(InterruptChip::pic_master), *vm->interrupt_controller(InterruptChip::io_apic));
  EXPECT_FALSE(vm->interval_timer()) << "there is none";
  ASSERT_KVM_OK(vm->create_interval_timer());
  const auto timer = vm->interval_timer();
  ASSERT_TRUE(timer) << timer.error().message();
  ASSERT_KVM_OK(vm->set_interval_timer(*timer));
  const auto clock = vm->clock();
  ASSERT_TRUE(clock) << clock.error().message();
  ASSERT_KVM_OK(vm->set_clock(*clock));
}

TEST_F(State, HasTheMsrsThatKvmNames) {
  const auto indices = kvm->msr_indices();
  ASSERT_TRUE(indices) << indices.error().message();
  EXPECT_GT(indices->size(), 10U);
  constexpr std::uint32_t tsc = 0x10;
  EXPECT_NE(std::ranges::find(*indices, tsc), indices->end());
}

// Where KVM keeps the special registers in the kvm_run page, they are looked at there.
class StateOfACaller : public State {
protected:
  /// In 64-bit code that calls again and again; `more_efer`, once it is made.
  Vcpu make(std::uint64_t more_efer = 0) {
    Vcpu vcpu = make_vcpu();
    value_or_throw(vcpu.use_user_hypercalls());
    load(Code().out(user_hypercall_port).loop());
    value_or_throw(start_long_mode(vcpu));
    auto special = vcpu.special_registers().value();
    special.efer |= more_efer;
    value_or_throw(vcpu.set_special_registers(special));
    return vcpu;
  }

  /// To a call whose special registers are in the page: those of the call before were looked at.
  static void run_to_call(Vcpu& vcpu) {
    for (int i = 0; i < 2; ++i) {
      ASSERT_RUN(Hypercall, call, vcpu);
      ASSERT_KVM_OK(vcpu.complete_hypercall(0));
    }
  }
};

TEST_F(StateOfACaller, MsrsThatAreSetShowInTheSpecialRegisters) {
  Vcpu vcpu = make();
  ASSERT_NO_FATAL_FAILURE(run_to_call(vcpu));
  ASSERT_EQ(vcpu.special_registers()->fs.base, 0U);
  constexpr MsrEntry fs_base{.index = 0xC000'0100, .value = 0x1234'5678};
  ASSERT_KVM_OK(vcpu.set_msrs(std::span(&fs_base, 1)));
  EXPECT_EQ(vcpu.special_registers()->fs.base, fs_base.value);
}

TEST_F(StateOfACaller, EventsThatAreSetShowInTheSpecialRegisters) {
  Vcpu vcpu = make();
  ASSERT_NO_FATAL_FAILURE(run_to_call(vcpu));
  ASSERT_EQ(vcpu.special_registers()->interrupt_bitmap, (std::array<std::uint64_t, 4>{}));
  auto events = vcpu.events().value();
  constexpr std::size_t interrupt_injected = 8;
  events.bytes[interrupt_injected] = std::byte{1};
  events.bytes[interrupt_injected + 1] = std::byte{0x41};
  ASSERT_KVM_OK(vcpu.set_events(events));
  EXPECT_EQ(vcpu.special_registers()->interrupt_bitmap, (std::array<std::uint64_t, 4>{0, 2}));
}

TEST_F(StateOfACaller, ALocalApicThatIsSetShowsInTheSpecialRegisters) {
  Vcpu vcpu = make();
  ASSERT_NO_FATAL_FAILURE(run_to_call(vcpu));
  ASSERT_EQ(vcpu.special_registers()->cr8, 0U);
  auto apic = vcpu.local_apic().value();
  constexpr std::size_t task_priority = 0x80;
  apic.bytes[task_priority] = std::byte{0x50};
  ASSERT_KVM_OK(vcpu.set_local_apic(apic));
  EXPECT_EQ(vcpu.special_registers()->cr8, 5U);
}

// The guest's own guest makes the calls; then its state is set as that of the guest, which has another GDT.
TEST_F(StateOfACaller, NestedStateThatIsSetShowsInTheSpecialRegisters) {
  constexpr std::uint32_t svm_leaf = 0x8000'0001;
  constexpr std::uint32_t svm = 1U << 2; // ECX
  const auto cpuid = kvm->supported_cpuid().value();
  const CpuidEntry* const leaf = find_cpuid(cpuid, svm_leaf);
  if (kvm->capabilities().nested_state_bytes == 0 || leaf == nullptr || (leaf->ecx & svm) == 0)
    GTEST_SKIP() << "this KVM's guests have no guests by SVM";
  constexpr std::uint64_t efer_svme = 1U << 12;
  constexpr std::uint64_t other_gdt = 0x7000;
  Vcpu vcpu = make(efer_svme);
  const auto outer = vcpu.nested_state().value();

  // struct kvm_nested_state: flags, format, size, and the VMCB's address; 128 bytes, then the VMCB (AMD64 Architecture
  // Programmer's Manual vol. 2, appendix B): controls, and from 0x400 on the state of the guest that made this one.
  constexpr std::size_t vmcb = 128;
  NestedState inner{.bytes = std::vector<std::byte>(vmcb + 4096)};
  const auto put = [&](std::size_t at, auto value) { std::memcpy(&inner.bytes[at], &value, sizeof value); };
  put(0, std::uint16_t{KVM_STATE_NESTED_GUEST_MODE | KVM_STATE_NESTED_GIF_SET});
  put(2, std::uint16_t{KVM_STATE_NESTED_FORMAT_SVM});
  put(4, static_cast<std::uint32_t>(inner.bytes.size()));
  put(8, layout::free);
  put(vmcb + 0x10, std::uint32_t{1}); // intercepts VMRUN
  put(vmcb + 0x58, std::uint32_t{1}); // ASID
  constexpr std::size_t save = vmcb + 0x400;
  const auto special = vcpu.special_registers().value();
  put(save + 0x12, std::uint16_t{0x29B}); // CS: present 64-bit code
  put(save + 0x64, std::uint32_t{127});   // GDTR
  put(save + 0x68, other_gdt);
  put(save + 0xD0, special.efer);
  put(save + 0x148, special.cr4);
  put(save + 0x150, special.cr3);
  put(save + 0x158, special.cr0);
  put(save + 0x160, std::uint64_t{0x400});       // DR7
  put(save + 0x168, std::uint64_t{0xFFFF'0FF0}); // DR6
  put(save + 0x170, std::uint64_t{2});           // RFLAGS
  ASSERT_KVM_OK(vcpu.set_nested_state(inner));
  ASSERT_NO_FATAL_FAILURE(run_to_call(vcpu));
  ASSERT_EQ(vcpu.special_registers()->gdt.base, layout::gdt);
  ASSERT_KVM_OK(vcpu.set_nested_state(outer));
  EXPECT_EQ(vcpu.special_registers()->gdt.base, other_gdt);
}

TEST_F(State, LetsAGuestGoOnInAnotherVm) {
  constexpr std::uint64_t value = 0x1234'5678'9ABC'DEF0;
  constexpr std::uint32_t before = 0x20000;
  constexpr std::uint32_t after = 0x20100;
  load(Code{0x48, 0xB8}
           .value(value)                        // mov rax, value
           .raw({0x0F, 0x23, 0xC0})             // mov dr0, rax
           .raw({0x48, 0xA3})                   // mov [before], rax
           .value(std::uint64_t{before})        //
           .raw({0xF3, 0x0F, 0x6F, 0x2C, 0x25}) // movdqu xmm5, [before]
           .value(before)                       //
           .raw({0x31, 0xC0})                   // xor eax, eax
           .out(port)                           //
           .raw({0xF3, 0x0F, 0x7F, 0x2C, 0x25}) // movdqu [after], xmm5
           .value(after)                        //
           .raw({0x0F, 0x21, 0xC0})             // mov rax, dr0
           .out(port));
  std::optional<Vcpu> vcpu(make_vcpu());
  ASSERT_KVM_OK(start_long_mode(*vcpu));
  ASSERT_RUN(IoOut, out, *vcpu);
  vcpu->stop_handle().request_stop();
  ASSERT_RUN(Interrupted, interrupted, *vcpu);

  const auto events = *vcpu->events();
  const auto debug = *vcpu->debug_registers();
  const auto controls = *vcpu->extended_control_registers();
  const auto xsave = *vcpu->xsave();
  const auto apic = *vcpu->local_apic();
  const auto registers = *vcpu->registers();
  const auto special = *vcpu->special_registers();
  const auto mp_state = *vcpu->mp_state();
  vcpu.reset();
  auto created = kvm->create_vm();
  ASSERT_TRUE(created) << created.error().message();
  vm.emplace(std::move(*created));
  ASSERT_KVM_OK(vm->set_tss_address(0xFFFB'D000));
  ASSERT_KVM_OK(vm->create_interrupt_controller());
  ASSERT_KVM_OK(vm->set_memory_slot({.bytes = memory.size(), .host_address = memory.data()}));

  vcpu.emplace(make_vcpu());
  ASSERT_KVM_OK(vcpu->set_special_registers(special));
  ASSERT_KVM_OK(vcpu->set_extended_control_registers(controls));
  ASSERT_KVM_OK(vcpu->set_xsave(xsave));
  ASSERT_KVM_OK(vcpu->set_registers(registers));
  ASSERT_KVM_OK(vcpu->set_local_apic(apic));
  ASSERT_KVM_OK(vcpu->set_debug_registers(debug));
  ASSERT_KVM_OK(vcpu->set_mp_state(mp_state));
  ASSERT_KVM_OK(vcpu->set_events(events));
  ASSERT_RUN(IoOut, shown, *vcpu);
  EXPECT_EQ(memory.read<std::uint64_t>(after), value) << "xmm5";
  EXPECT_EQ(vcpu->registers()->rax, value) << "dr0";
}

} // namespace
} // namespace cppvmm::test
