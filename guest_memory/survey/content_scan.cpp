module;
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <sys/mman.h>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:content_scan.impl;
import :address;
import :book_files;
import :content_check;
import :content_scan;
import :error;
import :evidence;
import :guest_copy;
import :page_evidence;
import :region;
import :survey_stop;
import :unmap;
import :zero_scan;

// What may be read without bringing anything in is looked up right before, 2 MiB at a time:
// - A page with a present entry in own page tables is read through the mapping.
// - Another page of a memfd is read with pread(2) if mincore(2) finds it in the page cache, whoever put it there. That
//   allocates nothing in a hole, leaves own page tables alone, and meets a page that broke (memory failure) with an
//   error where a load would be met with SIGBUS. Swapped-out pages are not in the page cache.
// - Of hugetlb files, which are never swapped and of which mincore looks at own page tables only, all other pages are
//   read with pread.
// - Shared anonymous memory has no descriptor: what is in the page cache is read through the mapping, but for pages
//   that have an entry which is not present. They may be broken, and mincore calls those resident; but for markers of
//   write protection, which no broken page has.
// - Of files on disks no other page is read, cached or not: it can make the kernel read ahead.
// What is read through the mapping of adopted memory is copied by the kernel, if no FaultGuard is installed: between
// the look and the read, an embedder may take it away.
//
// Results go to a bitmap, a bit for each page found zero, because a guest decides how scattered they are. Threads take
// blocks of pages that share no word of it.

namespace cppvmm {

using Clock = std::chrono::steady_clock;

static constexpr std::uint64_t block_pages = 2048; // 8 MiB: what a thread takes at a time; whole words of the bitmap
static constexpr std::uint64_t window_pages = 512; // 2 MiB: what is looked up at a time
static constexpr std::uint64_t bounce_pages = 16;  // what is copied at a time
static constexpr std::uint64_t word_bits = 64;
static_assert(block_pages % window_pages == 0 && window_pages % word_bits == 0);

ContentBudget::ContentBudget(const ContentCheckOptions& options, const SurveyStop* stop)
    : pages_left_(options.max_bytes / page_size), max_time_(options.max_time), begin_(Clock::now()), stop_(stop) {}

bool ContentBudget::is_spent() const {
  return pages_left_.load(std::memory_order_relaxed) == 0 || Clock::now() - begin_ >= max_time_ ||
         (stop_ != nullptr && stop_->is_set());
}

std::uint64_t ContentBudget::take(std::uint64_t pages) {
  std::uint64_t left = pages_left_.load(std::memory_order_relaxed);
  while (!pages_left_.compare_exchange_weak(left, left - std::min(left, pages), std::memory_order_relaxed)) {
  }
  return std::min(left, pages);
}

static MemoryError os_error(const char* operation, const FileMapping& mapping, std::uint64_t page, std::uint64_t pages,
                            int number) {
  return MemoryError{.code = MemoryErrc::os,
                     .address = reinterpret_cast<std::uintptr_t>(mapping.host) + page * page_size,
                     .length = pages * page_size,
                     .os_error = number,
                     .operation = operation};
}

/// How pages that own page tables do not have are found and read.
enum class OtherPages : std::uint8_t {
  none,           ///< Not at all: private memory has none, and of files on disks none is read.
  by_mapping,     ///< In the page cache, through the mapping.
  by_descriptor,  ///< In the page cache, through the descriptor.
  all_descriptor, ///< All, through the descriptor.
};

static OtherPages other_pages(Backing backing) {
  switch (backing) {
  case Backing::memfd:
    return OtherPages::by_descriptor;
  case Backing::shared_anonymous:
    return OtherPages::by_mapping;
  case Backing::hugetlb_memfd:
    return OtherPages::all_descriptor;
  default:
    return OtherPages::none;
  }
}

/// Of shared memory: whether this entry may be that of a page which a memory error took.
static bool may_be_broken(std::uint64_t entry) {
  return (entry & pagemap_swapped) != 0 && (entry & pagemap_write_protected) == 0;
}

/// What to do with a page of a window.
enum class ReadPlan : std::uint8_t { skip, absent, by_mapping, by_kernel, by_descriptor };

/// What a thread works with, made before it begins: threads allocate nothing.
struct ContentWorker {
  std::array<std::uint64_t, window_pages> entries;
  std::array<unsigned char, window_pages> resident;
  std::array<ReadPlan, window_pages> plan;
  alignas(page_size) std::array<std::byte, bounce_pages * page_size> bounce;
  std::uint64_t checked = 0;
  std::uint64_t zero = 0;
  std::uint64_t absent = 0;
  std::optional<MemoryError> error;
};

/// Part of what is to be read: `block_pages` pages from a multiple of these on.
struct ContentBlock {
  std::uint64_t largest_extent; ///< Pages of the largest extent that reaches into it.
  std::uint64_t first;
  std::size_t extent; ///< The first that reaches into it.
};

static std::vector<ContentBlock> blocks_of(std::span<const Extent> touched) {
  std::vector<ContentBlock> blocks;
  for (std::size_t i = 0; i < touched.size(); ++i) {
    const Extent& extent = touched[i];
    for (std::uint64_t first = extent.first / block_pages * block_pages; first < extent.end(); first += block_pages) {
      if (!blocks.empty() && blocks.back().first == first)
        blocks.back().largest_extent = std::max(blocks.back().largest_extent, extent.count);
      else
        blocks.push_back({.largest_extent = extent.count, .first = first, .extent = i});
    }
  }
  // A budget that does not suffice goes where most is to be found.
  std::ranges::sort(blocks, {},
                    [](const ContentBlock& block) { return std::tuple(~block.largest_extent, block.first); });
  return blocks;
}

/// A bit for each page of a region. Takes memory only for the parts that were written to.
class ZeroPages {
public:
  explicit ZeroPages(std::uint64_t pages)
      : bytes_((pages + word_bits - 1) / word_bits * sizeof(std::uint64_t)),
        words_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ZeroPages(const ZeroPages&) = delete;
  ZeroPages& operator=(const ZeroPages&) = delete;
  ~ZeroPages() {
    if (is_mapped()) unmap(words_, bytes_);
  }

