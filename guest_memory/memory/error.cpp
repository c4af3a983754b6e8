module;
#include <cstdio>
#include <cstring>
#include <string>
#include <system_error>
module cppvmm.guest_memory:error.impl;
import :error;

namespace cppvmm {

static const char* text(MemoryErrc code) {
  switch (code) {
  case MemoryErrc::invalid_argument:
    return "invalid argument";
  case MemoryErrc::out_of_range:
    return "outside the guest-physical address space";
  case MemoryErrc::overlap:
    return "overlaps another region";
  case MemoryErrc::not_backed:
    return "no memory at this address";
  case MemoryErrc::read_only:
    return "read-only for the guest";
  case MemoryErrc::unavailable:
    return "not available on this host";
  case MemoryErrc::wrong_nature:
    return "the memory is not of the stated kind";
  case MemoryErrc::os:
    return "system call failed";
  case MemoryErrc::inaccessible:
    return "the host has no memory to give here";
  case MemoryErrc::stopped:
    return "stopped before it was done";
  }
  return "unknown error";
}

std::string MemoryError::message() const {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, "%s: %s (address 0x%llx, length 0x%llx, completed 0x%llx)", operation,
                text(code), static_cast<unsigned long long>(address), static_cast<unsigned long long>(length),
                static_cast<unsigned long long>(completed));
  std::string line = buffer;
  if (os_error != 0) line += ": " + std::generic_category().message(os_error);
  return line;
}

} // namespace cppvmm
