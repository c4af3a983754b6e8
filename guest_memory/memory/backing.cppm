module;
#include <cstdint>
export module cppvmm.guest_memory:backing;

namespace cppvmm {

/// What kind of host memory holds a region's bytes: it decides which of the kernel's books prove a page untouched.
export enum class Backing : std::uint8_t {
  anonymous,        ///< MAP_PRIVATE | MAP_ANONYMOUS.
  memfd,            ///< MAP_SHARED of a memfd or tmpfs file: other processes may have it too (vhost-user).
  shared_anonymous, ///< MAP_SHARED | MAP_ANONYMOUS.
  hugetlb,          ///< MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB.
  hugetlb_memfd,    ///< MAP_SHARED of a hugetlb memfd or hugetlbfs file.
  private_file,     ///< MAP_PRIVATE of a file or block device that nobody changes: a snapshot to restore from.
  /// MAP_PRIVATE of a hugetlb memfd or hugetlbfs file that nobody changes: a private_file of huge pages.
  hugetlb_private_file,
  shared_file, ///< MAP_SHARED of a file on any other file system.
  guest_memfd, ///< MAP_SHARED of a guest_memfd that can be mapped (GUEST_MEMFD_FLAG_MMAP, Linux 6.18).
  unknown,     ///< Nothing is known, so that every page counts as touched.
};

/// The word for it in reports, e.g. "hugetlb_memfd".
export [[nodiscard]] const char* to_string(Backing backing);

/// What the guest may do with a region.
export enum class RegionKind : std::uint8_t {
  ram,
  rom, ///< The guest reads it; guest-side writes are refused. Never reported as zeroed.
};

export enum class HugePageSize : std::uint64_t {
  two_mib = std::uint64_t{2} << 20,
  one_gib = std::uint64_t{1} << 30,
};

/// Whether the host may back a region with transparent huge pages: without being asked, the administrator's policy
/// decides (/sys/kernel/mm/transparent_hugepage/enabled), and once it was asked, the kernel has no way back to that.
export enum class HugePages : std::uint8_t {
  never,     ///< None from now on (MADV_NOHUGEPAGE); those that are there stay.
  preferred, ///< Wherever the administrator does not forbid them (MADV_HUGEPAGE).
};

/// What is so of all memory of a kind.
struct BackingTraits {
  const char* name = "";
  bool has_file = false;
  /// MAP_PRIVATE: all writes to it go through its mapping, but for device DMA to pages that were pinned before.
  bool is_private = false;
  bool is_hugetlb = false;
  /// The file is on a disk, or what passes for one: its pages may leave the page cache.
  bool is_on_disk = false;
  /// Its file can be read: what other processes wrote is found there.
  bool has_readable_file = false;
  /// May have transparent huge pages, or ask for none.
  bool may_be_transparent_huge = false;
  /// A page that reads zero stays so until someone writes it: not where dropping a page brings a file's data back,
  /// which is no write. And userfaultfd takes it.
  bool is_watchable = false;
  /// userfaultfd can be registered over all of it for missing pages: so what it is, and that nobody has yet to fill it,
  /// is told without a look at page tables.
  bool is_listed = false;
  /// Its evidence counts what has an entry of no page in this process's page tables, where an access is a signal.
  bool counts_entries = false;
};

[[nodiscard]] constexpr BackingTraits traits_of(Backing backing) {
  switch (backing) {
  case Backing::anonymous:
    return {.name = "anonymous",
            .is_private = true,
            .may_be_transparent_huge = true,
            .is_watchable = true,
            .is_listed = true,
            .counts_entries = true};
  case Backing::memfd:
    return {.name = "memfd",
            .has_file = true,
            .has_readable_file = true,
            .may_be_transparent_huge = true,
            .is_watchable = true,
            .is_listed = true};
  case Backing::shared_anonymous:
    return {.name = "shared_anonymous", .may_be_transparent_huge = true, .is_watchable = true, .is_listed = true};
  case Backing::hugetlb:
    return {.name = "hugetlb",
            .is_private = true,
            .is_hugetlb = true,
            .is_watchable = true,
            .is_listed = true,
            .counts_entries = true};
  case Backing::hugetlb_memfd:
    return {.name = "hugetlb_memfd",
            .has_file = true,
            .is_hugetlb = true,
            .has_readable_file = true,
            .is_watchable = true,
            .is_listed = true,
            .counts_entries = true};
  case Backing::private_file:
    return {.name = "private_file",
            .has_file = true,
            .is_private = true,
            .is_on_disk = true,
            .has_readable_file = true,
            .may_be_transparent_huge = true};
  case Backing::hugetlb_private_file:
    return {.name = "hugetlb_private_file",
            .has_file = true,
            .is_private = true,
            .is_hugetlb = true,
            .has_readable_file = true,
            .is_listed = true,
            .counts_entries = true};
  case Backing::shared_file:
    return {.name = "shared_file", .has_file = true, .is_on_disk = true, .has_readable_file = true};
  case Backing::guest_memfd:
    return {.name = "guest_memfd", .has_file = true};
  case Backing::unknown:
    break;
  }
  return {.name = "unknown"};
}

} // namespace cppvmm
