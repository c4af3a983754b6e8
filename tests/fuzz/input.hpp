// What libFuzzer gives, taken apart, and how a fuzzer says what is wrong.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <span>

namespace cppvmm::fuzz {

/// Ends the program, which libFuzzer takes for a find, unless that holds.
inline void require(bool holds, const char* what, std::source_location where = std::source_location::current()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%u: does not hold: %s\n", where.file_name(), static_cast<unsigned>(where.line()), what);
  std::abort();
}

/// Bytes that are taken from the front; behind their end, all is zero.
class Input {
public:
  explicit Input(std::span<const std::byte> bytes) : bytes_(bytes) {}

  [[nodiscard]] bool is_at_end() const { return bytes_.empty(); }
  /// At most `count`.
  [[nodiscard]] std::span<const std::byte> bytes(std::size_t count) {
    const auto taken = bytes_.first(std::min(count, bytes_.size()));
    bytes_ = bytes_.subspan(taken.size());
    return taken;
  }
  template <class T>
  [[nodiscard]] T take() {
    T value = 0;
    const auto taken = bytes(sizeof value);
    std::ranges::copy(taken, std::as_writable_bytes(std::span(&value, 1)).begin());
    return value;
  }
  [[nodiscard]] std::uint8_t byte() { return take<std::uint8_t>(); }
  [[nodiscard]] bool flag() { return (byte() & 1) != 0; }
  [[nodiscard]] std::uint64_t below(std::uint64_t count) { return take<std::uint16_t>() % count; }

private:
  std::span<const std::byte> bytes_;
};

} // namespace cppvmm::fuzz
