module;
#include <cstdint>
#include <memory>
#include <optional>
export module cppvmm.guest_memory:kernel_books;
import :error;

namespace cppvmm {

struct BookSet;

/// The files of the kernel's that surveys, and adoption and discards, look into.
export enum class KernelBook : std::uint8_t {
  page_tables,   ///< /proc/self/pagemap: what has an entry. Of a privileged opener, also what kind of entry.
  mappings,      ///< /proc/self/smaps: whether memory is what it was stated to be. Without it nothing is reported.
  counts,        ///< /proc/self/status: huge pages of private memory, before Linux 6.7.
  descriptors,   ///< /proc/self/fd: Region::adopt of memory with a file, and some discards.
  shared_memory, ///< /proc/self/map_files: shared anonymous memory. For privileged processes only.
  userfaultfd,   ///< /dev/userfaultfd (Linux 6.1): huge pages, write watches, where userfaultfd(2) may not be called.
  /// /proc/self/maps: what memfd and hugetlb memory is, at less cost. `mappings` serves without it.
  mapping_list,
};

/// The word for it in messages: its path.
export [[nodiscard]] const char* to_string(KernelBook book);

/// Keeps open what the kernel tells this process about its own memory by, for a process that soon may not open it any
/// more: that gives up its privileges, is not to be dumped (PR_SET_DUMPABLE), or goes into a jail without /proc
/// (chroot, pivot_root). Without one, each look opens what it needs by its path, and what cannot be opened leaves
/// nothing known: all of the memory counts as touched, and the report's error says what was missing (docs/jail.md).
///
/// It is for the whole process, all GuestMemory in it: the books are of its memory, not of a guest's. While one lives,
/// everyone looks through it. Safe to use from any thread, and to end while others look, who keep it until they are
/// through. A forked child's is its parent's: it is noticed there, and nothing is looked up in it; the child may open
/// its own. Close-on-exec.
export class KernelBooks {
public:
  /// Opens all that this process can open now; what cannot be opened is `missing`. With CAP_SYS_ADMIN, more is told of
  /// page tables, for as long as it is kept, and the files of all shared anonymous memory that is mapped now are kept
  /// (a descriptor each, and its memory for as long), so open it after that was made.
  ///
  /// Errors: invalid_argument where there is one of this process's already; os when none could be noticed in a forked
  /// child (MADV_WIPEONFORK, Linux 4.14).
  [[nodiscard]] static MemoryResult<KernelBooks> open();
  KernelBooks(KernelBooks&&) noexcept = default;
  KernelBooks& operator=(KernelBooks&& other) noexcept;
  ~KernelBooks();

  /// Why this one is not kept: os, with errno. Of one that was moved from, all are missing.
  [[nodiscard]] std::optional<MemoryError> missing(KernelBook book) const;

private:
  explicit KernelBooks(std::shared_ptr<const BookSet> books);
  std::shared_ptr<const BookSet> books_;
};

} // namespace cppvmm
