// A file descriptor that is closed.
#pragma once

#include <unistd.h>
#include <utility>

namespace cppvmm::test {

/// Owns a file descriptor; -1: none.
class Descriptor {
public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    Descriptor old(std::exchange(number_, other.release()));
    return *this;
  }
  ~Descriptor() {
    if (number_ >= 0) close(number_);
  }

  [[nodiscard]] bool is_open() const { return number_ >= 0; }
  [[nodiscard]] int number() const { return number_; }
  /// The number, which the caller has to close.
  [[nodiscard]] int release() { return std::exchange(number_, -1); }

private:
  int number_;
};

} // namespace cppvmm::test
