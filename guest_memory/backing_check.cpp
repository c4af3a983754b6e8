module;
#include <cerrno>
#include <cstdint>
#include <expected>
#include <functional>
#include <linux/magic.h>
#include <string>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
module cppvmm.guest_memory:backing_check.impl;
import :error;
import :evidence;
import :proc_maps;
import :region;

namespace cppvmm {

static bool has_file(Backing backing) {
  return backing == Backing::memfd || backing == Backing::hugetlb_memfd || backing == Backing::private_file ||
         backing == Backing::shared_file;
}

/// The file systems whose files are memory, and need the evidence of their own kind.
static bool fits_file_system(Backing backing, long type) {
  switch (backing) {
  case Backing::memfd:
    return type == TMPFS_MAGIC;
  case Backing::hugetlb_memfd:
    return type == HUGETLBFS_MAGIC;
  case Backing::private_file:
    return type != HUGETLBFS_MAGIC;
  default:
    return type != TMPFS_MAGIC && type != HUGETLBFS_MAGIC;
  }
}

static bool fits_without_file(Backing backing, const ProcMapping& mapping) {
  switch (backing) {
  case Backing::anonymous:
    return mapping.is_private && mapping.inode == 0;
  // The names that the kernel gives to the files behind these mappings (mm/shmem.c, mm/hugetlb.c).
  case Backing::shared_anonymous:
    return !mapping.is_private && mapping.path == "/dev/zero (deleted)";
  case Backing::hugetlb:
    return mapping.is_private && mapping.path == "/anon_hugepage (deleted)";
  default:
    return false;
  }
}

/// Pages of a private file that were discarded: anonymous memory took their place.
static bool is_replaced(Backing backing, const ProcMapping& mapping) {
  return backing == Backing::private_file && fits_without_file(Backing::anonymous, mapping);
}

MemoryResult<void> check_backing(const FileMapping& mapped, Backing backing, RegionKind kind) {
  const auto start = reinterpret_cast<std::uintptr_t>(mapped.host);
  const auto refuse = [&](MemoryErrc code, const char* operation, int os_error = 0) {
    return std::unexpected(MemoryError{
        .code = code, .address = start, .length = mapped.bytes, .os_error = os_error, .operation = operation});
  };

  struct stat file{};
  if (has_file(backing)) {
    struct statfs system{};
    if (fstat(mapped.fd, &file) != 0 || fstatfs(mapped.fd, &system) != 0)
      return refuse(MemoryErrc::os, "fstat of the adopted file", errno);
    if (!fits_file_system(backing, system.f_type))
      return refuse(MemoryErrc::wrong_nature, "adopted file is of another kind of file system");
    const auto size = static_cast<std::uint64_t>(file.st_size);
    if (mapped.offset > size || mapped.bytes > size - mapped.offset)
      return refuse(MemoryErrc::wrong_nature, "adopted file ends before the region");
  }

  const bool is_private = backing == Backing::private_file;
  bool fits = true;
  auto walked = for_each_mapping(start, mapped.bytes, [&](const ProcMapping& mapping) {
    fits = mapping.is_readable && (mapping.is_writable || kind == RegionKind::rom);
    if (backing == Backing::unknown) return fits;
    fits = fits && !mapping.is_filled_on_demand;
    if (!has_file(backing))
      fits = fits && fits_without_file(backing, mapping);
    else if (!is_replaced(backing, mapping))
      // File offset and address advance together, so that one comparison modulo 2^64 covers either order of starts.
      fits = fits && mapping.is_private == is_private && mapping.inode == file.st_ino &&
             mapping.device_major == major(file.st_dev) && mapping.device_minor == minor(file.st_dev) &&
             mapping.offset - mapping.start == mapped.offset - start;
    return fits;
  });
  if (!walked) return std::unexpected(walked.error());
  if (!fits) return refuse(MemoryErrc::wrong_nature, "compare with /proc/self/smaps");
  return {};
}

} // namespace cppvmm
