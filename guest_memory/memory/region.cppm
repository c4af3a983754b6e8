module;
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
export module cppvmm.guest_memory:region;
import :address;
import :backing;
import :error;
import :region_use;

namespace cppvmm {

/// What becomes of pages that are to be discarded, and whose memory cannot be given back.
export enum class DiscardMode : std::uint8_t {
  free_or_clear, ///< They are overwritten with zeros.
  free_only,     ///< They stay as they are: a hint is not worth memory, or time in proportion to it.
};

/// What became of discarded pages: all but those that were kept read zero. The three sum up to the pages asked for.
export struct Discarded {
  std::uint64_t freed_pages = 0;   ///< The host has no memory for them now, as far as this process can tell.
  std::uint64_t cleared_pages = 0; ///< Overwritten with zeros: the host keeps them, and they count as touched.
  std::uint64_t kept_pages = 0;    ///< As they were (DiscardMode::free_only).
  friend bool operator==(const Discarded&, const Discarded&) = default;
};

/// What becomes of a private_file whose file system is not known to show its holes (docs/evidence.md says which do),
/// and of a hugetlb_private_file: as nobody changes the file, it is read once, when the region is made, and its pages
/// that read zero are remembered. Of no other kind, and of no ROM, is anything read.
export struct FileContent {
  /// How much of the region's part of the file may be read, from its start on: a second or so for each GiB that is in
  /// the page cache, and what the disk takes for the rest. What is not read counts as touched for as long as the region
  /// lives. 0: nothing is read, and nothing is known to be zero, but for a hugetlbfs file that has no memory at all.
  std::uint64_t max_bytes = std::uint64_t{1} << 30;
};

/// Memory that an embedder mapped itself, with what it states about it. The statement decides which evidence counts, so
/// that a wrong one could make a page with data pass for zeroed: it is compared with /proc/self/maps at adoption and
/// again by every survey, and memory that does not fit it counts as touched.
///
/// What /proc cannot show is the embedder's promise: that nobody changes the file of a private_file (which was synced
/// to its disk), nor has since it was mapped, and that no process outside this host writes a shared_file.
export struct AdoptedMemory {
  void* host_address = nullptr; ///< Page-aligned; stays mapped as it is while any copy of the Region lives.
  std::uint64_t bytes = 0;      ///< A multiple of 4 KiB; of the huge page for hugetlb kinds.
  Backing backing = Backing::unknown;
  /// The file, for kinds that have one; it is opened anew (a guest_memfd's is duplicated), the embedder keeps this one.
  int fd = -1;
  std::uint64_t fd_offset = 0; ///< Where in the file the region starts; a multiple of 4 KiB.
  FileContent content = {};    ///< How much of a private file may be read.
};

/// What is said of pages that keep what they hold.
export enum class PageUse : std::uint8_t {
  cold,      ///< Not soon needed: the first that reclaim takes (MADV_COLD, Linux 5.4).
  page_out,  ///< Taken at once, to swap or to their file (MADV_PAGEOUT, Linux 5.4). Takes time in proportion.
  will_need, ///< Soon needed: what is swapped out is read, without waiting (MADV_WILLNEED). Of files on disks, holes
             ///< may be filled with pages of zeros, which count as touched.
  populate,  ///< All of them are allocated now, and so count as touched (MADV_POPULATE_WRITE, Linux 5.14).
};

struct FileData;

/// A range of guest-physical addresses and the host memory behind it. A cheap handle: copies share the memory, which
/// is unmapped with the last of them. What it says of itself never changes, and all of it is safe to use from any
/// thread. One that was moved from may only be assigned to or destroyed.
///
/// Nothing else may be mapped over a region's memory: a survey that finds other than what it put there (a file, a
/// device) counts the region as touched.
///
/// Memory of every region reads zero when it is made (but adopted memory and files, which read as they did). Making one
/// fails with invalid_argument (no bytes; address or size not a multiple of 4 KiB, for hugetlb size not of the huge
/// page), out_of_range, unavailable (this host has no such pages to give) or os.
///
/// Of adopted memory, the embedder may protect, truncate or unmap what it likes: accesses there are errors, no signals
/// (MemoryMap), and surveys count a region that is not as it was stated as touched.
///
/// Memory that is registered with a userfaultfd for missing pages counts as touched: a handler has yet to fill it.
/// A guest_memfd is adopted as such where it can be mapped, and keeps its VM alive as long as any copy of the Region.
/// Private memory of confidential guests, which can not, has no address to adopt it by.
export class Region {
public:
  [[nodiscard]] static MemoryResult<Region> anonymous(GuestAddress start, std::uint64_t bytes,
                                                      RegionKind kind = RegionKind::ram);
  /// The memfd is sealed against shrinking and growing, so that no access can meet its end.
  [[nodiscard]] static MemoryResult<Region> memfd(GuestAddress start, std::uint64_t bytes,
                                                  RegionKind kind = RegionKind::ram);
  /// Huge pages are reserved from the host's pool here; `unavailable` when it has too few.
  [[nodiscard]] static MemoryResult<Region> hugetlb(GuestAddress start, std::uint64_t bytes, HugePageSize page,
                                                    RegionKind kind = RegionKind::ram);
  /// The same of a memfd of huge pages, which other processes can be given.
  [[nodiscard]] static MemoryResult<Region> hugetlb_memfd(GuestAddress start, std::uint64_t bytes, HugePageSize page,
                                                          RegionKind kind = RegionKind::ram);
  /// A private mapping of `bytes` of a file from `offset` on (a multiple of 4 KiB): reads what the file holds, writes
  /// stay here. The file (or block device) is synced, and then nobody may change it while the region lives. Where the
  /// file system is not known to show its holes, as much as `content` says is read. invalid_argument when the file ends
  /// before the region does. The descriptor is duplicated.
  ///
  /// Of a hugetlbfs file it is a hugetlb_private_file: both `bytes` and `offset` are multiples of its huge page, which
  /// are reserved here for all of the region; `unavailable` when the pool has too few.
  [[nodiscard]] static MemoryResult<Region> private_file(GuestAddress start, std::uint64_t bytes, int fd,
                                                         std::uint64_t offset, RegionKind kind = RegionKind::ram,
                                                         FileContent content = {});
  /// Hands over the embedder's mapping; wrong_nature when /proc/self/maps shows another kind than stated. What is
  /// stated as a private_file and is of a hugetlbfs file becomes a hugetlb_private_file.
  [[nodiscard]] static MemoryResult<Region> adopt(GuestAddress start, const AdoptedMemory& memory,
                                                  RegionKind kind = RegionKind::ram);

