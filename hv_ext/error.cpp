module;
#include <string>
#include <variant>
module cppvmm.hv_ext:error.impl;
import :error;
import cppvmm.guest_memory;
import cppvmm.vcpu;

namespace cppvmm {

static const char* text(HvErrc code) {
  switch (code) {
  case HvErrc::invalid_options:
    return "the options contradict each other";
  case HvErrc::unsupported:
    return "not supported by this KVM";
  case HvErrc::memory:
    return "guest memory";
  case HvErrc::kvm:
    return "KVM";
  }
  return "unknown error";
}

std::string HvError::message() const {
  std::string line = std::string(operation) + ": " + text(code);
  if (const auto* memory_error = std::get_if<MemoryError>(&cause)) line += ": " + memory_error->message();
  if (const auto* kvm_error = std::get_if<KvmError>(&cause)) line += ": " + kvm_error->message();
  return line;
}

} // namespace cppvmm
