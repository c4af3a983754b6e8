module;
#include <cstdint>
#include <fcntl.h>
#include <unistd.h>
#include <utility>
module cppvmm.vcpu:file_descriptor.impl;
import :error;
import :file_descriptor;
import :ioctl;

namespace cppvmm {

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    if (number_ >= 0) close(number_);
    number_ = std::exchange(other.number_, -1);
  }
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (number_ >= 0) close(number_);
}

KvmResult<FileDescriptor> FileDescriptor::duplicate(int number) {
  const int copy = fcntl(number, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) return os_failed("F_DUPFD_CLOEXEC", static_cast<std::uint64_t>(number));
  return FileDescriptor(copy);
}

} // namespace cppvmm