  [[nodiscard]] PageRange pages() const;
  [[nodiscard]] GuestAddress start() const { return pages().start_address(); }
  [[nodiscard]] std::uint64_t bytes() const { return pages().bytes(); }
  [[nodiscard]] RegionKind kind() const;
  [[nodiscard]] Backing backing() const;
  /// What the host gives and takes back at once, in bytes: a huge page of hugetlb kinds, else 4 KiB. From the region's
  /// start on.
  [[nodiscard]] std::uint64_t page_bytes() const;
  /// Whether the mapping is the embedder's own.
  [[nodiscard]] bool is_adopted() const;
  /// Where the region starts in this process. For KVM memory slots and the like; guest and other processes may write
  /// behind it at any time, so never make a C++ reference into it: read and write through MemoryMap.
  [[nodiscard]] void* host_address() const;
  /// The file behind it, or -1; owned by the region. To be shared with other processes, not to be read, written or
  /// resized here.
  [[nodiscard]] int file_descriptor() const;
  [[nodiscard]] std::uint64_t file_offset() const;
  /// Which file a shared mapping is of (st_dev, st_ino); nothing for private memory.
  struct FileId {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    friend bool operator==(const FileId&, const FileId&) = default;
  };
  [[nodiscard]] std::optional<FileId> shared_file_id() const;

  /// Host memory that the region holds now, in bytes: allocated blocks of a memfd of its own; the pages in this
  /// process's page tables, swapped-out ones included, for adopted memory; else the resident set in /proc/self/smaps.
  /// Walks page tables: for reports, not for hot paths.
  [[nodiscard]] MemoryResult<std::uint64_t> resident_bytes() const;
  /// The part of the resident set that is in transparent huge pages (AnonHugePages and ShmemPmdMapped in smaps);
  /// `unavailable` for adopted memory that is part of a larger mapping.
  [[nodiscard]] MemoryResult<std::uint64_t> huge_page_bytes() const;

