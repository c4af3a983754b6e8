module;
#include <cerrno>
#include <cstdint>
#include <expected>
#include <functional>
#include <linux/magic.h>
#include <optional>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
module cppvmm.guest_memory:backing_check.impl;
import :address;
import :backing;
import :error;
import :evidence;
import :file_data;
import :page_evidence;
import :proc_maps;
import :unmap;

namespace cppvmm {

/// Where the files of guest_memfds are: from Linux 6.19 on among themselves, before it with all that has no file system
/// (virt/kvm/guest_memfd.c), where their name tells them from the others.
static bool is_of_guest_memfds(long type) {
  constexpr long guest_memfd_magic = 0x474d454d; // include/uapi/linux/magic.h, which older headers lack it in
  return type == ANON_INODE_FS_MAGIC || type == guest_memfd_magic;
}

/// The file systems whose files are memory, and need the evidence of their own kind. A block device is none of them,
/// wherever its node is.
static bool fits_file_system(Backing backing, long type, bool is_device) {
  if (is_device) return backing == Backing::private_file || backing == Backing::shared_file;
  switch (backing) {
  case Backing::memfd:
    return type == TMPFS_MAGIC;
  case Backing::hugetlb_memfd:
  case Backing::hugetlb_private_file:
    return type == HUGETLBFS_MAGIC;
  case Backing::private_file:
    return type != HUGETLBFS_MAGIC && !is_of_guest_memfds(type);
  case Backing::guest_memfd:
    return is_of_guest_memfds(type);
  default:
    return type != TMPFS_MAGIC && type != HUGETLBFS_MAGIC && !is_of_guest_memfds(type);
  }
}

static bool fits_without_file(Backing backing, const ProcMapping& mapping) {
  switch (backing) {
  case Backing::anonymous:
    return mapping.is_private && mapping.inode == 0;
  case Backing::shared_anonymous:
    return mapping.is_shared_anonymous();
  // The name that the kernel gives to the file behind it (mm/hugetlb.c).
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

/// What a mapping is of, by /proc/self/smaps.
struct ListedFile {
  unsigned device_major = 0;
  unsigned device_minor = 0;
  std::uint64_t inode = 0;
  std::string path;
  friend bool operator==(const ListedFile&, const ListedFile&) = default;
};

static ListedFile file_of(const ProcMapping& mapping) {
  return {mapping.device_major, mapping.device_minor, mapping.inode, mapping.path};
}

/// A page of a file, which nobody may access.
class MappedPage {
public:
  explicit MappedPage(int fd) : at_(mmap(nullptr, page_size, PROT_NONE, MAP_PRIVATE, fd, 0)) {}
  MappedPage(const MappedPage&) = delete;
  MappedPage& operator=(const MappedPage&) = delete;
  ~MappedPage() {
    if (is_mapped()) unmap(at_, page_size);
  }
  [[nodiscard]] bool is_mapped() const { return at_ != MAP_FAILED; }
  [[nodiscard]] std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(at_); }

private:
  void* at_;
};

/// How mappings of this file are listed, by making one: of some file systems it is not what fstat(2) says (btrfs has
/// numbers of its own for each subvolume, overlayfs those of its layers). Files of two subvolumes may have the same
/// numbers there, and are told apart by their paths.
static std::optional<ListedFile> listed_file(int fd) {
  const MappedPage page(fd);
  if (!page.is_mapped()) return std::nullopt;
  std::optional<ListedFile> file;
  const auto walked = for_each_mapping(page.address(), page_size, [&](const ProcMapping& mapping) {
    file = file_of(mapping);
    return true;
  });
  return walked ? file : std::nullopt;
}

MemoryResult<void> check_backing(const FileMapping& mapped, Backing backing, RegionKind kind, SeenPages* seen) {
  const auto start = reinterpret_cast<std::uintptr_t>(mapped.host);
  const auto refuse = [&](MemoryErrc code, const char* operation, int os_error = 0) {
    return std::unexpected(MemoryError{
        .code = code, .address = start, .length = mapped.bytes, .os_error = os_error, .operation = operation});
  };

  struct stat file{};
  const BackingTraits traits = traits_of(backing);
  if (traits.has_file) {
    struct statfs system{};
    if (fstat(mapped.fd, &file) != 0 || fstatfs(mapped.fd, &system) != 0)
      return refuse(MemoryErrc::os, "fstat of the adopted file", errno);
    if (!fits_file_system(backing, system.f_type, S_ISBLK(file.st_mode)))
      return refuse(MemoryErrc::wrong_nature, "adopted file is of another kind of file system");
    const auto size = file_bytes(mapped.fd);
    if (!size) return refuse(MemoryErrc::os, "size of the adopted file", size.error());
    if (mapped.offset > *size || mapped.bytes > *size - mapped.offset)
      return refuse(MemoryErrc::wrong_nature, "adopted file ends before the region");
  }

  std::optional<ListedFile> listed;
  const auto is_of_file = [&](const ProcMapping& mapping) {
    if (backing == Backing::guest_memfd && mapping.path.find("[kvm-gmem]") == std::string::npos) return false;
    if (listed) return mapping.inode != 0 && file_of(mapping) == *listed;
    return mapping.inode == file.st_ino && mapping.device_major == major(file.st_dev) &&
           mapping.device_minor == minor(file.st_dev);
  };
  bool fits = true;
  const auto look = [&](const ProcMapping& mapping) {
    if (seen != nullptr) {
      seen->has_huge = seen->has_huge || mapping.has_huge_pages;
      seen->may_get_huge = seen->may_get_huge || mapping.may_get_huge_pages;
      seen->has_given_up = seen->has_given_up || mapping.has_given_up_pages;
    }
    fits = mapping.is_readable && (mapping.is_writable || kind == RegionKind::rom);
    if (backing == Backing::unknown) return fits;
    fits = fits && !mapping.is_filled_on_demand;
    if (!traits.has_file)
      fits = fits && fits_without_file(backing, mapping);
    else if (!is_replaced(backing, mapping))
      // File offset and address advance together, so that one comparison modulo 2^64 covers either order of starts.
      fits = fits && mapping.is_private == traits.is_private && is_of_file(mapping) &&
             mapping.offset - mapping.start == mapped.offset - start;
    return fits;
  };
  auto walked = for_each_mapping(start, mapped.bytes, look);
  // On Linux 6.1, one line in some 700 of a file on overlayfs had another path than all others.
  constexpr int most_listings = 4;
  for (int i = 0; i < most_listings && traits.is_on_disk && walked && !fits; ++i) {
    listed = listed_file(mapped.fd);
    if (!listed) break;
    walked = for_each_mapping(start, mapped.bytes, look);
  }
  if (!walked) return std::unexpected(walked.error());
  if (!fits) return refuse(MemoryErrc::wrong_nature, "compare with /proc/self/smaps");
  return {};
}

} // namespace cppvmm
