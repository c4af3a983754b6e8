#include <cstdarg>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "support/bare_guest.hpp"

namespace {
thread_local unsigned ioctls = 0;
} // namespace

// In the place of the C library's: counts, and does the same.
extern "C" int ioctl(int descriptor, unsigned long request, ...) noexcept {
  va_list arguments;
  va_start(arguments, request);
  void* const argument = va_arg(arguments, void*);
  va_end(arguments);
  ++ioctls;
  return static_cast<int>(syscall(SYS_ioctl, descriptor, request, argument));
}

namespace cppvmm::test {
namespace {

using IoctlCountTest = BareGuestTest;

TEST_F(IoctlCountTest, AHypercallCostsNoIoctlButKvmRun) {
  if ((~kvm->capabilities().sync_registers & (sync_general_registers | sync_special_registers)) != 0)
    GTEST_SKIP() << "this KVM has no KVM_CAP_SYNC_REGS";
  Vcpu vcpu = make_vcpu();
  ASSERT_KVM_OK(vcpu.use_user_hypercalls());
  load(Code().out(user_hypercall_port).out(user_hypercall_port).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(Hypercall, first, vcpu);
  const unsigned before = ioctls;
  ASSERT_GT(before, 0U) << "nothing is counted";
  ASSERT_KVM_OK(vcpu.complete_hypercall(5));
  ASSERT_RUN(Hypercall, second, vcpu);
  ASSERT_EQ(vcpu.registers()->rax, 5U);
  EXPECT_EQ(ioctls - before, 1U);
}

TEST_F(IoctlCountTest, RegistersAreStoredForThoseWhoLookAtThem) {
  if ((kvm->capabilities().sync_registers & sync_general_registers) == 0)
    GTEST_SKIP() << "this KVM has no KVM_CAP_SYNC_REGS";
  Vcpu vcpu = make_vcpu();
  load(Code().mov_eax(1).out(0x10).mov_eax(2).out(0x10).mov_eax(3).out(0x10).mov_eax(4).out(0x10));
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(IoOut, first, vcpu);
  ASSERT_EQ(vcpu.registers()->rax, 1U);
  ASSERT_RUN(IoOut, second, vcpu);
  unsigned before = ioctls;
  ASSERT_EQ(vcpu.registers()->rax, 2U);
  EXPECT_EQ(ioctls, before) << "after a look at the exit before";
  ASSERT_RUN(IoOut, third, vcpu);
  // Nobody looks.
  ASSERT_RUN(IoOut, fourth, vcpu);
  before = ioctls;
  ASSERT_EQ(vcpu.registers()->rax, 4U);
  EXPECT_EQ(ioctls - before, 1U);
}

} // namespace
} // namespace cppvmm::test