  [[nodiscard]] bool is_mapped() const { return words_ != MAP_FAILED; }
  void add(std::uint64_t page) { words()[page / word_bits] |= std::uint64_t{1} << page % word_bits; }

  /// Adds the pages of `extent` that are not in here.
  void add_others(Extent extent, ExtentList& list) const {
    for (std::uint64_t page = extent.first; page < extent.end();) {
      const std::uint64_t bits = words()[page / word_bits] >> page % word_bits;
      const std::uint64_t left = std::min(extent.end() - page, word_bits - page % word_bits);
      const auto others = std::min<std::uint64_t>(left, static_cast<unsigned>(std::countr_zero(bits)));
      const auto zeros = std::min<std::uint64_t>(left, static_cast<unsigned>(std::countr_one(bits)));
      if (others > 0) list.add({page, others});
      page += others + zeros; // one of them is none
    }
  }

private:
  [[nodiscard]] std::uint64_t* words() const { return static_cast<std::uint64_t*>(words_); }

  std::size_t bytes_;
  void* words_;
};

/// The work itself, which any number of threads do together, each with a worker of its own.
class ContentWork {
public:
  ContentWork(const FileMapping& mapping, OtherPages others, int pagemap, std::span<const Extent> touched,
              ZeroScan zero_scan, unsigned looks, GuestReach reach, ContentBudget& budget, ZeroPages& zero_pages)
      : mapping_(mapping), others_(others), pagemap_(pagemap), touched_(touched), zero_scan_(zero_scan), looks_(looks),
        in_mapping_(reach == GuestReach::kernel ? ReadPlan::by_kernel : ReadPlan::by_mapping), budget_(budget),
        zero_pages_(zero_pages), blocks_(blocks_of(touched)) {}

  [[nodiscard]] std::size_t blocks() const { return blocks_.size(); }

