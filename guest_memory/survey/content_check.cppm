module;
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
export module cppvmm.guest_memory:content_check;
import :error;
import :zero_scan;

namespace cppvmm {

/// Runs a task at some time, on any thread: `[&pool](auto task) { boost::asio::post(pool, std::move(task)); }`. It may
/// run the task before it returns, late, or never; it must not wait for another thread. Tasks throw nothing.
export using TaskExecutor = std::function<void(std::function<void()>)>;

/// A look at the content of pages that the kernel's books call touched, to find those that read zero all the same: the
/// rest of a huge page of which one byte was written, memory that was populated beforehand, pages written with zeros.
///
/// It has to be asked for, because it answers another question than the books do. Memory that nobody ever touched is in
/// nobody's use. A page that reads zero may be in use: a table that a firmware or a loader has cleared and is about to
/// fill, a stack of which nothing is on it just now. If the guest asks early, such a page is reported, is written a
/// moment later, and the guest, which took it for free memory that stays zero, has data where it expects none. Ask for
/// it where nothing but the asking guest writes to RAM once it has asked; or keep huge pages off a region until the
/// answer was given, which makes the books exact without a look.
///
/// What is promised: of private memory (anonymous, hugetlb, private files), on Linux 6.7 and later and where no write
/// watch is armed, the pages are write-protected while they are read, and a page that was written meanwhile is not
/// found zero: each page found zero was so as a whole at a moment during the call (ContentCheckReport::is_watched). Not
/// seen are writes to pages that were pinned before (device DMA, io_uring's fixed buffers): of these, what holds below,
/// with one pass either way. That costs the guest a fault at its next store to each page that was looked at.
///
/// Elsewhere, every page found zero had each of its words read as zero during the call, four times in ascending and
/// four times in descending order (pages that are not mapped in this process, and adopted memory without a FaultGuard:
/// eight times in ascending order, of copies by the kernel). A page that holds data from before the call until after it
/// is therefore not found zero, but for one whose data is moved about meanwhile so that it is, each time, within the
/// part of a microsecond that a pass takes, taken from the part that was not read yet to the part that was.
///
/// What is read: pages that are present just before, and are not swapped out; of files on disks, those that are mapped
/// in this process. No page of a hole is allocated and none is swapped in, unless a page is discarded or swapped out in
/// the instant between the look and the read, which then brings it back. Where mincore(2) does not tell what a file on
/// tmpfs has in memory (one that this process may not write), what others have swapped out is swapped in. Memory of
/// unknown kind is never read. What an embedder truncates, protects or unmaps meanwhile stays touched.
export struct ContentCheckOptions {
  /// Runs the tasks that read beside the calling thread; without one, the calling thread reads alone. The call never
  /// waits for a task that has not begun: an executor that is busy, that drops tasks or that throws costs only their
  /// help, and a task that begins after the call returned does nothing.
  TaskExecutor executor = nullptr;
  /// How many tasks to ask for; 0: one less than the machine has threads. Never more than there are 8 MiB parts to
  /// read.
  unsigned parallel_tasks = 0;
  /// How much memory to read, counted in whole pages: the largest touched extents of a region first.
  std::uint64_t max_bytes = UINT64_MAX;
  /// When to stop, counted from the survey's start; each thread ends the 2 MiB that it is at.
  std::chrono::nanoseconds max_time = std::chrono::nanoseconds::max();
  /// For comparison, and for tests: one that this machine lacks becomes `portable`.
  ZeroScan scan = ZeroScan::automatic;
};

/// What a content check did with the touched pages of a region: each is counted under checked, absent or unchecked.
export struct ContentCheckReport {
  std::uint64_t checked_pages = 0;   ///< Read.
  std::uint64_t zero_pages = 0;      ///< Of these, read as zero.
  std::uint64_t absent_pages = 0;    ///< Not present, swapped out, or nobody could tell: not read, they stay touched.
  std::uint64_t unchecked_pages = 0; ///< Beyond the budget: they stay touched.
  /// Whether writes were watched while the pages were read, so that what was found is exact.
  bool is_watched = false;
  /// Pages that read zero, and were written while they were looked at: they stay touched.
  std::uint64_t written_pages = 0;
  std::chrono::nanoseconds cost{};
  /// The first call that failed: the pages concerned are among the absent ones.
  std::optional<MemoryError> error = std::nullopt;
};

} // namespace cppvmm
