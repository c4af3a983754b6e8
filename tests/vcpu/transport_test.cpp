#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <expected>
#include <gtest/gtest.h>
#include <linux/kvm.h>
#include <string>

import cppvmm.vcpu;

namespace cppvmm::test {
namespace {

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
  capabilities.hyperv_cpuid = true;
  EXPECT_EQ(choose_hypercall_transport(capabilities), HypercallTransport::split);
  capabilities.msr_filter = false;
  const auto no_filter = choose_hypercall_transport(capabilities);
  ASSERT_FALSE(no_filter);
  EXPECT_EQ(no_filter.error().value, static_cast<std::uint64_t>(KVM_CAP_X86_MSR_FILTER));
}

TEST(UserHypercallCode, IsAnOutToThePortAndAReturn) {
  EXPECT_EQ(user_hypercall_code(0x12), (std::array{std::byte{0xE6}, std::byte{0x12}, std::byte{0xC3}}));
  EXPECT_NE(user_hypercall_port, unusable_hypercall_port);
}

// Guests that are restored may be in the middle of it: it stays as it is.
TEST(SplitHypercallCode, IsPartOfSavedStates) {
  std::string text;
  for (const std::byte byte : split_hypercall_code(HypercallInstruction::vmmcall)) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", std::to_integer<unsigned>(byte));
    text += digits;
  }
  EXPECT_EQ(text, "f30f1efa9c50483b0424587517"
                  "6681f90180720b6681f9418077049de6e4c3"
                  "9d0f01d9c3663d018072f5663d418077efebe9");
  const auto intel = split_hypercall_code(HypercallInstruction::vmcall, 0x10);
  EXPECT_EQ(intel[29], std::byte{0x10});
  EXPECT_EQ(intel[34], std::byte{0xC1});
}

TEST(KvmErrors, IsThrownWithItsMessage) {
  const KvmError error{.code = KvmErrc::os, .os_error = 12, .operation = "KVM_RUN"};
  EXPECT_EQ(value_or_throw(std::expected<int, KvmError>(5)), 5);
  value_or_throw(std::expected<void, KvmError>());
  try {
    value_or_throw(std::expected<void, KvmError>(std::unexpected(error)));
    FAIL() << "nothing was thrown";
  } catch (const KvmException& thrown) {
    EXPECT_EQ(thrown.what(), error.message());
    EXPECT_EQ(thrown.error(), error);
  }
}

} // namespace
} // namespace cppvmm::test