  /// Until nothing is left to do, or the budget is spent.
  void work(ContentWorker& worker) {
    for (;;) {
      const std::size_t next = next_.fetch_add(1, std::memory_order_relaxed);
      if (next >= blocks_.size()) return;
      std::size_t extent = blocks_[next].extent;
      for (std::uint64_t at = 0; at < block_pages; at += window_pages)
        if (!check_window(worker, blocks_[next].first + at, extent)) return;
    }
  }

private:
  /// The touched pages among `window_pages` from `first` on; false when the budget is spent. `extent` advances.
  bool check_window(ContentWorker& worker, std::uint64_t first, std::size_t& extent) {
    const std::uint64_t end = first + window_pages;
    while (extent < touched_.size() && touched_[extent].end() <= first)
      ++extent;
    if (extent == touched_.size() || touched_[extent].first >= end) return true;
    if (budget_.is_spent()) return false;

    // From the first touched page of the window to the last.
    const std::uint64_t from = std::max(first, touched_[extent].first);
    std::uint64_t to = from;
    worker.plan.fill(ReadPlan::skip);
    for (std::size_t i = extent; i < touched_.size() && touched_[i].first < end; ++i) {
      const std::uint64_t begin = std::max(first, touched_[i].first);
      to = std::min(end, touched_[i].end());
      std::fill(worker.plan.begin() + static_cast<std::ptrdiff_t>(begin - from),
                worker.plan.begin() + static_cast<std::ptrdiff_t>(to - from), ReadPlan::absent);
    }
    look(worker, from, to - from);

    const auto plan = std::span(worker.plan).first(to - from);
    const auto readable = static_cast<std::uint64_t>(
        std::ranges::count_if(plan, [](ReadPlan page) { return page != ReadPlan::skip && page != ReadPlan::absent; }));
    worker.absent += static_cast<std::uint64_t>(std::ranges::count(plan, ReadPlan::absent));
    const std::uint64_t granted = budget_.take(readable);
    read(worker, from, plan, granted);
    return granted == readable;
  }

  /// Plans how to read those of the pages that are to be read and may be.
  void look(ContentWorker& worker, std::uint64_t page, std::uint64_t count) const {
    if (!read_entries(worker, page, count)) return;
    bool all_mapped = true;
    for (std::uint64_t i = 0; i < count; ++i) {
      if (worker.plan[i] == ReadPlan::skip) continue;
      if ((worker.entries[i] & (pagemap_present | pagemap_swapped)) == pagemap_present)
        worker.plan[i] = in_mapping_;
      else if (others_ == OtherPages::all_descriptor)
        worker.plan[i] = ReadPlan::by_descriptor;
      else
        all_mapped = false;
    }
    if (all_mapped || others_ == OtherPages::none) return;
    auto* const host = static_cast<std::byte*>(const_cast<void*>(mapping_.host)) + page * page_size;
    if (mincore(host, count * page_size, worker.resident.data()) != 0) {
      fail(worker, os_error("mincore", mapping_, page, count, errno));
      return;
    }
    const ReadPlan resident = others_ == OtherPages::by_mapping ? in_mapping_ : ReadPlan::by_descriptor;
    for (std::uint64_t i = 0; i < count; ++i)
      if (worker.plan[i] == ReadPlan::absent && (worker.resident[i] & 1) != 0 &&
          (resident == ReadPlan::by_descriptor || !may_be_broken(worker.entries[i])))
        worker.plan[i] = resident;
  }

  bool read_entries(ContentWorker& worker, std::uint64_t page, std::uint64_t count) const {
    const auto host_page = reinterpret_cast<std::uintptr_t>(mapping_.host) / page_size + page;
    const int error = read_pagemap(pagemap_, host_page * page_size, std::span(worker.entries).first(count));
    if (error != 0) fail(worker, os_error("read /proc/self/pagemap", mapping_, page, count, error));
    return error == 0;
  }

  /// Reads as many of the planned pages as were granted.
  void read(ContentWorker& worker, std::uint64_t page, std::span<const ReadPlan> plan, std::uint64_t granted) {
    for (std::uint64_t i = 0; i < plan.size() && granted > 0;) {
      if (plan[i] == ReadPlan::skip || plan[i] == ReadPlan::absent) {
        ++i;
      } else if (plan[i] == ReadPlan::by_mapping) {
        read_mapping(worker, page + i);
        --granted;
        ++i;
      } else {
        const auto rest = plan.subspan(i);
        const auto run_end = std::ranges::find_if(rest, [&](ReadPlan each) { return each != plan[i]; });
        const auto run = static_cast<std::uint64_t>(run_end - rest.begin());
        const std::uint64_t done = read_copies(worker, plan[i], page + i, std::min({run, granted, bounce_pages}));
        granted -= done;
        i += done;
      }
    }
  }

