module;
#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <span>
export module cppvmm.guest_memory:guest_memory;
import :address;
import :error;
import :memory_map;
import :page_set;
import :region;
import :region_use;
import :survey;
import :touched_map;
import :write_watch;

namespace cppvmm {

/// A guest's memory: the current MemoryMap, replaced whole while others go on with the one they hold, and what was
/// marked as touched by hand. Safe to use from any thread; a forked child makes its own, unless no other thread used
/// this one at the fork.
export class GuestMemory {
public:
  GuestMemory();
  explicit GuestMemory(MemoryMap map);
  ~GuestMemory();
  GuestMemory(const GuestMemory&) = delete;
  GuestMemory& operator=(const GuestMemory&) = delete;

  /// The map as it is now. Its regions stay mapped while the snapshot lives.
  [[nodiscard]] std::shared_ptr<const MemoryMap> snapshot() const;
  /// Publishes another map.
  void replace(MemoryMap map);
  /// Publishes the current map with one region more, or less; concurrent changes do not lose each other.
  [[nodiscard]] MemoryResult<void> add_region(Region region);
  /// Who adopted the region's memory waits for the use to be over before unmapping it: accesses and surveys that began
  /// before go on in it. not_backed where no region starts at `start`. (Where membarrier(2) is refused that was allowed
  /// when this object was made, the use is not over before a later change of the map for which it is allowed again.)
  [[nodiscard]] MemoryResult<RegionUse> remove_region(GuestAddress start);

  /// Accesses to the current map; see MemoryMap. They share no lock and no counter with other threads, but for one
  /// whose map is replaced meanwhile, which may be the one to unmap its regions.
  [[nodiscard]] MemoryResult<void> read(GuestAddress address, std::span<std::byte> into) const;
  [[nodiscard]] MemoryResult<void> write(GuestAddress address, std::span<const std::byte> from) const;
  [[nodiscard]] MemoryResult<void> load(GuestAddress address, std::span<const std::byte> from) const;
  template <GuestValue T>
  [[nodiscard]] MemoryResult<T> read_value(GuestAddress address) const {
    T value{};
    if (auto done = read(address, std::as_writable_bytes(std::span(&value, 1))); !done)
      return std::unexpected(done.error());
    return value;
  }
  template <GuestValue T>
  [[nodiscard]] MemoryResult<void> write_value(GuestAddress address, const T& value) const {
    return write(address, std::as_bytes(std::span(&value, 1)));
  }

  /// Declares pages touched that the kernel's books may not show, such as those written by device DMA that bypasses
  /// this process. Marks stay until they are cleared or their pages discarded, whatever happens to the map. A survey
  /// counts each whose call ended before it began. Where membarrier(2) is refused that was not when this GuestMemory
  /// was made, and there are marks, all RAM counts as touched. Nobody named is Toucher::unknown.
  ///
  /// To be called when the write has ended, before anybody may be told of it: a discard takes marks away that were made
  /// before it. Where surveys may be made while the write is going on, before it as well.
  ///
  /// From any thread, without a lock, and at O(1) for a page: once a part of the memory has marks, all that is shared
  /// is the byte of the page, which is not written if the page is marked already. Takes a byte for each page of 128 MiB
  /// of RAM that has marks, and for each toucher that they name; and 256 KiB for each TiB. Where the map has no RAM, or
  /// RAM has come and gone, marks take some MiB at most: of those that are scattered further, all 128 MiB (or 1 TiB)
  /// that they are in count as marked, also if RAM comes there later, and so they do where no memory is to be had for
  /// this. None is lost, and nothing is thrown.
  void mark_touched(PageRange pages, Touchers by) noexcept;
  /// Waits for a discard, and for whoever reads marks. Where no memory is to be had to tell pages apart that were
  /// marked as a large whole, they stay marked.
  void clear_marks(PageRange pages) noexcept;
  /// A copy of at most `most_marks` ranges. Of more, those with the smallest gaps between them become one there, and
  /// what is in between counts as marked too. (Surveys go by the marks themselves.) Those whose call ended before are
  /// among them; where that cannot be known, as above, every page is.
  [[nodiscard]] TouchedMap marks() const;
  static constexpr std::size_t most_marks = std::size_t{1} << 16;

