#include <array>
#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <linux/kvm.h>

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
  capabilities.msr_filter = false;
  const auto no_filter = choose_hypercall_transport(capabilities);
  ASSERT_FALSE(no_filter);
  EXPECT_EQ(no_filter.error().value, static_cast<std::uint64_t>(KVM_CAP_X86_MSR_FILTER));
}

TEST(UserHypercallCode, IsAnOutToThePortAndAReturn) {
  EXPECT_EQ(user_hypercall_code(0x12), (std::array{std::byte{0xE6}, std::byte{0x12}, std::byte{0xC3}}));
  EXPECT_NE(user_hypercall_port, unusable_hypercall_port);
}

} // namespace
} // namespace cppvmm::test