  void read_mapping(ContentWorker& worker, std::uint64_t page) {
    const auto* const host = static_cast<const std::byte*>(mapping_.host) + page * page_size;
    PageContent content = PageContent::zero;
    for (unsigned look = 0; look < looks_ && content == PageContent::zero; ++look)
      content = content_of_page(zero_scan_, host);
    if (content == PageContent::inaccessible) {
      std::byte byte{};
      const int error = copy_from_guest(GuestReach::plain, &byte, host, 1).error; // which says why
      fail_to_access(worker, page, 1, error != 0 ? error : EFAULT);
      ++worker.absent;
      return;
    }
    ++worker.checked;
    if (content == PageContent::zero) found_zero(worker, page);
  }

  /// Reads some pages, at least one, by copies of them, in as many passes; how many.
  std::uint64_t read_copies(ContentWorker& worker, ReadPlan plan, std::uint64_t page, std::uint64_t count) {
    std::array<bool, bounce_pages> zero{};
    const auto copy = [&](std::uint64_t pages) {
      return plan == ReadPlan::by_kernel ? copy_mapping(worker, page, pages) : read_file(worker, page, pages);
    };
    std::uint64_t pages = copy(count);
    worker.checked += pages;
    if (pages == 0) {
      ++worker.absent;
      return 1;
    }
    const std::uint64_t once = pages;
    std::fill_n(zero.begin(), once, true);
    for (unsigned pass = 1;; ++pass) {
      for (std::uint64_t i = 0; i < once; ++i)
        zero[i] = zero[i] && i < pages &&
                  content_of_page(zero_scan_, worker.bounce.data() + i * page_size) == PageContent::zero;
      if (pass == 2 * looks_ || std::ranges::find(zero, true) == zero.end()) break;
      pages = copy(once);
    }
    for (std::uint64_t i = 0; i < once; ++i)
      if (zero[i]) found_zero(worker, page + i);
    return once;
  }

  /// How many whole pages could be copied.
  std::uint64_t copy_mapping(ContentWorker& worker, std::uint64_t page, std::uint64_t count) const {
    const auto* const host = static_cast<const std::byte*>(mapping_.host) + page * page_size;
    const GuestAccess copied = copy_from_guest(GuestReach::kernel, worker.bounce.data(), host, count * page_size);
    const std::uint64_t pages = copied.done / page_size;
    if (copied.error != 0) fail_to_access(worker, page + pages, count - pages, copied.error);
    return pages;
  }

  void fail_to_access(ContentWorker& worker, std::uint64_t page, std::uint64_t count, int number) const {
    MemoryError error = os_error("read guest memory", mapping_, page, count, number);
    error.code = GuestAccess{.error = number}.code();
    fail(worker, error);
  }

  /// How many whole pages could be read.
  std::uint64_t read_file(ContentWorker& worker, std::uint64_t page, std::uint64_t count) const {
    const std::size_t wanted = count * page_size;
    std::size_t done = 0;
    while (done < wanted) {
      const auto offset = static_cast<off_t>(mapping_.offset + page * page_size + done);
      const ssize_t got = pread(mapping_.fd, worker.bounce.data() + done, wanted - done, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(worker, os_error("pread of guest memory", mapping_, page, count, errno));
      if (got <= 0) break;
      done += static_cast<std::size_t>(got);
    }
    return done / page_size;
  }

  void found_zero(ContentWorker& worker, std::uint64_t page) {
    ++worker.zero;
    zero_pages_.add(page);
  }

  static void fail(ContentWorker& worker, const MemoryError& error) {
    if (!worker.error) worker.error = error;
  }

  const FileMapping& mapping_;
  OtherPages others_;
  int pagemap_;
  std::span<const Extent> touched_;
  ZeroScan zero_scan_;
  unsigned looks_;
  ReadPlan in_mapping_;
  ContentBudget& budget_;
  ZeroPages& zero_pages_;
  std::vector<ContentBlock> blocks_;
  std::atomic<std::size_t> next_ = 0;
};

/// Lets tasks in until it is closed. Tasks own it together with the caller, who owns everything else.
class ContentGate {
public:
  ContentGate(ContentWork& scan, std::span<const std::unique_ptr<ContentWorker>> workers)
      : scan_(&scan), workers_(workers) {}

