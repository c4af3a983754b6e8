module;
#include <cstdint>
#include <expected>
#include <stdexcept>
#include <string>
#include <utility>
export module cppvmm.vcpu:error;

namespace cppvmm {

/// What went wrong between this process and KVM.
export enum class KvmErrc : std::uint8_t {
  os,               ///< A system call or ioctl failed; `os_error` says how.
  unsupported,      ///< This kernel's KVM lacks what was asked for.
  invalid_argument, ///< Refused before KVM was asked.
  bad_state,        ///< The call does not fit what the vCPU waits for.
};

/// An error of this module, with its data.
export struct KvmError {
  KvmErrc code{};
  int os_error = 0;           ///< errno of the failed call, else 0.
  const char* operation = ""; ///< The ioctl or check that failed; a string literal.
  std::uint64_t value = 0;    ///< What it was about: a capability, an API version, an address, an MSR.

  /// One line for a person.
  [[nodiscard]] std::string message() const;

  friend bool operator==(const KvmError&, const KvmError&) = default;
};

export template <class T>
using KvmResult = std::expected<T, KvmError>;

/// A KvmError that is thrown: what() is its message.
export class KvmException : public std::runtime_error {
public:
  explicit KvmException(const KvmError& error) : std::runtime_error(error.message()), error_(error) {}
  [[nodiscard]] const KvmError& error() const noexcept { return error_; }

private:
  KvmError error_;
};

/// The value; throws a KvmException where there is none. For programs that end at the first error: what
/// std::expected::value throws has no message.
export template <class T>
T value_or_throw(KvmResult<T> result) {
  if (!result) throw KvmException(result.error());
  return std::move(result).value();
}

} // namespace cppvmm