  /// Watches the writes to the region of RAM that starts at `start`, for memory that is all present (populated, locked,
  /// in huge pages): from now on a survey counts only those of its pages as touched that were written since, or held
  /// data then. By userfaultfd's asynchronous write protection, through PAGEMAP_SCAN: Linux 6.7 and later. Costs a
  /// fault at the first write to each page (in a huge page: of the host's page tables, to 4 KiB). Lasts until disarmed,
  /// or until the map no longer has the region. Waits for a survey that looks at the content of a region.
  ///
  /// Huge pages of the pool are discarded through this object meanwhile: after an madvise or fallocate of the
  /// embedder's own, their protection stays behind, and counts as a page (of shared ones, all that was not in memory
  /// when the watch was armed then counts as touched).
  ///
  /// Errors: not_backed and read_only; invalid_argument for shared memory without the promise in `options`, for memory
  /// that is watched already or registered with another userfaultfd; unavailable for files, memory of unknown nature,
  /// and on kernels without it; wrong_nature; os.
  [[nodiscard]] MemoryResult<void> arm_write_watch(GuestAddress start, const WriteWatchOptions& options = {});
  /// Whether there was one. The memory may be watched anew then: surveys in progress go on without the watch, and this
  /// waits for one that reads it. (A userfaultfd of the embedder's may find the memory registered for a moment, as any
  /// survey may do with huge pages and with what it looks at the content of.)
  bool disarm_write_watch(GuestAddress start);

  /// Keeps a log of the guest's writes beside a record of what the accessors write (of this object, and of the maps
  /// that have its regions), for the RAM regions of the current map. Surveys tell by it who wrote a page; and, where
  /// `options` declares that it is complete, count only pages as touched that were written since or held data before
  /// (anonymous memory, memfd and hugetlb of both kinds, shared anonymous memory).
  ///
  /// Begin it before the vCPUs run and while nobody else accesses the memory; the log has to be on already. It lasts
  /// until end_write_log; a region is forgotten with its removal, and regions that come later are not in it.
  /// invalid_argument when a log is kept already; os.
  [[nodiscard]] MemoryResult<void> begin_write_log(WriteLog log, const WriteLogOptions& options = {});
  /// Whether there was one. Writes before it are forgotten: nothing is known of them any more. Waits for a call of
  /// WriteLog::collect that is in progress, so not to be called from there; none comes after it, surveys in progress
  /// included.
  bool end_write_log();

  /// MemoryMap::discard of the current map, and takes the marks of those pages back, as their content is gone. For a
  /// balloon that inflates (one that deflates needs nothing); a region that is unplugged is just removed. Calls that
  /// look at marks or clear some wait for it, and so do surveys; mark_touched, snapshot() and accesses do not. When it
  /// fails, or when pages are kept or the map is replaced meanwhile, the marks stay, and so do those that are made
  /// meanwhile.
  [[nodiscard]] MemoryResult<Discarded> discard(const PageSet& pages, DiscardMode mode = DiscardMode::free_or_clear);
  /// Discards all RAM of the map but `keep`, which may name pages that are no RAM: a machine's reset that leaves what
  /// firmware or the VMM put there. Nothing is done when RAM of unknown backing would have to be discarded.
  /// (A machine that restarts from a snapshot needs another map: private_file regions made anew, and replace().)
  [[nodiscard]] MemoryResult<Discarded> reset(const PageSet& keep = {});

  /// Derives which pages of RAM are known to be zero, from the kernel's books and the marks (see Survey). Every page
  /// that held data before the call began is left out of `zeroed`, whoever wrote it: this process, a vCPU, or another
  /// process that shares the memfd. Throws std::bad_alloc, and fails in no other way: where evidence can't be had,
  /// memory counts as touched and the region's report says why. When the map is replaced meanwhile the survey starts
  /// over, at most 3 times; after that everything counts as touched, and each region's error is `stopped`.
  ///
  /// Costs system calls in proportion to the number of touched extents, and where private memory may have transparent
  /// huge pages a membarrier(2), which waits some 10 ms, once for all regions. Where pages are marked it costs another
  /// one, which interrupts the processors that run threads of this process, vCPUs among them, and a pass over the
  /// marks: 32 KiB for each toucher and 128 MiB that have some. No guest memory is touched unless a look at its content
  /// is asked for (but for a byte of each huge page that is there, before Linux 6.7).
  ///
  /// At most two surveys are made at once (set_most_surveys). Who calls while as many are in progress waits, and has
  /// the next one together with all who wait: it begins after each of them has called, and what an option leaves out is
  /// left out for that caller alone. One that looks at content, or by another source, is not shared.
  ///
  /// A page that is discarded (MADV_DONTNEED, hole punched) during the call may or may not be zeroed. Before Linux 6.5,
  /// pages of a memfd that are allocated and discarded during the call can also hide one of another process's that the
  /// kernel is migrating and that is not mapped here (docs/evidence.md).
  ///
  /// Huge pages are looked at through a userfaultfd of the survey's own: meanwhile, another cannot be registered over
  /// them (EBUSY), and before Linux 6.7 an MADV_DONTNEED of any huge pages of the process waits. The next store to each
  /// faults once. Of a hugetlb file, what other processes wrote is mapped here afterwards.
  [[nodiscard]] Survey survey(const SurveyOptions& options = {}) const;
  /// How many surveys are made at once, at least one: each takes a processor, and memory of its own.
  void set_most_surveys(unsigned most);

private:
  struct State;
  std::unique_ptr<State> state_;
};

} // namespace cppvmm
