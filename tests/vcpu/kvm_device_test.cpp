#include <cerrno>
#include <gtest/gtest.h>
#include <string>

import cppvmm.vcpu;

namespace cppvmm::test {
namespace {

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

} // namespace
} // namespace cppvmm::test
