// Another process, which is handed descriptors and writes on command.
#pragma once

#include <cstdint>
#include <expected>
#include <string>
#include <sys/types.h>
#include <utility>

namespace cppvmm::oracle {

/// A child that was forked before any guest memory existed, so that nothing of it is inherited; it dies with this
/// process.
class Helper {
public:
  [[nodiscard]] static std::expected<Helper, std::string> start();
  Helper(Helper&& other) noexcept : pid_(std::exchange(other.pid_, -1)), socket_(std::exchange(other.socket_, -1)) {}
  Helper& operator=(Helper&&) = delete;
  ~Helper();

  /// Each writes `value` at `at` bytes into each of `count` pages of 4 KiB; the result is 0 or an errno.
  ///
  /// Through a mapping of its own of the file from `offset` on.
  [[nodiscard]] int store(int fd, std::uint64_t offset, std::uint32_t count, std::uint32_t at, std::uint8_t value);
  /// With pwrite(2).
  [[nodiscard]] int write(int fd, std::uint64_t offset, std::uint32_t count, std::uint32_t at, std::uint8_t value);
  /// Into this process's memory, with process_vm_writev(2).
  [[nodiscard]] int write_process(void* host, std::uint32_t count, std::uint32_t at, std::uint8_t value);

private:
  struct Command;
  Helper(pid_t pid, int socket) : pid_(pid), socket_(socket) {}
  [[nodiscard]] int send(const Command& command, int fd);
  [[noreturn]] static void serve(int socket, pid_t parent);
  static int carry_out(const Command& command, int fd, pid_t parent);

  pid_t pid_;
  int socket_;
};

} // namespace cppvmm::oracle
