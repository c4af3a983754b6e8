module;
#include <cstdint>
#include <expected>
#include <string>
#include <variant>
export module cppvmm.hv_ext:error;
import cppvmm.guest_memory;
import cppvmm.vcpu;

namespace cppvmm {

/// What went wrong while the Hyper-V interface was set up or an exit was answered. A guest's mistakes are no errors:
/// they are statuses and exceptions that the guest sees.
export enum class HvErrc : std::uint8_t {
  invalid_options, ///< The options contradict each other.
  unsupported,     ///< This KVM lacks what the transport needs.
  memory,          ///< `cause` is a MemoryError.
  kvm,             ///< `cause` is a KvmError.
};

/// An error of this module, with its data.
export struct HvError {
  HvErrc code{};
  const char* operation = ""; ///< What was being done; a string literal.
  std::variant<std::monostate, MemoryError, KvmError> cause{};

  /// One line for a person.
  [[nodiscard]] std::string message() const;

  friend bool operator==(const HvError&, const HvError&) = default;
};

export template <class T>
using HvResult = std::expected<T, HvError>;

} // namespace cppvmm
