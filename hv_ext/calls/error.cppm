module;
#include <cstdint>
#include <expected>
#include <stdexcept>
#include <string>
#include <utility>
export module cppvmm.hv_calls:error;

namespace cppvmm {

/// What went wrong while the Hyper-V interface was set up or restored. A guest's mistakes are no errors: they are
/// statuses and exceptions that the guest sees.
export enum class HvErrc : std::uint8_t {
  invalid_options, ///< The options contradict each other.
  invalid_cpuid,   ///< CPUID leaves that contradict what the guest is to be offered.
  invalid_state,   ///< A saved state that none can have, or not in this memory.
  too_late,        ///< The guest has asked what it is offered, and goes by the answer.
};

/// An error of this module, with its data.
export struct HvError {
  HvErrc code{};
  const char* operation = ""; ///< What was being done, or what is wrong; a string literal.
  std::uint64_t value = 0;    ///< The number that it is about: a call code, for example; 0 if there is none.

  /// One line for a person.
  [[nodiscard]] std::string message() const;

  friend bool operator==(const HvError&, const HvError&) = default;
};

export template <class T>
using HvResult = std::expected<T, HvError>;

/// A HvError that is thrown: what() is its message.
export class HvException : public std::runtime_error {
public:
  explicit HvException(const HvError& error) : std::runtime_error(error.message()), error_(error) {}
  [[nodiscard]] const HvError& error() const noexcept { return error_; }

private:
  HvError error_;
};

/// The value; throws a HvException where there is none. For programs that end at the first error: what
/// std::expected::value throws has no message.
export template <class T>
T value_or_throw(HvResult<T> result) {
  if (!result) throw HvException(result.error());
  return std::move(result).value();
}

} // namespace cppvmm
