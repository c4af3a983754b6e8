// What this machine's kernel does, where kernels differ. Tests ask here before they expect it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace cppvmm::test {

/// What files of one folder are like.
struct FileFacts {
  bool can_be_made = false;      ///< At all; else nothing is known of the rest.
  bool named_by_fstat = false;   ///< fstat and /proc/self/maps name a file the same.
  bool in_memory = false;        ///< They are of tmpfs.
  bool pages_are_known = false;  ///< Of a file system whose page cache counts: tmpfs, ext4, XFS since Linux 6.9.
  bool reads_make_data = false;  ///< Who reads a hole makes a page of the file, which is data from then on.
  bool tell_holes = false;       ///< SEEK_HOLE and SEEK_DATA do.
  std::uint64_t data_bytes = 0;  ///< What is data around one written byte, by SEEK_DATA.
  std::uint64_t block_bytes = 0; ///< st_blksize.

  /// Whether a survey can go by what they say of themselves.
  [[nodiscard]] bool tell_the_truth() const { return can_be_made && named_by_fstat && tell_holes && pages_are_known; }
};

/// The pool of huge pages of one size.
struct HugePoolFacts {
  long pages = -1;          ///< In the pool; -1: this kernel has none of that size.
  long free = -1;           ///< Of them, free.
  bool is_writable = false; ///< Its size can be set by this process.
};

/// What became of reads of memory that was absent.
enum class ReadOfAbsent : std::uint8_t {
  unknown,
  shared_zero_page, ///< A page, or huge page, of zeros that all share: the process has no memory of its own for it.
  own_page,         ///< Memory of the process's own, as after a write.
};

/// Each was tried on this kernel when it was asked for first; nothing goes by a version.
struct MachineFacts {
  std::string kernel; ///< Its release, by uname.
  bool is_root = false;

  // Page tables.
  bool pagemap_scan = false;     ///< PAGEMAP_SCAN finds the page that was written, and no other.
  bool map_files = false;        ///< /proc/self/map_files can be opened, for shared memory without a descriptor.
  bool entry_kinds = false;      ///< /proc/self/pagemap shows this process what an entry is of.
  bool mincore = false;          ///< mincore counts the page of a memfd that was written, and nothing of an empty one.
  ReadOfAbsent read_of_absent{}; ///< Anonymous memory without huge pages, by what smaps counts as resident.
  bool reads_told_apart = false; ///< PAGEMAP_SCAN, asked as a survey asks, leaves out pages that were only read.
  ReadOfAbsent huge_read{};      ///< The same of memory that asked for huge pages.
  std::uint64_t huge_read_pages = 0;  ///< How many 4 KiB pages are in the page tables after that one read.
  bool huge_reads_told_apart = false; ///< PAGEMAP_SCAN leaves out all of them.

  // Huge pages that nobody reserves (THP).
  std::string thp_policy;        ///< The kernel's word for anonymous memory: always, madvise, never; empty: no THP.
  std::string shmem_thp_policy;  ///< For shared memory: also within_size, advise, deny, force.
  bool gives_huge_pages = false; ///< One store to anonymous memory that asks for them brings one.
  std::uint64_t pages_at_a_store = 0; ///< What one store brings into anonymous memory that does not ask, in pages.
  std::uint64_t shmem_pages_at_a_store = 0; ///< The same of a memfd that does not ask.
  std::uint64_t shmem_pages_at_a_write = 0; ///< And what one pwrite brings into a memfd.
  std::uint64_t shmem_pages_asked = 0;      ///< What one store brings into a memfd that asks for huge pages.

  // The page cache.
  bool cachestat = false; ///< cachestat counts the page of a memfd that was written, and nothing of an empty one.

  // Advice.
  bool populate_read = false;    ///< MADV_POPULATE_READ.
  bool populate_write = false;   ///< MADV_POPULATE_WRITE makes pages present.
  bool dontneed_locked = false;  ///< MADV_DONTNEED_LOCKED discards locked memory.
  bool hugetlb_dontneed = false; ///< MADV_DONTNEED takes memory of the pool of huge pages.
  bool page_out = false;         ///< MADV_PAGEOUT is known.
  bool collapse = false;         ///< MADV_COLLAPSE makes a huge page of small ones.
  bool mergeable = false;        ///< MADV_MERGEABLE is known (KSM).
  long ksm = -1;                 ///< What /sys/kernel/mm/ksm/run says: 1 while pages are merged; -1: no such file.

  bool membarrier = false; ///< MEMBARRIER_CMD_GLOBAL, without which nothing is proven of transparent huge pages.

  // userfaultfd.
  bool userfaultfd = false;         ///< There is one for user mode's faults.
  bool async_write_protect = false; ///< Asynchronous write protection, read by PAGEMAP_SCAN, tells the page written.

  // What the machine has.
  bool has_swap = false;        ///< Swapping to something just now.
  bool zram = false;            ///< Devices to swap to can be made.
  bool compaction = false;      ///< This process may have memory compacted.
  HugePoolFacts huge_pool_2m{}; ///< Of 2 MiB, when asked first.
  HugePoolFacts huge_pool_1g{}; ///< Of 1 GiB.
  FileFacts files{};            ///< Of the folder for temporary files.

  // KVM.
  std::string kvm_missing;   ///< Why there is no usable KVM; empty if there is.
  bool kvm_hyperv = false;   ///< KVM has a Hyper-V face of its own (KVM_CAP_HYPERV_CPUID).
  bool kvm_forwards = false; ///< And forwards extended hypercalls.

  /// Whether anonymous memory can get huge pages without being advised, now or, by khugepaged, later.
  [[nodiscard]] bool thp_unasked() const { return thp_policy == "always" || pages_at_a_store > 1; }
  /// Whether shared memory that nobody advised can: then it does whatever one mapping was advised, for others write
  /// too.
  [[nodiscard]] bool shmem_thp_unasked() const {
    return shmem_pages_at_a_store > 1 || shmem_pages_at_a_write > 1 || shmem_thp_policy == "always" ||
           shmem_thp_policy == "within_size" || shmem_thp_policy == "force";
  }
  /// Whether shared memory that is advised can.
  [[nodiscard]] bool shmem_thp() const {
    return shmem_thp_unasked() || shmem_pages_asked > 1 || shmem_thp_policy == "advise";
  }
};

/// Found when asked first, in some milliseconds and without changing anything for others.
[[nodiscard]] const MachineFacts& machine_facts();

/// Of the files of a folder, by making one; anew each time.
[[nodiscard]] FileFacts file_facts(const std::string& folder);
/// The same of one file: what was in it is gone, and it is a hole of its old size afterwards, of at least 1 MiB.
[[nodiscard]] FileFacts file_facts(int file);

/// Why /dev/kvm cannot be used, in a few words; empty if it can. Creates nothing.
[[nodiscard]] std::string kvm_missing();

/// How many bytes of the mapping that starts at `host`, or that it lies in, are in huge pages, by smaps; nothing where
/// that does not tell.
[[nodiscard]] std::optional<std::uint64_t> huge_page_bytes(const void* host);

} // namespace cppvmm::test
