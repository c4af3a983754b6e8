module;
#include <unistd.h>
#include <utility>
module cppvmm.guest_memory:descriptor;

namespace cppvmm {

/// Owns a file descriptor and closes it, whatever is thrown meanwhile. Holds none after a move or by default.
class Descriptor {
public:
  Descriptor() = default;
  /// Takes `number` over; a negative one means none. errno stays as it is.
  explicit Descriptor(int number) : number_(number < 0 ? -1 : number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    const Descriptor old(std::exchange(number_, std::exchange(other.number_, -1)));
    return *this;
  }
  ~Descriptor() {
    if (number_ >= 0) close(number_);
  }

  [[nodiscard]] bool is_open() const { return number_ >= 0; }
  /// The number, -1 when there is none.
  [[nodiscard]] int number() const { return number_; }
  /// The number, which nobody closes from now on.
  [[nodiscard]] int release() { return std::exchange(number_, -1); }

private:
  int number_ = -1;
};

} // namespace cppvmm
