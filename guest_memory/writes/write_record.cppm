module;
#include <cstdint>
#include <expected>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:write_record;
import :address;
import :descriptor;
import :error;
import :memory_id;
import :region;
import :write_watch;

namespace cppvmm {

/// Watches one region through its page tables: userfaultfd's asynchronous write protection (Linux 6.7).
class WriteWatch {
public:
  /// Protects the pages that `protect` lists, from the region's start: those that exist. (Of others the watch proves
  /// nothing, which evidence does for them, and they would cost page tables.)
  [[nodiscard]] static MemoryResult<std::unique_ptr<WriteWatch>> arm(const Region& region,
                                                                     std::span<const Extent> protect);
  ~WriteWatch() { end(); }
  WriteWatch(const WriteWatch&) = delete;
  WriteWatch& operator=(const WriteWatch&) = delete;

  [[nodiscard]] const Region& region() const { return region_; }
  /// Pages that may hold data since before the watch: set once, before anyone asks for `may_hold_data`.
  void set_baseline(ExtentList data) { baseline_ = std::move(data); }
  /// Ends it now, whoever has it still: the memory may be watched anew. Waits for a call of `may_hold_data` or
  /// `forget`, and for the survey whose turn it is to register memory.
  void end();
  /// The baseline, and every page that was not seen to be unwritten since. unavailable when it was ended.
  [[nodiscard]] MemoryResult<std::vector<ExtentList>> may_hold_data() const;
  /// Takes the protection off pages of the region that were discarded: of hugetlb memory it outlives them, as an entry
  /// that evidence takes for a page. They count as written from then on.
  void forget(PageRange pages) const;

private:
  WriteWatch(Region region, Descriptor descriptor)
      : region_(std::move(region)), descriptor_(std::move(descriptor)), memory_(memory_id()) {}

  Region region_;
  mutable std::shared_mutex ending_; // Held by whoever uses the next two.
  Descriptor descriptor_;
  bool is_registered_ = false;
  std::uint64_t memory_; // which it is of
  ExtentList baseline_;
};

/// Pages of one region that were written since a log began: by whom the log is of, and by the accessors. Used by one
/// thread at a time.
class WriteRecord {
public:
  /// The accessors' writes are recorded from here on, as long as the object lives.
  [[nodiscard]] static MemoryResult<std::unique_ptr<WriteRecord>> begin(const Region& region);
  ~WriteRecord();
  WriteRecord(const WriteRecord&) = delete;
  WriteRecord& operator=(const WriteRecord&) = delete;

  [[nodiscard]] const Region& region() const { return region_; }
  void set_baseline(ExtentList data) { baseline_ = std::move(data); }
  /// Brings the log up to date.
  [[nodiscard]] MemoryResult<void> collect(const WriteLog& log);

  /// Pages that are in the log, and pages that the accessors wrote.
  [[nodiscard]] ExtentList logged() const;
  [[nodiscard]] ExtentList recorded() const;
  [[nodiscard]] const ExtentList& baseline() const { return baseline_; }

private:
  explicit WriteRecord(Region region) : region_(std::move(region)) {}

  Region region_;
  bool is_recording_ = false;
  std::vector<std::uint64_t> logged_;
  ExtentList baseline_;
  std::optional<MemoryError> broken_;
};

/// A log, and the record of each region that was there when it began.
struct KeptLog {
  WriteLog log;
  bool is_complete = false;
  std::mutex mutex; // of the records
  std::vector<std::unique_ptr<WriteRecord>> records;
};

/// All that is known of writes at a moment.
struct WriteKnowledge {
  std::vector<std::shared_ptr<WriteWatch>> watches;
  std::shared_ptr<KeptLog> log;
  /// Held by whoever looks at content: memory has one watch at a time.
  std::shared_ptr<std::timed_mutex> content_checks = std::make_shared<std::timed_mutex>();
};

} // namespace cppvmm
