module;
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stop_token>
#include <vector>
export module cppvmm.guest_memory:survey;
import :address;
import :content_check;
import :error;
import :evidence;
import :memory_map;
import :page_set;
import :region;
import :touched_map;
import :touched_runs;

namespace cppvmm {

export struct SurveyOptions {
  /// Pages that must not count as zeroed whatever the evidence: those that are about to be written.
  PageSet leave_out{};
  EvidenceSource source = EvidenceSource::automatic;
  /// Whether to look at the content of touched pages: what reads zero counts as zeroed, although it may be in use.
  std::optional<ContentCheckOptions> content_check = std::nullopt;
  /// Ends the survey early, in a bounded time after it was asked to: what has not been looked at by then counts as
  /// touched, and its RegionSurvey::error is `stopped`; so does all RAM where somebody holds the marks (a discard,
  /// clear_marks, marks, another survey). Bounded by a call to the kernel about one region, or one about all mappings
  /// of the process; by the 2 MiB that a look at content is at; by one pass over the marks, which are 32 KiB for each
  /// toucher and 128 MiB that have some; and by what it has to wait for beside: a WriteLog::collect, another survey's
  /// look at huge pages or at the same log; before Linux 6.7 also by one pass over all huge pages of the process.
  std::stop_token stop{};
  /// The same when so much time has passed since the call.
  std::chrono::nanoseconds max_time = std::chrono::nanoseconds::max();
};

/// What a write watch or a complete write log added to the evidence.
export struct WatchReport {
  std::uint64_t written_pages = 0; ///< Written since it began, or not known to be unwritten, or with data before.
  std::uint64_t zero_pages = 0;    ///< Counted as touched by evidence, and known to be zero by this.
  /// Why it counted for nothing.
  std::optional<MemoryError> error = std::nullopt;
  std::chrono::nanoseconds cost{};
};

/// What a survey found in one region.
export struct RegionSurvey {
  PageRange pages;
  RegionKind kind{};
  Backing backing{};
  Evidence evidence = Evidence::none;
  std::uint64_t touched_pages = 0; ///< By that evidence alone.
  /// Pages that are zero by all that is known, before marks and what was left out: with those that a watch, a log or a
  /// look at the content took out of `touched_pages`. None where the marks could not be seen.
  std::uint64_t zeroed_pages = 0;
  /// Of an armed write watch, and of a write log that is declared complete.
  std::optional<WatchReport> watch = std::nullopt;
  std::optional<WatchReport> log = std::nullopt;
  /// Pages that the host has allocated although no evidence says what for, or that were not read in a file whose
  /// content is the evidence; they count as touched.
  std::uint64_t unaccounted_pages = 0;
  /// Zero pages counted as touched because touched pages are scattered over more than 2^18 extents, in this region or
  /// in all of them together, which bounds the memory that a guest can make a survey use. Of each region by itself, and
  /// of all together, the 2^17 largest gaps are never given up.
  std::uint64_t given_up_pages = 0;
  /// Why there is no evidence, or nothing comes of it as the marks could not be seen, when a call failed.
  std::optional<MemoryError> error = std::nullopt;
  /// The look at the touched pages, where one was asked for and the memory is of the kind that was stated.
  std::optional<ContentCheckReport> content = std::nullopt;
  /// Without what all regions share: the looks at the process's mappings, and a wait.
  std::chrono::nanoseconds cost{};
};

/// Its sets are bounded whatever a guest does, however many regions there are and whatever is marked: by 2^18 ranges,
/// and what was left out by the embedder.
export struct Survey {
  PageSet ram;
  /// Pages of RAM that may hold data: by evidence, by mark, or because nothing is known.
  PageSet touched;
  /// SurveyOptions::leave_out, be it RAM or not.
  PageSet left_out;
  /// Who wrote, as far as it is known: what RAM was marked by hand, what a write log and its record of the accessors
  /// show. The other touched pages have an unknown writer. Of more than 2^18 ranges of marks, or of a log, the 2^17
  /// largest stay and smaller ones may be forgotten: who wrote there is missing then, in part or as a whole.
  TouchedRuns touchers;
  std::vector<RegionSurvey> regions;
  std::chrono::nanoseconds cost{}; ///< Of the whole, as GuestMemory::survey makes it.

  /// ram - touched - left_out. Each of these pages was zero at a moment during the survey (for a look at the content of
  /// shared memory, see ContentCheckOptions); none of them held data when it began, but for pages that were discarded,
  /// or with a look at the content overwritten with zeros, since. A new set each time, about as large as `touched`: one
  /// pass over the three.
  [[nodiscard]] PageSet zeroed() const;
  /// Calls each(range) for the ranges of `zeroed()` that are left without the pages of `without`, ascending; they do
  /// not touch. One pass over the four sets, which takes no memory.
  template <class Each>
  void for_each_zeroed(const PageSet& without, Each each) const {
    std::array holes{touched.ranges(), left_out.ranges(), without.ranges()};
    for (const PageRange& range : ram.ranges()) {
      for (PageNumber at = range.first(); at < range.end();) {
        // The first to begin of those that do not end before it, which may have begun already.
        PageNumber hole = range.end();
        PageNumber behind = range.end();
        for (std::span<const PageRange>& rest : holes) {
          while (!rest.empty() && rest.front().end() <= at)
            rest = rest.subspan(1);
          if (rest.empty() || rest.front().first() >= hole) continue;
          hole = rest.front().first();
          behind = rest.front().end();
        }
        if (at < hole) each(*PageRange::make(at, hole.value() - at.value()));
        at = behind;
      }
    }
  }
  /// At most `count` of the same ranges: the ones with the most pages, largest first, of equals the lowest first. One
  /// pass over the four sets, O(log count) a range, and room for `count`.
  [[nodiscard]] std::vector<PageRange> largest_zeroed(std::size_t count, const PageSet& without = {}) const;

  /// The touched pages with who touched them. An interval map takes 64 bytes and more for each range; `touchers` takes
  /// far less.
  [[nodiscard]] TouchedMap touched_map() const;
};

} // namespace cppvmm
