#include <algorithm>
#include <cstdint>
#include <gtest/gtest.h>
#include <optional>
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
