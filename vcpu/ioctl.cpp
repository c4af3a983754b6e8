module;
#include <cerrno>
#include <cstdint>
#include <expected>
#include <sys/ioctl.h>
module cppvmm.vcpu:ioctl;
import :error;

namespace cppvmm {

std::unexpected<KvmError> failed(KvmErrc code, const char* operation, std::uint64_t value = 0) {
  return std::unexpected(KvmError{.code = code, .os_error = 0, .operation = operation, .value = value});
}

// From errno.
std::unexpected<KvmError> os_failed(const char* operation, std::uint64_t value = 0) {
  return std::unexpected(KvmError{.code = KvmErrc::os, .os_error = errno, .operation = operation, .value = value});
}

// An ioctl other than KVM_RUN: begun again when a signal interrupts it (KVM_CREATE_VM and slot changes can be).
KvmResult<int> kvm_ioctl(int descriptor, unsigned long request, std::uintptr_t argument, const char* operation,
                         std::uint64_t value = 0) {
  int result = 0;
  do
    result = ioctl(descriptor, request, argument);
  while (result < 0 && errno == EINTR);
  if (result < 0) return os_failed(operation, value);
  return result;
}

KvmResult<int> kvm_ioctl(int descriptor, unsigned long request, const void* argument, const char* operation,
                         std::uint64_t value = 0) {
  return kvm_ioctl(descriptor, request, reinterpret_cast<std::uintptr_t>(argument), operation, value);
}

// The same where success says nothing more.
KvmResult<void> kvm_set(int descriptor, unsigned long request, const void* argument, const char* operation,
                        std::uint64_t value = 0) {
  const auto result = kvm_ioctl(descriptor, request, argument, operation, value);
  if (!result) return std::unexpected(result.error());
  return {};
}

} // namespace cppvmm
