module;
#include <cstdint>
#include <expected>
#include <stdexcept>
#include <string>
#include <utility>
export module cppvmm.guest_memory:error;

namespace cppvmm {

/// What went wrong with guest memory.
export enum class MemoryErrc : std::uint8_t {
  invalid_argument, ///< A size of zero, a misaligned address, a fact that cannot be true.
  out_of_range,     ///< An address or a sum of address and size leaves the 52-bit guest-physical space.
  overlap,          ///< A region overlaps one that the map already has.
  not_backed,       ///< No region of the map holds the address.
  read_only,        ///< A guest-side write to ROM.
  unavailable,      ///< The host has none of what was asked for (huge pages, a descriptor to seek in).
  wrong_nature,     ///< Adopted memory is not of the kind that the embedder stated.
  os,               ///< A system call failed; `os_error` says how.
  inaccessible, ///< The host has no memory to give at the address; `os_error`: EFAULT, or EHWPOISON for lost memory.
  stopped,      ///< A survey ended early: it was asked to, its time was over, or the map was replaced all the time.
};

/// An error of this module, with its data.
export struct MemoryError {
  MemoryErrc code{};
  std::uint64_t address = 0;   ///< Where: guest-physical for accesses and maps, host-virtual for adopted memory.
  std::uint64_t length = 0;    ///< How many bytes were asked for.
  std::uint64_t completed = 0; ///< How many bytes were transferred before the error.
  int os_error = 0;            ///< errno of the failed call, else 0.
  const char* operation = "";  ///< The call or check that failed; a string literal.

  /// One line for a person.
  [[nodiscard]] std::string message() const;

  friend bool operator==(const MemoryError&, const MemoryError&) = default;
};

export template <class T>
using MemoryResult = std::expected<T, MemoryError>;

/// A MemoryError that is thrown: what() is its message.
export class MemoryException : public std::runtime_error {
public:
  explicit MemoryException(const MemoryError& error) : std::runtime_error(error.message()), error_(error) {}
  [[nodiscard]] const MemoryError& error() const noexcept { return error_; }

private:
  MemoryError error_;
};

/// The value; throws a MemoryException where there is none. For programs that end at the first error: what
/// std::expected::value throws has no message.
export template <class T>
T value_or_throw(MemoryResult<T> result) {
  if (!result) throw MemoryException(result.error());
  return std::move(result).value();
}

} // namespace cppvmm