  /// A task's work; nothing once the gate is closed.
  void run() {
    ContentWorker* worker = nullptr;
    {
      const std::lock_guard lock(mutex_);
      if (scan_ == nullptr || begun_ == workers_.size()) return;
      worker = workers_[begun_++].get();
      ++inside_;
    }
    // Stays valid: close() waits for who is inside.
    scan_->work(*worker);
    const std::lock_guard lock(mutex_);
    if (--inside_ == 0) empty_.notify_all();
  }

  /// Waits for the tasks that have begun.
  void close() {
    std::unique_lock lock(mutex_);
    begun_ = workers_.size();
    empty_.wait(lock, [&] { return inside_ == 0; });
    scan_ = nullptr;
  }

private:
  std::mutex mutex_;
  std::condition_variable empty_;
  ContentWork* scan_;
  std::span<const std::unique_ptr<ContentWorker>> workers_;
  std::size_t begun_ = 0;
  std::size_t inside_ = 0;
};

static std::size_t tasks_wanted(const ContentCheckOptions& options, std::size_t blocks) {
  if (!options.executor || blocks < 2) return 0;
  const std::size_t machine = std::max(std::thread::hardware_concurrency(), 1U) - 1U;
  return std::min<std::size_t>(options.parallel_tasks > 0 ? options.parallel_tasks : machine, blocks - 1);
}

/// The scan by this thread and by as many tasks as the executor gets to.
static std::vector<std::unique_ptr<ContentWorker>> run(ContentWork& scan, const ContentCheckOptions& options) {
  const std::size_t tasks = tasks_wanted(options, scan.blocks());
  std::vector<std::unique_ptr<ContentWorker>> workers;
  for (std::size_t i = 0; i <= tasks; ++i)
    workers.push_back(std::make_unique_for_overwrite<ContentWorker>());
  if (tasks == 0) {
    scan.work(*workers.front());
    return workers;
  }
  const auto gate = std::make_shared<ContentGate>(scan, std::span(workers).subspan(1));
  for (std::size_t i = 0; i < tasks; ++i) {
    try {
      options.executor([gate] { gate->run(); });
    } catch (...) { // NOLINT(bugprone-empty-catch): it did not take the task, and this thread does the work
    }
  }
  scan.work(*workers.front());
  gate->close();
  return workers;
}

ContentScan scan_content(const FileMapping& mapping, Backing backing, std::span<const Extent> touched,
                         const ContentCheckOptions& options, ContentBudget& budget, unsigned looks, GuestReach reach) {
  const auto begin = Clock::now();
  ContentScan result;
  ContentCheckReport& report = result.report;
  std::uint64_t pages = 0;
  for (const Extent& extent : touched)
    pages += extent.count;
  const auto without_looking = [&] {
    for (const Extent& extent : touched)
      result.touched.add(extent);
    report.absent_pages = pages;
    report.cost = Clock::now() - begin;
  };
  if (backing == Backing::unknown || touched.empty()) {
    without_looking();
    return result;
  }
  ZeroPages zero_pages(mapping.bytes / page_size);
  if (!zero_pages.is_mapped()) {
    report.error = os_error("mmap for the results of a content check", mapping, 0, mapping.bytes / page_size, errno);
    without_looking();
    return result;
  }
  const BookFile pagemap = open_page_tables();
  if (!pagemap.is_open()) {
    report.error = os_error("open /proc/self/pagemap", mapping, 0, mapping.bytes / page_size, errno);
    without_looking();
    return result;
  }
  ContentWork scan(mapping, other_pages(backing), pagemap.number(), touched, resolve(options.scan), looks, reach,
                   budget, zero_pages);
  const auto workers = run(scan, options);

  for (const auto& worker : workers) {
    report.checked_pages += worker->checked;
    report.zero_pages += worker->zero;
    report.absent_pages += worker->absent;
    if (!report.error) report.error = worker->error;
  }
  report.unchecked_pages = pages - report.checked_pages - report.absent_pages;
  for (const Extent& extent : touched)
    zero_pages.add_others(extent, result.touched);
  report.cost = Clock::now() - begin;
  return result;
}

} // namespace cppvmm
