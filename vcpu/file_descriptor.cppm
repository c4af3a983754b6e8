module;
#include <utility>
export module cppvmm.vcpu:file_descriptor;
import :error;

namespace cppvmm {

/// Owns a file descriptor and closes it. Holds none after a move or a default construction.
export class FileDescriptor {
public:
  FileDescriptor() = default;
  /// Takes `number` over; a negative one means none.
  explicit FileDescriptor(int number) : number_(number < 0 ? -1 : number) {}
  FileDescriptor(FileDescriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();

  /// A descriptor of its own for what `number` refers to (F_DUPFD_CLOEXEC): how to lend one that someone else keeps.
  [[nodiscard]] static KvmResult<FileDescriptor> duplicate(int number);

  /// The number, -1 when there is none.
  [[nodiscard]] int number() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }
  /// Gives the number away without closing it.
  [[nodiscard]] int release() { return std::exchange(number_, -1); }

private:
  int number_ = -1;
};

} // namespace cppvmm
