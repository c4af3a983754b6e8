// A disk's file system for tests, on a compressed disk in memory (zram).
#pragma once

#include "descriptor.hpp"

#include <expected>
#include <string>
#include <utility>

namespace cppvmm::test {

/// An ext4 of 64 MiB, which is made here and taken away again. Needs root, zram, and a mke2fs, which may be busybox's.
class Disk {
public:
  /// One line for a person where there is none.
  [[nodiscard]] static std::expected<Disk, std::string> make();
  Disk(Disk&& other) noexcept : device_(std::exchange(other.device_, -1)), folder_(std::exchange(other.folder_, {})) {}
  Disk& operator=(Disk&&) = delete;
  /// All files are closed by now: what is in use is not taken away.
  ~Disk();

  /// An empty file without a name. It is mounted where no other process, and nothing else of this one, sees it.
  [[nodiscard]] std::expected<Descriptor, std::string> file() const;

private:
  Disk() = default;
  long device_ = -1;   ///< The number of the zram device.
  std::string folder_; ///< Holds its device node, and what it is mounted on.
};

} // namespace cppvmm::test
