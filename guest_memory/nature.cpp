module;
#include <cerrno>
#include <cstdint>
#include <expected>
#include <functional>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
module cppvmm.guest_memory:nature.impl;
import :error;
import :evidence;
import :proc_maps;
import :region;

namespace cppvmm {

MemoryResult<void> check_nature(const void* host, std::uint64_t bytes, AdoptedNature nature, int fd,
                                std::uint64_t fd_offset) {
  if (nature == AdoptedNature::unknown) return {};
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  const auto refuse = [&](MemoryErrc code, const char* operation, int os_error = 0) {
    return std::unexpected(
        MemoryError{.code = code, .address = start, .length = bytes, .os_error = os_error, .operation = operation});
  };

  struct stat file{};
  if (nature == AdoptedNature::shared_memory) {
    struct statfs system{};
    if (fstat(fd, &file) != 0 || fstatfs(fd, &system) != 0)
      return refuse(MemoryErrc::os, "fstat of the adopted file", errno);
    if (system.f_type != TMPFS_MAGIC) return refuse(MemoryErrc::wrong_nature, "adopted file is not in shared memory");
    const auto size = static_cast<std::uint64_t>(file.st_size);
    if (fd_offset > size || bytes > size - fd_offset)
      return refuse(MemoryErrc::wrong_nature, "adopted file ends before the region");
  }

  std::uint64_t checked = start;
  bool fits = true;
  auto walked = for_each_mapping(start, bytes, [&](const ProcMapping& mapping) {
    fits = mapping.start <= checked;
    if (nature == AdoptedNature::private_anonymous) {
      fits = fits && mapping.is_private && mapping.inode == 0;
    } else {
      // File offset and address advance together, so that one comparison modulo 2^64 covers either order of starts.
      fits = fits && !mapping.is_private && mapping.inode == file.st_ino &&
             mapping.device_major == major(file.st_dev) && mapping.device_minor == minor(file.st_dev) &&
             mapping.offset - mapping.start == fd_offset - start;
    }
    checked = mapping.end;
    return fits;
  });
  if (!walked) return std::unexpected(walked.error());
  if (!fits || checked < start + bytes) return refuse(MemoryErrc::wrong_nature, "compare with /proc/self/maps");
  return {};
}

} // namespace cppvmm
