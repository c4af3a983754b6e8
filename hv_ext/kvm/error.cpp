module;
#include <string>
#include <variant>
module cppvmm.hv_ext:error.impl;
import :error;
import cppvmm.guest_memory;
import cppvmm.hv_calls;
import cppvmm.vcpu;

namespace cppvmm {

static const char* text(HypervErrc code) {
  switch (code) {
  case HypervErrc::invalid_options:
    return "the options contradict each other";
  case HypervErrc::unsupported:
    return "not supported by this KVM";
  case HypervErrc::invalid_state:
    return "the state cannot be restored";
  case HypervErrc::memory:
    return "guest memory";
  case HypervErrc::kvm:
    return "KVM";
  }
  return "unknown error";
}

static std::string text_of(std::monostate) { return {}; }
static std::string text_of(const auto& cause) { return ": " + cause.message(); }

std::string HypervError::message() const {
  return std::string(operation) + ": " + text(code) + std::visit([](const auto& each) { return text_of(each); }, cause);
}

} // namespace cppvmm