  /// Gives the host memory of the pages back; they read zero until someone writes them, and the next survey reports
  /// them. For a balloon that inflates, and for a reset. What cannot be given back is cleared, or kept, as `mode` says.
  /// By kind:
  /// - anonymous: MADV_DONTNEED (MADV_DONTNEED_LOCKED where it is locked; before Linux 5.18 that is cleared);
  /// - memfd, shared_anonymous, shared_file, guest_memfd: a hole in the file, and so for all who share it. Locked
  ///   memory that a userfaultfd holds, or whose file cannot be opened for writing, is cleared, and so are files that
  ///   are sealed or whose file system has no holes (with free_only, locked memory of these kinds is kept);
  /// - hugetlb, hugetlb_memfd: whole huge pages are given back to the host's pool, where others may take them: a later
  ///   access that finds the pool empty is a SIGBUS. Parts of a huge page are cleared, if it is there at all. Before
  ///   Linux 6.7, and where a userfaultfd of another holds the memory, a private one that the kernel is moving just
  ///   then may be taken for one that is not there: the part keeps its data then, and stays touched;
  /// - private_file: the pages are replaced by anonymous private memory, adopted ones too (readable, writable, and
  ///   without what else was set there: locks, policies, a userfaultfd), for the file's data would come back otherwise.
  ///   Pages that would make more than 1024 such parts of the region are cleared, so that no guest can use up the
  ///   mappings that a process may have;
  /// - hugetlb_private_file: as hugetlb where the file had no data when the region was made, and else cleared, for the
  ///   file's data would come back otherwise.
  ///
  /// Fails with not_backed (a page is not in the region), read_only (ROM), unavailable (unknown backing, which
  /// free_only keeps), and has then done nothing; or with inaccessible (a page to clear cannot be had; EHWPOISON: it
  /// was lost to a memory error) or os, with the guest's address, and may then have discarded some. Nobody should write
  /// the pages meanwhile, as their content would be lost or not; a device that writes behind the kernel's back (pinned
  /// memory) must not, for its writes would go to memory that the guest no longer has.
  ///
  /// A userfaultfd that holds the memory here is told (UFFD_EVENT_REMOVE, if it asked for that), and the call waits
  /// until it has read so: its handler must not wait for this call, nor for what waits for it (GuestMemory::discard).
  /// The pages read what the handler brings from then on. One that holds the memory in another process is not told.
  ///
  /// One or two system calls; where pages are cleared, time in proportion to them; and where shared memory is locked,
  /// as long as it takes to read /proc/self/smaps. No bookkeeping is behind it: an embedder may discard on its own (by
  /// madvise) with the same result.
  [[nodiscard]] MemoryResult<Discarded> discard(PageRange pages, DiscardMode mode = DiscardMode::free_or_clear) const;

  /// Tells the kernel what the pages will be used for; they keep what they hold. not_backed where a page is not in the
  /// region; unavailable where the kernel does not take it: cold and page_out for hugetlb kinds and locked memory, all
  /// on an older kernel; os.
  [[nodiscard]] MemoryResult<void> advise(PageRange pages, PageUse use) const;

  /// Has the host allocate all of the region now (MADV_POPULATE_WRITE, Linux 5.14), so that no access faults later.
  /// What it holds stays; of a private_file, all becomes a private copy. unavailable on older kernels; os with ENOMEM,
  /// EFAULT (nothing can be had there) or EHWPOISON, and `completed` bytes populated.
  ///
  /// From then on all pages have entries in the page tables and slots in the page cache: the evidence of untouched
  /// pages is gone, and every page counts as touched until it is discarded, but for a write watch, a dirty log, or a
  /// look at the content.
  [[nodiscard]] MemoryResult<void> populate() const;

  /// Keeps transparent huge pages off the region, or asks for them. One touched byte of a huge page makes 2 MiB
  /// touched: never until the first answer, and preferred from then on, gives an exact answer and does not cost the
  /// guest its huge pages, which khugepaged makes of touched memory later and faults of untouched memory at once.
  ///
  /// It is for faults in this process: of a memfd, /sys/kernel/mm/transparent_hugepage/shmem_enabled has the first word
  /// (never: there are none; always: other processes and write(2) get them all the same). unavailable for hugetlb
  /// kinds, shared_file, guest_memfd and unknown, which have none, and where the kernel was built without; else os.
  ///
  /// Of anonymous memory, `never` takes some 10 ms on Linux 6.7 and later, to see that there are none: surveys then
  /// cost no more than the look at the page tables. That holds until the next call. In between, nobody may bring huge
  /// pages there in another way: by madvise(2), by a mapping over all of the region, by UFFDIO_MOVE, or through another
  /// Region of the same memory. A survey that meets one knows nothing of the region, but it may not meet it.
  [[nodiscard]] MemoryResult<void> set_huge_pages(HugePages use) const;

  /// Whether the memory is in use, this Region included: to be asked for before it is taken out of the maps that have
  /// it, and waited for without it.
  [[nodiscard]] RegionUse use() const;

  /// Whether both are handles to the same memory at the same address.
  friend bool operator==(const Region& left, const Region& right) { return left.mapping_ == right.mapping_; }

private:
  struct Mapping;
  friend struct FileData;
  friend class MemoryMap;
  friend class WriteRecord;
  friend bool ends_at_guard_file(const Region& region);
  friend std::uint64_t small_pages_proof(const Region& region);
  explicit Region(std::shared_ptr<const Mapping> mapping);
  /// Begins to remember, from none on, which pages the accessors write. Nobody may be writing meanwhile.
  [[nodiscard]] MemoryResult<void> start_recording() const;
  void stop_recording() const;
  /// The accessors are about to write these bytes.
  void record_write(std::uint64_t offset, std::uint64_t bytes) const;
  /// One bit a page; empty before the first start_recording.
  [[nodiscard]] std::span<const std::atomic<std::uint64_t>> recorded_writes() const;

  std::shared_ptr<const Mapping> mapping_;
};

} // namespace cppvmm
