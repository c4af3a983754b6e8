#include <cerrno>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/kvm.h>
#include <string>
#include <unistd.h>
#include <utility>

#include "support/bare_guest.hpp"

namespace cppvmm::test {
namespace {

FileDescriptor open_file(const char* path) { return FileDescriptor(open(path, O_RDWR | O_CLOEXEC)); }

TEST(FileDescriptor, ClosesWhatItOwns) {
  int number = -1;
  {
    const FileDescriptor owner = open_file("/dev/null");
    number = owner.number();
    ASSERT_GE(number, 0);
    ASSERT_NE(fcntl(number, F_GETFD), -1);
  }
  EXPECT_EQ(fcntl(number, F_GETFD), -1);
}

TEST(FileDescriptor, MovesItsOwnershipAndLeavesNone) {
  FileDescriptor first = open_file("/dev/null");
  const int number = first.number();
  FileDescriptor second = std::move(first);
  EXPECT_EQ(second.number(), number);
  EXPECT_EQ(first.number(), -1); // NOLINT(bugprone-use-after-move): what it promises
  FileDescriptor third = open_file("/dev/null");
  const int replaced = third.number();
  third = std::move(second);
  EXPECT_EQ(third.number(), number);
  EXPECT_EQ(fcntl(replaced, F_GETFD), -1);
}

TEST(FileDescriptor, ReleaseGivesTheNumberAwayOpen) {
  FileDescriptor owner = open_file("/dev/null");
  const int number = owner.release();
  EXPECT_FALSE(owner);
  EXPECT_NE(fcntl(number, F_GETFD), -1);
  close(number);
}

TEST(FileDescriptor, DuplicatesAreDescriptorsOfTheirOwn) {
  const FileDescriptor owner = open_file("/dev/null");
  auto copy = FileDescriptor::duplicate(owner.number());
  ASSERT_KVM_OK(copy);
  EXPECT_NE(copy->number(), owner.number());
  EXPECT_EQ(fcntl(copy->number(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  const auto none = FileDescriptor::duplicate(-1);
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().os_error, EBADF);
}

TEST(Kvm, AMissingDeviceIsAnErrorWithItsErrno) {
  const auto kvm = Kvm::open("/dev/no-such-device");
  ASSERT_FALSE(kvm);
  EXPECT_EQ(kvm.error().code, KvmErrc::os);
  EXPECT_EQ(kvm.error().os_error, ENOENT);
  EXPECT_NE(kvm.error().message().find("No such file"), std::string::npos) << kvm.error().message();
}

TEST(Kvm, AnotherDeviceIsRefused) {
  const auto opened = Kvm::open("/dev/null");
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, KvmErrc::os);
  EXPECT_EQ(opened.error().os_error, ENOTTY);
  EXPECT_STREQ(opened.error().operation, "KVM_GET_API_VERSION");
}

TEST(Kvm, ADescriptorOfNothingIsRefused) {
  const auto adopted = Kvm::adopt(FileDescriptor());
  ASSERT_FALSE(adopted);
  EXPECT_EQ(adopted.error().os_error, EBADF);
}

TEST(CpuidEntries, AreFoundByLeafAndBySubleafWhereItCounts) {
  const std::vector<CpuidEntry> entries = {{.function = 1, .eax = 10},
                                           {.function = 4, .index = 0, .index_significant = true, .eax = 40},
                                           {.function = 4, .index = 1, .index_significant = true, .eax = 41}};
  EXPECT_EQ(find_cpuid(entries, 1), &entries[0]);
  EXPECT_EQ(find_cpuid(entries, 1, 7), &entries[0]);
  EXPECT_EQ(find_cpuid(entries, 4, 1), &entries[2]);
  EXPECT_EQ(find_cpuid(entries, 4, 2), nullptr);
  EXPECT_EQ(find_cpuid(entries, 2), nullptr);
}

TEST(CpuidEntries, AreReplacedOrAdded) {
  std::vector<CpuidEntry> entries = {{.function = 1, .eax = 10},
                                     {.function = 4, .index = 1, .index_significant = true, .eax = 41}};
  set_cpuid_entry(entries, {.function = 1, .eax = 11});
  set_cpuid_entry(entries, {.function = 4, .index = 1, .index_significant = true, .eax = 42});
  ASSERT_EQ(entries.size(), 2U);
  EXPECT_EQ(entries[0].eax, 11U);
  EXPECT_EQ(entries[1].eax, 42U);
  set_cpuid_entry(entries, {.function = 4, .index = 2, .index_significant = true, .eax = 43});
  set_cpuid_entry(entries, {.function = 0x4000'0000});
  EXPECT_EQ(entries.size(), 4U);
}

TEST(HypercallTransport, IsTheKernelsWhereItForwardsExtendedHypercalls) {
  Capabilities capabilities;
  capabilities.forwards_extended_hypercalls = true;
  EXPECT_EQ(choose_hypercall_transport(capabilities), HypercallTransport::kernel);
  capabilities.msr_filter = true;
  capabilities.user_space_msr_reasons = msr_reason_filter;
  EXPECT_EQ(choose_hypercall_transport(capabilities), HypercallTransport::kernel);
}

TEST(HypercallTransport, IsTheUsersElseAndNeedsTheMsrFilter) {
  Capabilities capabilities;
  ASSERT_FALSE(choose_hypercall_transport(capabilities));
  capabilities.msr_filter = true;
  const auto no_exits = choose_hypercall_transport(capabilities);
  ASSERT_FALSE(no_exits);
  EXPECT_EQ(no_exits.error().code, KvmErrc::unsupported);
  EXPECT_EQ(no_exits.error().value, static_cast<std::uint64_t>(KVM_CAP_X86_USER_SPACE_MSR));
  capabilities.user_space_msr_reasons = msr_reason_filter;
  EXPECT_EQ(choose_hypercall_transport(capabilities), HypercallTransport::user);
  capabilities.msr_filter = false;
  const auto no_filter = choose_hypercall_transport(capabilities);
  ASSERT_FALSE(no_filter);
  EXPECT_EQ(no_filter.error().value, static_cast<std::uint64_t>(KVM_CAP_X86_MSR_FILTER));
}

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
