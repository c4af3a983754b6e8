#include <gtest/gtest.h>

#include <expected>

import cppvmm.hv_ext;
import cppvmm.vcpu;

using namespace cppvmm;

namespace {

TEST(HypervErrors, IsThrownWithItsMessage) {
  const HypervError error{.code = HypervErrc::kvm,
                          .operation = "set",
                          .cause = KvmError{.code = KvmErrc::os, .os_error = 22, .operation = "KVM_SET_MSRS"}};
  EXPECT_EQ(value_or_throw(std::expected<int, HypervError>(5)), 5);
  value_or_throw(std::expected<void, HypervError>());
  try {
    value_or_throw(std::expected<void, HypervError>(std::unexpected(error)));
    FAIL() << "nothing was thrown";
  } catch (const HypervException& thrown) {
    EXPECT_EQ(thrown.what(), error.message());
    EXPECT_EQ(thrown.error(), error);
  }
}

} // namespace
