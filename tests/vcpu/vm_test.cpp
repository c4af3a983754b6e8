#include <cerrno>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/kvm.h>
#include <utility>
#include <vector>

#include "support/bare_guest.hpp"

namespace cppvmm::test {
namespace {

using VmTest = BareGuestTest;

TEST_F(VmTest, AdoptsADescriptorAndRunsAGuestThroughIt) {
  auto copy = FileDescriptor::duplicate(vm->descriptor());
  ASSERT_KVM_OK(copy);
  auto adopted = Vm::adopt(std::move(*copy), kvm->capabilities());
  ASSERT_KVM_OK(adopted);
  auto vcpu = adopted->create_vcpu(0);
  ASSERT_KVM_OK(vcpu);
  load(Code().hlt());
  ASSERT_KVM_OK(start_real_mode(*vcpu));
  ASSERT_RUN(Hlt, hlt, *vcpu);
}

TEST_F(VmTest, RefusesToAdoptWhatIsNoVm) {
  EXPECT_FALSE(Vm::adopt(FileDescriptor(), kvm->capabilities()));
  EXPECT_FALSE(Vm::adopt(FileDescriptor(open("/dev/null", O_RDWR | O_CLOEXEC)), kvm->capabilities()));
  EXPECT_FALSE(Vm::adopt(FileDescriptor::duplicate(kvm->descriptor()).value(), kvm->capabilities()));
  const Vcpu vcpu = make_vcpu();
  EXPECT_FALSE(Vm::adopt(FileDescriptor::duplicate(vcpu.descriptor()).value(), kvm->capabilities()));
  EXPECT_FALSE(Kvm::adopt(FileDescriptor::duplicate(vm->descriptor()).value()));
}

TEST_F(VmTest, RefusesBadMemorySlotsBeforeKvmIsAsked) {
  HostMemory more(0x4000);
  const MemorySlot good{.slot = 1, .guest_address = 0x4000'0000, .bytes = 0x4000, .host_address = more.data()};
  const auto refused = [&](MemorySlot slot) {
    const auto set = vm->set_memory_slot(slot);
    return !set && set.error().code == KvmErrc::invalid_argument;
  };
  MemorySlot slot = good;
  slot.bytes = 0;
  EXPECT_TRUE(refused(slot));
  slot = good;
  slot.bytes = 0x1800;
  EXPECT_TRUE(refused(slot));
  slot = good;
  slot.guest_address += 8;
  EXPECT_TRUE(refused(slot));
  slot = good;
  slot.guest_address = ~std::uint64_t{0} << 12;
  slot.bytes = 0x2000;
  EXPECT_TRUE(refused(slot));
  slot = good;
  slot.host_address = more.data() + 1;
  EXPECT_TRUE(refused(slot));
  slot = good;
  slot.host_address = nullptr;
  EXPECT_TRUE(refused(slot));
  EXPECT_FALSE(refused(good));
}

TEST_F(VmTest, ReportsThatKvmRefusedAnOverlap) {
  HostMemory more(0x2000);
  const auto set = vm->set_memory_slot(
      {.slot = 1, .guest_address = memory.size() - 0x1000, .bytes = 0x2000, .host_address = more.data()});
  ASSERT_FALSE(set);
  EXPECT_EQ(set.error().code, KvmErrc::os);
  EXPECT_EQ(set.error().os_error, EEXIST);
}

TEST_F(VmTest, ARemovedSlotIsNoMemoryAnyMore) {
  HostMemory more(0x1000);
  more.write<std::uint64_t>(0, 0x1122'3344'5566'7788);
  constexpr std::uint64_t address = 0x0800'0000;
  ASSERT_KVM_OK(
      vm->set_memory_slot({.slot = 1, .guest_address = address, .bytes = 0x1000, .host_address = more.data()}));
  Vcpu vcpu = make_vcpu();
  load(Code().mov_rbx(address).raw({0x48, 0x8B, 0x03}).hlt().loop()); // mov rax, [rbx]
  ASSERT_KVM_OK(start_long_mode(vcpu));
  {
    ASSERT_RUN(Hlt, hlt, vcpu);
    EXPECT_EQ(vcpu.registers()->rax, 0x1122'3344'5566'7788U);
  }
  ASSERT_KVM_OK(vm->remove_memory_slot(1));
  ASSERT_RUN(MmioRead, read, vcpu);
  EXPECT_EQ(read.address, address);
  EXPECT_EQ(read.size, 8U);
}

TEST_F(VmTest, WritesToAReadOnlySlotAreExitsAndChangeNothing) {
  if (!kvm->capabilities().read_only_memory) GTEST_SKIP() << "this KVM has no KVM_CAP_READONLY_MEM";
  HostMemory rom(0x1000);
  rom.write<std::uint64_t>(8, 0xABCD);
  constexpr std::uint64_t address = 0x0800'0000;
  ASSERT_KVM_OK(vm->set_memory_slot(
      {.slot = 1, .guest_address = address, .bytes = 0x1000, .host_address = rom.data(), .read_only = true}));
  Vcpu vcpu = make_vcpu();
  // mov rax, [rbx]; mov [rbx], ecx
  load(Code().mov_rbx(address + 8).mov_ecx(0x77).raw({0x48, 0x8B, 0x03}).raw({0x89, 0x0B}).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  {
    ASSERT_RUN(MmioWrite, write, vcpu);
    EXPECT_EQ(write.address, address + 8);
    ASSERT_EQ(write.data.size(), 4U);
    EXPECT_EQ(write.data[0], std::byte{0x77});
  }
  ASSERT_RUN(Hlt, hlt, vcpu);
  EXPECT_EQ(vcpu.registers()->rax, 0xABCDU);
  EXPECT_EQ(rom.read<std::uint64_t>(8), 0xABCDU);
}

// A slot of 70 pages, which is more than one word of bitmap; the guest writes to pages 3 and 69.
class DirtyLogTest : public VmTest {
protected:
  void SetUp() override {
    VmTest::SetUp();
    if (IsSkipped()) return;
    ASSERT_KVM_OK(vm->set_memory_slot(
        {.slot = 1, .guest_address = address, .bytes = more.size(), .host_address = more.data(), .log_dirty = true}));
  }
  void write_pages() {
    Vcpu vcpu = make_vcpu();
    load(Code()
             .mov_rbx(address + 3 * 4096)
             .raw({0x89, 0x03}) // mov [rbx], eax
             .mov_rbx(address + 69 * 4096)
             .raw({0x89, 0x03})
             .hlt());
    ASSERT_KVM_OK(start_long_mode(vcpu));
    ASSERT_RUN(Hlt, hlt, vcpu);
  }

  static constexpr std::uint64_t address = 0x0800'0000;
  HostMemory more{70 * 4096};
  std::vector<std::uint64_t> bitmap = std::vector<std::uint64_t>(2);
};

TEST_F(DirtyLogTest, NamesThePagesWrittenOnce) {
  write_pages();
  ASSERT_KVM_OK(vm->dirty_log(1, bitmap));
  EXPECT_EQ(bitmap, (std::vector<std::uint64_t>{1U << 3, 1U << (69 - 64)}));
  ASSERT_KVM_OK(vm->dirty_log(1, bitmap));
  EXPECT_EQ(bitmap, (std::vector<std::uint64_t>{0, 0}));
}

TEST_F(DirtyLogTest, RefusesBitmapsThatAreTooSmallAndUnknownSlots) {
  const auto small = vm->dirty_log(1, std::span(bitmap).first(1));
  ASSERT_FALSE(small);
  EXPECT_EQ(small.error().code, KvmErrc::invalid_argument);
  EXPECT_EQ(small.error().value, 2U);
  EXPECT_FALSE(vm->dirty_log(7, bitmap));
  EXPECT_FALSE(vm->clear_dirty_log(1, 0, 70, std::span(bitmap).first(1)));
}

TEST_F(DirtyLogTest, IsClearedByHandWhereThatIsEnabled) {
  if (!kvm->capabilities().manual_dirty_log) GTEST_SKIP() << "this KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
  ASSERT_KVM_OK(vm->enable_manual_dirty_log());
  write_pages();
  ASSERT_KVM_OK(vm->dirty_log(1, bitmap));
  ASSERT_KVM_OK(vm->dirty_log(1, bitmap));
  EXPECT_EQ(bitmap, (std::vector<std::uint64_t>{1U << 3, 1U << (69 - 64)}));
  ASSERT_KVM_OK(vm->clear_dirty_log(1, 0, 64, std::span(bitmap).first(1)));
  ASSERT_KVM_OK(vm->dirty_log(1, bitmap));
  EXPECT_EQ(bitmap, (std::vector<std::uint64_t>{0, 1U << (69 - 64)}));
}

TEST_F(VmTest, HasKvmsInterruptControllerAndTimer) {
  if (!kvm->capabilities().interrupt_controller || !kvm->capabilities().interval_timer)
    GTEST_SKIP() << "this KVM has no KVM_CAP_IRQCHIP or no KVM_CAP_PIT2";
  EXPECT_FALSE(vm->set_interrupt_line(4, true)) << "without an interrupt controller";
  ASSERT_KVM_OK(vm->set_identity_map_address(0xFFFB'C000));
  ASSERT_KVM_OK(vm->create_interrupt_controller());
  ASSERT_KVM_OK(vm->create_interval_timer());
  ASSERT_KVM_OK(vm->set_interrupt_line(4, true));
  ASSERT_KVM_OK(vm->set_interrupt_line(4, false));
  Vcpu second = make_vcpu(1);
  ASSERT_EQ(second.mp_state(), MpState::uninitialized);
  ASSERT_KVM_OK(second.set_mp_state(MpState::runnable));
  EXPECT_EQ(second.mp_state(), MpState::runnable);
}

TEST_F(VmTest, RefusesBadMsrFilters) {
  if (!kvm->capabilities().msr_filter) GTEST_SKIP() << "this KVM has no KVM_CAP_X86_MSR_FILTER";
  const auto refused = [&](std::span<const MsrRange> ranges) {
    const auto set = vm->set_msr_filter(ranges);
    return !set && set.error().code == KvmErrc::invalid_argument;
  };
  EXPECT_TRUE(refused(std::array{MsrRange{.first = 0x4000'0000, .count = 0}}));
  EXPECT_TRUE(refused(std::array{MsrRange{.first = 0x4000'0000, .count = 12289}}));
  EXPECT_TRUE(refused(std::array{MsrRange{.first = 0xFFFF'FFFF, .count = 2}}));
  EXPECT_TRUE(refused(std::array{MsrRange{.first = 0x10, .count = 1, .reads = false, .writes = false}}));
  EXPECT_TRUE(refused(std::vector<MsrRange>(17, MsrRange{.first = 0x10, .count = 1})));
  EXPECT_FALSE(refused(std::vector<MsrRange>(16, MsrRange{.first = 0xFFFF'FFFF, .count = 1})));
  ASSERT_KVM_OK(vm->set_msr_filter({}));
}

TEST_F(VmTest, RefusesMsrReasonsThatKvmDoesNotKnow) {
  const auto enabled = vm->enable_user_space_msrs(1U << 9);
  ASSERT_FALSE(enabled);
  EXPECT_EQ(enabled.error().code, KvmErrc::unsupported);
  EXPECT_EQ(enabled.error().value, 1U << 9);
}

TEST_F(VmTest, RefusesASecondVcpuOfTheSameId) {
  const Vcpu first = make_vcpu(3);
  EXPECT_EQ(first.id(), 3U);
  const auto second = vm->create_vcpu(3);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().os_error, EEXIST);
  EXPECT_EQ(second.error().value, 3U);
}

} // namespace
} // namespace cppvmm::test
