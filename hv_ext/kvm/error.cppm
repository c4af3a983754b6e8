module;
#include <cstdint>
#include <expected>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
export module cppvmm.hv_ext:error;
import cppvmm.guest_memory;
import cppvmm.hv_calls;
import cppvmm.vcpu;

namespace cppvmm {

/// What went wrong while a VM's Hyper-V interface was set up or an exit was answered. A guest's mistakes are no errors:
/// they are statuses and exceptions that the guest sees.
export enum class HypervErrc : std::uint8_t {
  invalid_options, ///< The options contradict each other, or the VM; `cause` is an HvError, if there is one.
  unsupported,     ///< This KVM lacks what the transport needs.
  invalid_state,   ///< A saved state that cannot be restored; `cause` is an HvError.
  memory,          ///< `cause` is a MemoryError.
  kvm,             ///< `cause` is a KvmError.
};

/// An error of this module, with its data.
export struct HypervError {
  HypervErrc code{};
  const char* operation = ""; ///< What was being done; a string literal.
  std::variant<std::monostate, HvError, MemoryError, KvmError> cause{};

  /// One line for a person.
  [[nodiscard]] std::string message() const;

  friend bool operator==(const HypervError&, const HypervError&) = default;
};

export template <class T>
using HypervResult = std::expected<T, HypervError>;

/// A HypervError that is thrown: what() is its message.
export class HypervException : public std::runtime_error {
public:
  explicit HypervException(const HypervError& error) : std::runtime_error(error.message()), error_(error) {}
  [[nodiscard]] const HypervError& error() const noexcept { return error_; }

private:
  HypervError error_;
};

/// The value; throws a HypervException where there is none. For programs that end at the first error: what
/// std::expected::value throws has no message.
export template <class T>
T value_or_throw(HypervResult<T> result) {
  if (!result) throw HypervException(result.error());
  return std::move(result).value();
}

} // namespace cppvmm
