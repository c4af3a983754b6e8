#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/kvm.h>

#include "support/machine_facts.hpp"

#include "support/bare_guest.hpp"

namespace cppvmm::test {
namespace {

using KvmTest = BareGuestTest;

TEST_F(KvmTest, ReportsWhatKvmSays) {
  const Capabilities& capabilities = kvm->capabilities();
  const auto said = [&](std::uint32_t number) { return static_cast<unsigned>(kvm->check_extension(number).value()); };
  EXPECT_EQ(capabilities.memory_slots, said(KVM_CAP_NR_MEMSLOTS));
  EXPECT_GT(capabilities.memory_slots, 0U);
  EXPECT_EQ(capabilities.max_vcpus, said(KVM_CAP_MAX_VCPUS));
  EXPECT_GE(capabilities.max_vcpus, capabilities.recommended_vcpus);
  EXPECT_GE(capabilities.vcpu_mmap_bytes, sizeof(kvm_run));
  EXPECT_TRUE(capabilities.immediate_exit);
  EXPECT_EQ(capabilities.sync_registers, said(KVM_CAP_SYNC_REGS));
  EXPECT_EQ(capabilities.msr_filter, said(KVM_CAP_X86_MSR_FILTER) != 0);
  EXPECT_EQ(capabilities.user_space_msr_reasons != 0, said(KVM_CAP_X86_USER_SPACE_MSR) != 0);
  EXPECT_EQ(capabilities.hyperv, said(KVM_CAP_HYPERV) != 0);
  EXPECT_EQ(said(0xFFFF), 0U);
}

TEST_F(KvmTest, AdoptsAnOpenDescriptor) {
  auto copy = FileDescriptor::duplicate(kvm->descriptor());
  ASSERT_KVM_OK(copy);
  const auto adopted = Kvm::adopt(std::move(*copy));
  ASSERT_KVM_OK(adopted);
  EXPECT_EQ(adopted->capabilities().memory_slots, kvm->capabilities().memory_slots);
  ASSERT_KVM_OK(adopted->create_vm());
}

TEST_F(KvmTest, SupportedCpuidHasLongMode) {
  const auto entries = kvm->supported_cpuid();
  ASSERT_KVM_OK(entries);
  ASSERT_NE(find_cpuid(*entries, 0), nullptr);
  const CpuidEntry* const extended = find_cpuid(*entries, 0x8000'0001);
  ASSERT_NE(extended, nullptr);
  EXPECT_NE(extended->edx & 1U << 29, 0U);
}

TEST_F(KvmTest, ExtendedHypercallsAreForwardedWhereTheHyperVLeavesSaySo) {
  const auto entries = kvm->supported_hv_cpuid();
  if (!kvm->capabilities().hyperv_cpuid) {
    ASSERT_FALSE(entries);
    EXPECT_EQ(entries.error().code, KvmErrc::unsupported);
    EXPECT_FALSE(kvm->capabilities().forwards_extended_hypercalls);
    GTEST_SKIP() << "this KVM has no Hyper-V face (KVM_CAP_HYPERV_CPUID)";
  }
  ASSERT_KVM_OK(entries);
  const CpuidEntry* const features = find_cpuid(*entries, 0x4000'0003);
  ASSERT_NE(features, nullptr);
  EXPECT_EQ(kvm->capabilities().forwards_extended_hypercalls, (features->ebx & 1U << 20) != 0);
  EXPECT_EQ(kvm->capabilities().forwards_extended_hypercalls, machine_facts().kvm_forwards);
}

// What supported_hv_cpuid falls back to on kernels that cannot be asked without a vCPU.
TEST_F(KvmTest, AVcpuGivesTheSameHyperVLeaves) {
  const Vcpu vcpu = make_vcpu();
  const auto of_vcpu = vcpu.supported_hv_cpuid();
  if (!kvm->capabilities().hyperv_cpuid) {
    ASSERT_FALSE(of_vcpu);
    EXPECT_EQ(of_vcpu.error().code, KvmErrc::unsupported);
    GTEST_SKIP() << "this KVM has no Hyper-V face (KVM_CAP_HYPERV_CPUID)";
  }
  ASSERT_KVM_OK(of_vcpu);
  const auto of_system = kvm->supported_hv_cpuid();
  ASSERT_KVM_OK(of_system);
  const CpuidEntry* const left = find_cpuid(*of_vcpu, 0x4000'0003);
  const CpuidEntry* const right = find_cpuid(*of_system, 0x4000'0003);
  ASSERT_NE(left, nullptr);
  ASSERT_NE(right, nullptr);
  EXPECT_EQ(left->ebx, right->ebx);
}

} // namespace
} // namespace cppvmm::test
