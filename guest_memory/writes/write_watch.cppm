module;
#include <cstdint>
#include <functional>
#include <span>
export module cppvmm.guest_memory:write_watch;
import :address;
import :error;
import :toucher;

// Two ways to know what was written to memory that is all present (populated beforehand, locked, in huge pages), where
// the kernel's books call every page touched: a watch by the host's page tables, and a log of the guest's stores
// together with a record of the accessors' writes. Both know nothing of before they began: that is the baseline.

namespace cppvmm {

/// What counts as zero at the moment when a watch or log begins, of the pages that evidence calls touched.
export enum class Baseline : std::uint8_t {
  content, ///< Pages that read zero then: all that are present are read once.
  promise, ///< All of them: the embedder promises that nobody has written since the memory was made. Nothing is read.
};

/// How GuestMemory::arm_write_watch watches.
export struct WriteWatchOptions {
  Baseline baseline = Baseline::content;
  /// The embedder's promise that, while the watch is armed, the memory is written through this mapping alone: by this
  /// process's pointers, system calls and vCPUs. No other process writes it, nobody uses write(2) on its file or a
  /// second mapping of it, and no device writes by DMA to pages that were pinned before the watch was armed (pinning
  /// them later counts as a write). Shared memory is not watched without it; of private memory, only the DMA is left to
  /// promise. Nor may anyone protect pages anew behind the watch (PAGEMAP_SCAN with PM_SCAN_WP_MATCHING): what was
  /// written before would pass for unwritten.
  bool written_through_this_mapping_only = false;
};

/// A log of writes that someone else keeps, such as KVM's dirty log (cppvmm.hv_ext's DirtyLog).
export struct WriteLog {
  /// Sets bit i % 64 of word i / 64 for each page `pages.first() + i` that was written since it was asked last (pages
  /// reported before may be left out or repeated), leaves all other bits as they are. Of a log that is to be complete,
  /// each write that was made before the call has to be among them. Called for one region of RAM at a
  /// time, by one thread at a time. After an error the region's log counts for nothing any more. It must call nothing
  /// of that GuestMemory's that surveys, changes the map, or begins or ends a watch or a log.
  std::function<MemoryResult<void>(PageRange pages, std::span<std::uint64_t> bitmap)> collect;
  /// Who writes what the log shows.
  Toucher by = Toucher::guest;
};

/// What GuestMemory::begin_write_log makes of a log.
export struct WriteLogOptions {
  Baseline baseline = Baseline::content;
  /// The embedder's promise that, while the log is kept, every write to RAM is in it or goes through the accessors of
  /// MemoryMap and GuestMemory (which are recorded): no pointers of the VMM's, no system calls that write guest memory,
  /// no other processes, no device DMA, no vhost in the kernel (which keeps a log of its own). With it the log proves
  /// pages zero; without it, it only tells who wrote.
  bool complete = false;
};

} // namespace cppvmm
