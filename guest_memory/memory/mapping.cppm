module;
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <mutex>
#include <optional>
module cppvmm.guest_memory:mapping;
import :address;
import :backing;
import :descriptor;
import :error;
import :page_set;
import :region;
import :region_use;
import :unmap;

namespace cppvmm {

/// The parts of a private_file region that are no longer the file's but anonymous memory.
struct ReplacedPages {
  /// Each is a mapping of its own, and splits one: a process may have 65530 (vm.max_map_count).
  static constexpr std::size_t most_ranges = 1024;

  std::mutex mutex;
  PageSet pages;
  std::optional<HugePages> huge_pages; ///< What the region's owner asked for; replaced pages get it too.
};

/// What is mapped at an address of a certain alignment.
struct HostMemory {
  std::uint64_t bytes = 0;
  std::uint64_t alignment = 0;
  int flags = 0; ///< Of mmap(2).
  int fd = -1;
  std::uint64_t offset = 0;
};

/// What the handles to a region share.
struct Region::Mapping {
  RegionEnd end; // first, for it is over last
  PageRange pages;
  RegionKind kind = RegionKind::ram;
  Backing backing = Backing::anonymous;
  bool is_adopted = false;
  void* host = nullptr;
  // What to unmap: more than the memory itself, for it has guard pages around it. Null for adopted memory.
  void* reserved = nullptr;
  std::size_t reserved_bytes = 0;
  bool ends_at_guard_file = false; ///< The guard pages are of a guard_file.
  Descriptor fd;
  std::uint64_t fd_offset = 0;
  std::optional<FileId> shared_file;
  // Pages that the accessors wrote while recording was on, one bit each. The bits stay until the mapping goes, so that
  // an accessor never meets freed memory.
  mutable std::atomic<std::atomic<std::uint64_t>*> recorded = nullptr;
  mutable std::atomic<bool> is_recording = false;
  mutable std::atomic<bool> has_recorder = false;
  std::uint64_t huge_page = 0; // of hugetlb kinds, in bytes; 0 where it is not known
  mutable ReplacedPages replaced;
  // Of anonymous memory, not 0: it has no transparent huge pages, and gets none while this stays as it is (see
  // Region::set_huge_pages).
  mutable std::atomic<std::uint64_t> small_pages_proof = 0;
  mutable std::uint64_t small_pages_proofs = 0; // how many there were; with `replaced.mutex` held
  std::shared_ptr<const FileData> file_data;    // of a private file that was read

  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (reserved != nullptr) unmap(reserved, reserved_bytes);
    if (void* bits = recorded.load(std::memory_order_relaxed); bits != nullptr) unmap(bits, recorded_bytes());
  }
  /// Maps it for reading and writing, with an inaccessible page on either side: guard pages catch overruns, and keep
  /// the kernel from joining the mapping with a neighbour, which smaps could not tell apart. 0, or errno.
  [[nodiscard]] int map_guarded(const HostMemory& memory);
  [[nodiscard]] std::size_t recorded_words() const { return (pages.count() + 63) / 64; }
  [[nodiscard]] std::size_t recorded_bytes() const { return recorded_words() * sizeof(std::uint64_t); }
};

/// Whether the page behind it is one that no userfaultfd can be registered over.
[[nodiscard]] bool ends_at_guard_file(const Region& region);

/// Region::Mapping::small_pages_proof.
[[nodiscard]] std::uint64_t small_pages_proof(const Region& region);

/// An error of making a region, or of the calls that it has.
[[nodiscard]] std::unexpected<MemoryError> refuse_region(MemoryErrc code, GuestAddress start, std::uint64_t bytes,
                                                         const char* operation, int os_error = 0);
/// The same where huge pages could not be mapped: unavailable when it is for want of them.
[[nodiscard]] std::unexpected<MemoryError> refuse_huge(GuestAddress start, std::uint64_t bytes, int os_error);

/// The pages of a region of that size; invalid_argument if it is not made of whole `unit`s.
[[nodiscard]] MemoryResult<PageRange> checked_pages(GuestAddress start, std::uint64_t bytes, std::uint64_t unit,
                                                    const char* operation);

/// Nothing, and errno, where it cannot be told: two regions of the same file would not be noticed.
[[nodiscard]] std::optional<Region::FileId> file_id(int fd);

/// Guest-physical and host address agree below 2 MiB, so that KVM can map huge pages whole.
inline constexpr std::uint64_t huge_alignment = std::uint64_t{2} << 20;

/// MADV_NOHUGEPAGE or MADV_HUGEPAGE: 0, or what errno says.
[[nodiscard]] int advise_huge_pages(void* host, std::uint64_t bytes, HugePages use);

} // namespace cppvmm
