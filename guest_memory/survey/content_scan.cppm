module;
#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:content_scan;
import :content_check;
import :evidence;
import :guest_copy;
import :page_evidence;
import :region;
import :survey_stop;

namespace cppvmm {

/// What the regions of a survey have between them to spend on content. Safe to use from any thread.
class ContentBudget {
public:
  /// Time counts from here on. `stop` outlives it, if there is one: nothing is left once that is set.
  explicit ContentBudget(const ContentCheckOptions& options, const SurveyStop* stop = nullptr);

  [[nodiscard]] bool is_spent() const;
  /// Up to `pages`: as many as are left.
  [[nodiscard]] std::uint64_t take(std::uint64_t pages);

private:
  std::atomic<std::uint64_t> pages_left_;
  std::chrono::nanoseconds max_time_;
  std::chrono::steady_clock::time_point begin_;
  const SurveyStop* stop_;
};

struct ContentScan {
  /// What may still hold data.
  ExtentList touched;
  ContentCheckReport report;
};

/// How often a page is read, in either direction, before it counts as zero: once where writes are watched meanwhile, so
/// that those which moved data past the reader are known; else so often that data would have to move past the reader
/// each time, in step with it.
inline constexpr unsigned looks_at_watched = 1;
inline constexpr unsigned looks_at_unwatched = 4;

/// Looks at the content of `touched`, extents of pages within the mapping that are ascending, disjoint and counted from
/// its start (see ContentCheckOptions). The mapping is of the kind that `backing` says, as check_backing found before
/// and must find after. What cannot be had is absent; by loads and stores, if a FaultGuard is installed.
[[nodiscard]] ContentScan scan_content(const FileMapping& mapping, Backing backing, std::span<const Extent> touched,
                                       const ContentCheckOptions& options, ContentBudget& budget, unsigned looks,
                                       GuestReach reach);

} // namespace cppvmm
