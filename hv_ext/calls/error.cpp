module;
#include <cstdio>
#include <string>
module cppvmm.hv_calls:error.impl;
import :error;

namespace cppvmm {

static const char* text(HvErrc code) {
  switch (code) {
  case HvErrc::invalid_options:
    return "the options contradict each other";
  case HvErrc::invalid_cpuid:
    return "the leaves contradict what the guest is offered";
  case HvErrc::invalid_state:
    return "no state that can be restored";
  case HvErrc::too_late:
    return "the guest has asked already";
  }
  return "unknown error";
}

std::string HvError::message() const {
  std::string line = std::string(operation) + ": " + text(code);
  if (value == 0) return line;
  char number[32];
  std::snprintf(number, sizeof number, " (%#llx)", static_cast<unsigned long long>(value));
  return line + number;
}

} // namespace cppvmm
