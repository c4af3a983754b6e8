module;
#include <cstdio>
#include <string>
#include <system_error>
module cppvmm.vcpu:error.impl;
import :error;

namespace cppvmm {

static const char* text(KvmErrc code) {
  switch (code) {
  case KvmErrc::os:
    return "system call failed";
  case KvmErrc::unsupported:
    return "not supported by this KVM";
  case KvmErrc::invalid_argument:
    return "invalid argument";
  case KvmErrc::bad_state:
    return "the vCPU is not in a state for this";
  }
  return "unknown error";
}

std::string KvmError::message() const {
  char buffer[192];
  std::snprintf(buffer, sizeof buffer, "%s: %s (0x%llx)", operation, text(code),
                static_cast<unsigned long long>(value));
  std::string line = buffer;
  if (os_error != 0) line += ": " + std::generic_category().message(os_error);
  return line;
}

} // namespace cppvmm
