module;
#include <array>
#include <variant>
module cppvmm.vcpu:exit.impl;
import :exit;

namespace cppvmm {

const char* exit_name(const Exit& exit) {
  static constexpr std::array names = {
      "UnknownExit", "IoIn",          "IoOut",       "MmioRead",
      "MmioWrite",   "Hlt",           "Shutdown",    "SystemEvent",
      "FailEntry",   "InternalError", "ReadMsr",     "WriteMsr",
      "Hypercall",   "HypervEvent",   "Interrupted", "InterruptWindowOpen",
      "Debug",       "IoApicEoi",     "MemoryFault",
  };
  static_assert(names.size() == std::variant_size_v<Exit>);
  return exit.index() < names.size() ? names[exit.index()] : "valueless";
}

} // namespace cppvmm
