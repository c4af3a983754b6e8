#include <cerrno>
#include <fcntl.h>
#include <gtest/gtest.h>
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

} // namespace
} // namespace cppvmm::test
