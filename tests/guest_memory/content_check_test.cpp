#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fcntl.h>
#include <functional>
#include <gtest/gtest.h>
#include <latch>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/huge_pages_test.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"

import cppvmm.guest_memory;

// The look at the content of touched pages: finds those that read zero, and brings nothing in.

using namespace cppvmm;

namespace {

using test::cached_pages;
using test::swapped_pages;
using test::SwapSpace;

class HugetlbContent : public test::HugePagesTest {};

const char* const no_watch = "this kernel has no asynchronous write protection";

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t huge = 2 * mib;
constexpr std::uint64_t first_page = 0x100;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

/// All content is read by `options`; the way to the books is the newest.
SurveyOptions with(ContentCheckOptions options = {}, EvidenceSource source = EvidenceSource::automatic) {
  return {.leave_out = {}, .source = source, .content_check = std::move(options)};
}

void store(const Region& region, std::uint64_t page, std::uint64_t offset = 0, char value = 1) {
  static_cast<volatile char*>(region.host_address())[page * page_size + offset] = value;
}

/// The pages of a region of whose number, from its start, `wanted` is true, by guest-physical number.
PageSet those(const Region& region, const std::function<bool(std::uint64_t)>& wanted) {
  PageSet result;
  for (std::uint64_t page = 0; page < region.pages().count(); ++page)
    if (wanted(page)) result.add(pages(region.pages().first().value() + page, 1));
  return result;
}

Region small_pages(std::uint64_t bytes, bool is_memfd = false) {
  const GuestAddress start(first_page * page_size);
  Region region = is_memfd ? *Region::memfd(start, bytes) : *Region::anonymous(start, bytes);
  madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
  return region;
}

/// Threads that run tasks until they are told to stop.
class ThreadPool {
public:
  explicit ThreadPool(unsigned count) {
    for (unsigned i = 0; i < count; ++i)
      threads_.emplace_back([this](const std::stop_token& stop) {
        for (;;) {
          std::unique_lock lock(mutex_);
          if (!wake_.wait(lock, stop, [this] { return !tasks_.empty(); })) return;
          const auto task = std::move(tasks_.back());
          tasks_.pop_back();
          lock.unlock();
          task();
        }
      });
  }

  void post(std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    wake_.notify_one();
  }

private:
  std::mutex mutex_;
  std::condition_variable_any wake_;
  std::vector<std::function<void()>> tasks_;
  std::vector<std::jthread> threads_; // last, so that they end first
};

// --- What is found ---

class ContentScanBy : public testing::TestWithParam<ZeroScan> {
protected:
  void SetUp() override {
    if (!is_supported(GetParam())) GTEST_SKIP() << "this machine has no " << to_string(GetParam());
  }
};

TEST_P(ContentScanBy, SeesAByteWhereverItIs) {
  // Page 2n has one byte set, at n; page 2n + 1 is zero.
  const Region region = small_pages(2 * page_size * page_size);
  for (std::uint64_t position = 0; position < page_size; ++position) {
    store(region, 2 * position, position, static_cast<char>(1 << position % 8));
    store(region, 2 * position + 1, position, 0);
  }
  const GuestMemory memory(*MemoryMap::make({region}));
  const Survey survey = memory.survey(with({.scan = GetParam()}));
  EXPECT_EQ(survey.regions[0].touched_pages, 2 * page_size);
  EXPECT_EQ(survey.zeroed(), those(region, [](std::uint64_t page) { return page % 2 == 1; }));
  ASSERT_TRUE(survey.regions[0].content);
  EXPECT_EQ(survey.regions[0].content->checked_pages, 2 * page_size);
  EXPECT_EQ(survey.regions[0].content->zero_pages, page_size);
}

TEST_P(ContentScanBy, SeesEveryBitOfAWord) {
  const Region region = small_pages(64 * page_size);
  for (std::uint64_t bit = 0; bit < 64; ++bit)
    store(region, bit, 1000 + bit / 8, static_cast<char>(1 << bit % 8));
  const GuestMemory memory(*MemoryMap::make({region}));
  EXPECT_TRUE(memory.survey(with({.scan = GetParam()})).zeroed().empty());
}

INSTANTIATE_TEST_SUITE_P(All, ContentScanBy,
                         testing::Values(ZeroScan::automatic, ZeroScan::portable, ZeroScan::avx2, ZeroScan::avx512),
                         [](const auto& each) { return std::string(to_string(each.param)); });

/// Pages that hold data, that were written with zeros, and that nobody touched, at random; compared with what is found.
void find_zeros_among_data(const Region& region, const std::function<void(std::uint64_t, char)>& write_elsewhere = {}) {
  const GuestMemory memory(*MemoryMap::make({region}));
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  ThreadPool pool(2);
  const TaskExecutor post = [&pool](auto task) { pool.post(std::move(task)); };
  std::vector<bool> data(region.pages().count());
  std::vector<bool> zeros(data.size());
  for (int round = 0; round < 4; ++round) {
    for (int writes = 0; writes < 2000; ++writes) {
      const std::uint64_t page = random() % data.size();
      const std::uint64_t run = random() % 8 == 0 ? random() % 128 : 1;
      const bool is_zero = random() % 2 == 0;
      const bool is_elsewhere = write_elsewhere && random() % 4 == 0;
      for (std::uint64_t at = page; at < std::min<std::uint64_t>(page + run, data.size()); ++at) {
        if (data[at]) continue;
        const std::uint64_t offset = random() % page_size;
        if (is_elsewhere)
          write_elsewhere(at * page_size + offset, is_zero ? 0 : 1);
        else
          store(region, at, offset, is_zero ? 0 : 1);
        (is_zero ? zeros : data)[at] = true;
      }
    }
    const auto holds_data = those(region, [&](std::uint64_t page) { return data[page]; });
    const auto is_known = those(region, [&](std::uint64_t page) { return zeros[page] && !data[page]; });
    for (const auto source : {EvidenceSource::automatic, EvidenceSource::legacy}) {
      for (const auto& executor : {TaskExecutor(), post}) {
        const Survey survey = memory.survey(with({.executor = executor, .parallel_tasks = 2}, source));
        const RegionSurvey& report = survey.regions[0];
        PageSet wrong = survey.zeroed();
        wrong.intersect(holds_data);
        EXPECT_TRUE(wrong.empty());
        PageSet missed = is_known;
        missed.remove(survey.zeroed());
        EXPECT_TRUE(missed.empty());
        PageSet all(region.pages());
        all.remove(holds_data);
        if (report.evidence != Evidence::none) EXPECT_EQ(survey.zeroed(), all);
        ASSERT_TRUE(report.content);
        EXPECT_FALSE(report.content->error) << report.content->error->message();
        EXPECT_EQ(report.content->checked_pages + report.content->absent_pages, report.touched_pages);
        EXPECT_EQ(report.content->unchecked_pages, 0U);
      }
    }
  }
}

constexpr std::uint64_t random_bytes = 20 * mib;

TEST(ContentCheck, FindsZerosInAnonymousMemory) { find_zeros_among_data(small_pages(random_bytes)); }

TEST(ContentCheck, FindsZerosInHugePagesOfAnonymousMemory) {
  const Region region = *Region::anonymous(GuestAddress(first_page * page_size), random_bytes);
  madvise(region.host_address(), random_bytes, MADV_HUGEPAGE);
  find_zeros_among_data(region);
}

TEST(ContentCheck, FindsZerosInAMemfdThatOthersWrite) {
  const Region region = small_pages(random_bytes, true);
  find_zeros_among_data(region, [&](std::uint64_t at, char value) {
    ASSERT_EQ(pwrite(region.file_descriptor(), &value, 1, static_cast<off_t>(at)), 1);
  });
}

TEST(ContentCheck, FindsZerosInSharedAnonymousMemory) {
  void* host = mmap(nullptr, random_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(host, MAP_FAILED);
  {
    const auto region = Region::adopt(GuestAddress(mib), {host, random_bytes, Backing::shared_anonymous});
    ASSERT_TRUE(region) << region.error().message();
    find_zeros_among_data(*region);
  }
  munmap(host, random_bytes);
}

TEST_F(HugetlbContent, HaveTheirZerosFoundByContent) {
  find_zeros_among_data(*Region::hugetlb(GuestAddress(0), 8 * huge, HugePageSize::two_mib));
}

TEST_F(HugetlbContent, IsWatchedThoughOnlyPartsOfHugePagesAreLookedAt) {
  const Region region = *Region::hugetlb(GuestAddress(0), 2 * huge, HugePageSize::two_mib);
  ASSERT_TRUE(region.populate());
  GuestMemory memory(*MemoryMap::make({region}));
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << no_watch;
  EXPECT_TRUE(memory.survey(with()).regions[0].content->is_watched);
  ASSERT_TRUE(memory.begin_write_log({.collect = [](PageRange, std::span<std::uint64_t> bitmap) -> MemoryResult<void> {
                                       bitmap[0] |= 2;
                                       return {};
                                     }},
                                     {.complete = true}));
  const Survey survey = memory.survey(with());
  EXPECT_EQ(survey.regions[0].content->checked_pages, 1U);
  EXPECT_TRUE(survey.regions[0].content->is_watched);
}

TEST_F(HugetlbContent, OfAFileHaveTheirZerosFoundWhoeverWroteThem) {
  const Region region = *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  store(region, 3);
  const pid_t child = fork();
  if (child == 0) {
    void* view = mmap(nullptr, 8 * huge, PROT_READ | PROT_WRITE, MAP_SHARED, region.file_descriptor(), 0);
    if (view == MAP_FAILED) _exit(1);
    static_cast<volatile char*>(view)[5 * huge + 7 * page_size + 9] = 1;
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  const Survey survey = memory.survey(with());
  EXPECT_EQ(survey.touched, those(region, [](std::uint64_t page) { return page == 3 || page == 5 * 512 + 7; }));
  EXPECT_EQ(survey.regions[0].content->checked_pages, 2 * 512U);
  EXPECT_EQ(*region.resident_bytes(), 2 * huge); // and nothing allocated
}

/// A file on whatever disk this machine has its build folder on.
class ContentOfAFile : public testing::Test {
protected:
  static constexpr std::uint64_t bytes = 4 * mib;

  void SetUp() override {
    std::string name = "content-XXXXXX";
    fd = mkstemp(name.data());
    ASSERT_GE(fd, 0);
    unlink(name.c_str());
    ASSERT_EQ(ftruncate(fd, bytes), 0);
    facts = test::file_facts(fd);
    ASSERT_TRUE(facts.can_be_made);
    if (!facts.tell_the_truth()) GTEST_SKIP() << "nothing can be proven of files here";
    // Data that nobody reads, and zeros that were written.
    for (off_t page = 16; page < 32; ++page) {
      const char value = page < 24 ? 1 : 0;
      ASSERT_EQ(pwrite(fd, &value, 1, page * static_cast<off_t>(page_size)), 1);
    }
    ASSERT_EQ(fsync(fd), 0);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  }
  void TearDown() override { close(fd); }

  int fd = -1;
  test::FileFacts facts;
};

TEST_F(ContentOfAFile, PrivateCopiesAreReadAndTheRestOfTheFileIsNot) {
  const auto region = Region::private_file(GuestAddress(0), bytes, fd, 0);
  ASSERT_TRUE(region) << region.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  for (std::uint64_t page = 100; page < 120; ++page)
    store(*region, page, 5, page < 110 ? 0 : 1);
  const auto before = *region->resident_bytes();
  const Survey survey = memory.survey(with());
  ASSERT_FALSE(survey.regions[0].error) << survey.regions[0].error->message();
  ASSERT_TRUE(survey.regions[0].content);
  EXPECT_EQ(survey.regions[0].content->checked_pages, 20U);
  EXPECT_EQ(survey.regions[0].content->zero_pages, 10U);
  EXPECT_EQ(survey.regions[0].content->absent_pages, survey.regions[0].touched_pages - 20);
  EXPECT_EQ(*region->resident_bytes(), before);
  EXPECT_TRUE(survey.zeroed().contains(pages(100, 10)));
  EXPECT_FALSE(survey.zeroed().intersects(pages(110, 10)));
  EXPECT_FALSE(survey.zeroed().intersects(pages(16, 8)));
}

TEST_F(ContentOfAFile, SharedPagesAreReadOnlyIfTheyAreMappedHere) {
  void* host = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(host, MAP_FAILED);
  const auto region = Region::adopt(GuestAddress(0), {host, bytes, Backing::shared_file, fd, 0});
  if (facts.in_memory) {
    EXPECT_EQ(region.error().code, MemoryErrc::wrong_nature) << "which is a memfd's kind of file";
    munmap(host, bytes);
    return;
  }
  ASSERT_TRUE(region) << region.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  ASSERT_EQ(madvise(host, bytes, MADV_RANDOM), 0); // or the kernel is still reading when the survey begins
  // Written here, and by another way: in the page cache too, but reading it there would make the kernel read ahead.
  for (std::uint64_t page = 100; page < 120; ++page)
    store(*region, page, 5, page < 110 ? 0 : 1);
  ASSERT_EQ(pwrite(fd, "", 1, 200 * page_size), 1);
  const auto before = cached_pages(host, bytes);
  // Without evidence, all of it is looked at.
  const Survey survey = memory.survey(with({}, EvidenceSource::legacy));
  EXPECT_EQ(cached_pages(host, bytes), before);
  EXPECT_EQ(survey.regions[0].touched_pages, bytes / page_size);
  EXPECT_EQ(survey.zeroed(), PageSet(pages(100, 10)));
  munmap(host, bytes);
}

TEST(ContentCheck, GivesTheRestOfAHugePageBack) {
  for (const bool is_memfd : {false, true}) {
    const Region region =
        is_memfd ? *Region::memfd(GuestAddress(0), 4 * huge) : *Region::anonymous(GuestAddress(0), 4 * huge);
    madvise(region.host_address(), region.bytes(), MADV_HUGEPAGE);
    store(region, 700, 123);
    if (test::huge_page_bytes(region.host_address()) == 0) {
      std::printf("no transparent huge pages here for %s\n", to_string(region.backing()));
      continue;
    }
    if (!is_memfd && !test::machine_facts().membarrier) {
      std::printf("membarrier is refused: huge pages of anonymous memory have no evidence\n");
      continue;
    }
    const GuestMemory memory(*MemoryMap::make({region}));
    EXPECT_EQ(memory.survey().touched.page_count(), 512U);
    EXPECT_EQ(memory.survey(with()).touched, PageSet(pages(700, 1)));
    EXPECT_EQ(*region.huge_page_bytes(), huge); // it is not split
  }
}

TEST(ContentCheck, GivesPopulatedMemoryBack) {
  for (const bool is_memfd : {false, true}) {
    const Region region = small_pages(16 * mib, is_memfd);
    for (std::uint64_t page = 0; page < region.pages().count(); ++page)
      store(region, page, 0, 0);
    const GuestMemory memory(*MemoryMap::make({region}));
    EXPECT_TRUE(memory.survey().zeroed().empty());
    const Survey survey = memory.survey(with());
    EXPECT_EQ(survey.zeroed(), PageSet(region.pages()));
    EXPECT_EQ(survey.regions[0].content->zero_pages, region.pages().count());
  }
}

TEST(ContentCheck, LeavesMarksAndWhatIsLeftOutAlone) {
  const Region region = small_pages(mib);
  for (std::uint64_t page = 0; page < 256; ++page)
    store(region, page, 0, 0);
  GuestMemory memory(*MemoryMap::make({region}));
  memory.mark_touched(pages(first_page + 5, 1), Toucher::device);
  SurveyOptions options = with();
  options.leave_out.add(pages(first_page + 9, 1));
  EXPECT_EQ(memory.survey(options).zeroed(), those(region, [](std::uint64_t page) { return page != 5 && page != 9; }));
}

TEST(ContentCheck, NeverReadsMemoryOfUnknownKind) {
  void* host = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  ASSERT_NE(host, MAP_FAILED);
  {
    const GuestMemory memory(*MemoryMap::make({*Region::adopt(GuestAddress(0), {host, mib, Backing::unknown})}));
    const Survey survey = memory.survey(with());
    EXPECT_TRUE(survey.zeroed().empty());
    EXPECT_FALSE(survey.regions[0].content);
  }
  munmap(host, mib);
}

TEST(ContentCheck, NeverReadsMemoryThatIsOfAnotherKindThanStated) {
  void* host = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(host, MAP_FAILED);
  {
    const GuestMemory memory(*MemoryMap::make({*Region::adopt(GuestAddress(0), {host, mib, Backing::anonymous})}));
    // Reading here would end the program.
    ASSERT_EQ(mprotect(static_cast<char*>(host) + mib / 2, mib / 2, PROT_NONE), 0);
    const Survey survey = memory.survey(with());
    EXPECT_TRUE(survey.zeroed().empty());
    EXPECT_FALSE(survey.regions[0].content);
  }
  munmap(host, mib);
}

// --- What is not brought in ---

TEST(ContentCheck, BringsNothingBackFromSwap) {
  const auto swap = SwapSpace::take();
  if (!swap) GTEST_SKIP() << swap.error();
  for (const bool is_memfd : {false, true}) {
    const Region region = small_pages(8 * mib, is_memfd);
    void* const host = region.host_address();
    // Zeros and data in turn, half of them swapped out.
    for (std::uint64_t page = 0; page < 2048; ++page)
      store(region, page, 9, page % 2 == 0 ? 0 : 1);
    const auto out = [&] {
      auto result = is_memfd ? cached_pages(host, region.bytes()) : swapped_pages(host, region.bytes());
      if (is_memfd) result.flip();
      return result;
    };
    // The kernel leaves alone what is on some CPU's list just now.
    for (int i = 0; i < 1000 && std::ranges::count(out(), true) < 1024; ++i)
      ASSERT_EQ(madvise(host, 4 * mib, MADV_PAGEOUT), 0);
    const auto before = out();
    const auto swapped = static_cast<std::uint64_t>(std::ranges::count(before, true));
    ASSERT_GT(swapped, 0U);

    const GuestMemory memory(*MemoryMap::make({region}));
    const Survey survey = memory.survey(with());
    const auto after = out();
    for (std::uint64_t page = 0; page < 2048; ++page)
      if (before[page]) EXPECT_TRUE(after[page]) << page;
    EXPECT_EQ(survey.zeroed(), those(region, [&](std::uint64_t page) { return page % 2 == 0 && !before[page]; }));
    EXPECT_EQ(survey.regions[0].touched_pages, 2048U);
    EXPECT_EQ(survey.regions[0].content->absent_pages, swapped);
    EXPECT_EQ(survey.regions[0].content->checked_pages, 2048 - swapped);
  }
}

TEST(ContentCheck, AllocatesNothingInHoles) {
  const Region region = small_pages(4 * mib, true);
  const int fd = region.file_descriptor();
  // Pages that were allocated and never written leave this way without evidence: all of the region is looked at.
  ASSERT_EQ(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, mib), 0);
  store(region, 600, 0, 0);
  store(region, 601, 0, 1);
  const GuestMemory memory(*MemoryMap::make({region}));
  const auto before = *region.resident_bytes();
  const auto cached = cached_pages(region.host_address(), region.bytes());
  const Survey survey = memory.survey(with({}, EvidenceSource::legacy));
  EXPECT_EQ(survey.regions[0].touched_pages, 1024U);
  EXPECT_TRUE(survey.zeroed().contains(PageNumber(first_page + 600)));
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(first_page + 601)));
  EXPECT_EQ(*region.resident_bytes(), before);
  EXPECT_EQ(cached_pages(region.host_address(), region.bytes()), cached);
  EXPECT_GE(survey.regions[0].content->absent_pages, 768U - 2U);
}

// --- Budgets ---

/// Zeros, written: 100 extents of 16 pages, one of 8 MiB, and 100 again.
Region scattered() {
  const Region region = small_pages(32 * mib);
  for (std::uint64_t extent = 0; extent < 100; ++extent)
    for (std::uint64_t page = 0; page < 16; ++page) {
      store(region, extent * 20 + page, 0, 0);
      store(region, 6144 + extent * 20 + page, 0, 0);
    }
  for (std::uint64_t page = 0; page < 2048; ++page)
    store(region, 3000 + page, 0, 0);
  return region;
}

TEST(ContentCheck, ReadsNoMoreThanItMayAndTheLargestExtentFirst) {
  const GuestMemory memory(*MemoryMap::make({scattered()}));
  constexpr std::uint64_t touched = 2 * 1600 + 2048;
  ThreadPool pool(2);
  for (const auto& executor : {TaskExecutor(), TaskExecutor([&pool](auto task) { pool.post(std::move(task)); })})
    for (const std::uint64_t budget : {0U, 1U, 700U, 2048U, 3000U, 10000U}) {
      const Survey survey =
          memory.survey(with({.executor = executor, .parallel_tasks = 2, .max_bytes = budget * page_size + 4095}));
      const auto& report = *survey.regions[0].content;
      EXPECT_EQ(report.checked_pages, std::min(budget, touched));
      EXPECT_EQ(report.zero_pages, report.checked_pages);
      EXPECT_EQ(report.unchecked_pages, touched - report.checked_pages);
      EXPECT_EQ(report.absent_pages, 0U);
      EXPECT_EQ(survey.touched.page_count(), report.unchecked_pages);
      PageSet large(pages(first_page + 3000, 2048));
      large.intersect(survey.zeroed());
      if (!executor) EXPECT_EQ(large.page_count(), std::min<std::uint64_t>(budget, 2048));
    }
}

TEST(ContentCheck, SharesItsBudgetAmongTheRegions) {
  const Region low = small_pages(mib);
  const Region high = *Region::anonymous(GuestAddress(64 * mib), mib);
  for (std::uint64_t page = 0; page < 256; ++page) {
    store(low, page, 0, 0);
    store(high, page, 0, 0);
  }
  const GuestMemory memory(*MemoryMap::make({low, high}));
  const Survey survey = memory.survey(with({.max_bytes = 300 * page_size}));
  EXPECT_EQ(survey.regions[0].content->checked_pages, 256U);
  EXPECT_EQ(survey.regions[1].content->checked_pages, 44U);
  EXPECT_EQ(survey.regions[1].content->unchecked_pages, 212U);
}

TEST(ContentCheck, LooksAtNothingOnceItsTimeIsOver) {
  const GuestMemory memory(*MemoryMap::make({scattered()}));
  for (const auto time : {std::chrono::nanoseconds(0), std::chrono::nanoseconds(-1)}) {
    const Survey survey = memory.survey(with({.max_time = time}));
    EXPECT_EQ(survey.regions[0].content->checked_pages, 0U);
    EXPECT_FALSE(survey.regions[0].content->is_watched) << "which would take time, and cost the guest faults";
    EXPECT_EQ(survey.regions[0].content->unchecked_pages, survey.touched.page_count());
  }
  EXPECT_EQ(memory.survey(with({.max_time = std::chrono::hours(1)})).touched.page_count(), 0U);
}

// --- Executors ---

/// 64 MiB, of which every third page holds data: 8 parts to read.
class ContentCheckOn : public testing::Test {
protected:
  void SetUp() override {
    region.emplace(small_pages(64 * mib));
    for (std::uint64_t page = 0; page < region->pages().count(); ++page)
      store(*region, page, page % page_size, page % 3 == 0 ? 1 : 0);
    expected = those(*region, [](std::uint64_t page) { return page % 3 != 0; });
    memory.replace(*MemoryMap::make({*region}));
  }

  void expect_all_found(TaskExecutor executor, unsigned tasks = 3) {
    const Survey survey = memory.survey(with({.executor = std::move(executor), .parallel_tasks = tasks}));
    EXPECT_EQ(survey.zeroed(), expected);
    EXPECT_EQ(survey.regions[0].content->checked_pages, region->pages().count());
    EXPECT_EQ(survey.regions[0].content->zero_pages, expected.page_count());
  }

  std::optional<Region> region;
  PageSet expected;
  GuestMemory memory;
};

TEST_F(ContentCheckOn, AThreadPool) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round)
    expect_all_found([&pool](auto task) { pool.post(std::move(task)); });
}

TEST_F(ContentCheckOn, AsManyTasksAsWereAskedForIfThereIsWorkForThem) {
  for (const auto& [asked, posted] : {std::pair{1U, 1U}, std::pair{5U, 5U}, std::pair{1000U, 7U}}) {
    unsigned tasks = 0;
    expect_all_found([&tasks](const auto&) { ++tasks; }, asked);
    EXPECT_EQ(tasks, posted);
  }
}

TEST_F(ContentCheckOn, AnExecutorThatRunsTasksAtOnce) {
  const auto self = std::this_thread::get_id();
  expect_all_found([&](const auto& task) {
    EXPECT_EQ(std::this_thread::get_id(), self);
    task();
    task(); // and again: nothing is left to do
  });
}

TEST_F(ContentCheckOn, AnotherThreadThatDoesAllTheWork) {
  // The task is waited for within post, so that nothing is left for the calling thread: what it found is not lost.
  expect_all_found([](const auto& task) { std::jthread thread(task); });
}

TEST_F(ContentCheckOn, AnExecutorThatDropsTasks) {
  expect_all_found([](const auto&) {});
}

TEST_F(ContentCheckOn, AnExecutorThatThrows) {
  expect_all_found([](const auto&) { throw std::runtime_error("no"); });
  expect_all_found([](const auto& task) {
    task();
    throw std::runtime_error("after all");
  });
}

TEST_F(ContentCheckOn, APoolWhoseThreadsAreBusyUntilItReturned) {
  std::latch returned(1); // which the pool's threads may still look at when they are joined
  ThreadPool pool(2);
  for (int i = 0; i < 2; ++i)
    pool.post([&returned] { returned.wait(); });
  expect_all_found([&pool](auto task) { pool.post(std::move(task)); });
  returned.count_down();
}

TEST_F(ContentCheckOn, AnExecutorThatRunsTasksWhenTheMemoryIsGone) {
  std::vector<std::function<void()>> tasks;
  expect_all_found([&tasks](auto task) { tasks.push_back(std::move(task)); });
  memory.replace({});
  region.reset();
  ASSERT_EQ(tasks.size(), 3U);
  for (const auto& task : tasks)
    task();
}

TEST_F(ContentCheckOn, MemoryWhoseMapIsReplacedDuringEachLook) {
  unsigned looks = 0;
  const TaskExecutor replace = [&](const auto&) {
    ++looks;
    memory.replace(*MemoryMap::make({*region}));
  };
  const Survey survey = memory.survey(with({.executor = replace, .parallel_tasks = 1}));
  EXPECT_EQ(looks, 4U);
  EXPECT_TRUE(survey.zeroed().empty());
  EXPECT_EQ(survey.regions[0].zeroed_pages, 0U);
  ASSERT_TRUE(survey.regions[0].error);
  EXPECT_EQ(survey.regions[0].error->code, MemoryErrc::stopped);
  expect_all_found(nullptr);
}

TEST_F(ContentCheckOn, MemoryThatSomeoneBeginsToWatchMeanwhile) {
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << no_watch;
  const auto armed = memory.arm_write_watch(region->start());
  ASSERT_TRUE(armed) << armed.error().message();
  memory.disarm_write_watch(region->start());
  for (int round = 0; round < 20; ++round) {
    std::latch begun(1);
    std::jthread other;
    expect_all_found(
        [&](const auto&) {
          other = std::jthread([&] {
            begun.count_down();
            const auto watch = memory.arm_write_watch(region->start());
            EXPECT_TRUE(watch) << watch.error().message();
          });
          begun.wait();
        },
        1);
    other.join();
    EXPECT_TRUE(memory.disarm_write_watch(region->start()));
  }
}

// --- Writers at the same time ---

TEST(ContentCheck, NeverReportsAPageThatHoldsDataWhileOthersWrite) {
  for (const bool is_memfd : {false, true}) {
    const Region region = small_pages(16 * mib, is_memfd);
    // Of every four pages the first holds data that changes, the second is written with zeros again and again, the
    // third is discarded again and again, the fourth is zero.
    for (std::uint64_t page = 0; page < region.pages().count(); ++page)
      store(region, page, 3000, page % 4 == 0 ? 1 : 0);
    const auto data = those(region, [](std::uint64_t page) { return page % 4 == 0; });
    const auto zero = those(region, [](std::uint64_t page) { return page % 4 == 3; });
    std::atomic<bool> stop = false;
    std::jthread writer([&] {
      for (char value = 1; !stop; value = static_cast<char>(value % 100 + 1))
        for (std::uint64_t page = 0; page < region.pages().count() && !stop; page += 4) {
          store(region, page, 3000, value);
          store(region, page + 1, 3000, 0);
        }
    });
    std::jthread discarder([&] {
      while (!stop)
        for (std::uint64_t page = 2; page < region.pages().count() && !stop; page += 4) {
          store(region, page);
          madvise(static_cast<char*>(region.host_address()) + page * page_size, page_size,
                  is_memfd ? MADV_REMOVE : MADV_DONTNEED);
        }
    });
    ThreadPool pool(1);
    const GuestMemory memory(*MemoryMap::make({region}));
    for (int round = 0; round < 30; ++round) {
      const Survey survey =
          memory.survey(with({.executor = [&pool](auto task) { pool.post(std::move(task)); }, .parallel_tasks = 1}));
      PageSet wrong = survey.zeroed();
      wrong.intersect(data);
      EXPECT_TRUE(wrong.empty());
      PageSet missed = zero;
      missed.remove(survey.zeroed());
      EXPECT_TRUE(missed.empty());
    }
    stop = true;
  }
}

TEST(ContentCheck, IsNotMisledByDataThatGoesToAndFroWhereWritesAreWatched) {
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << no_watch;
  constexpr std::uint64_t count = 4;
  const Region region = small_pages(count * page_size);
  const GuestMemory memory(*MemoryMap::make({region}));
  for (std::uint64_t page = 0; page < count; ++page)
    store(region, page, 0);
  std::jthread writer([&](const std::stop_token& stop) {
    for (std::uint64_t pace = 0; !stop.stop_requested(); pace = (pace + 1) % 4096)
      for (std::uint64_t page = 0; page < count; ++page) {
        store(region, page, page_size - 1);
        store(region, page, 0, 0);
        for (std::uint64_t wait = 0; wait < pace / 8; ++wait)
          std::atomic_signal_fence(std::memory_order_seq_cst);
        store(region, page, 0);
        store(region, page, page_size - 1, 0);
        for (std::uint64_t wait = 0; wait < pace / 8; ++wait)
          std::atomic_signal_fence(std::memory_order_seq_cst);
      }
  });
  for (int round = 0; round < 1500; ++round) {
    const Survey survey = memory.survey(with());
    ASSERT_TRUE(survey.regions[0].content);
    ASSERT_TRUE(survey.regions[0].content->is_watched);
    EXPECT_TRUE(survey.zeroed().empty()) << survey.zeroed().page_count() << " pages in round " << round;
  }
}

/// Data that always is somewhere in its page, and moves one way, in steps, while the pages are read.
void never_reports_data_that_moves(std::uint64_t from, std::uint64_t to) {
  constexpr std::uint64_t count = 4096;
  constexpr int rounds = 200;
  constexpr std::uint64_t steps = 8;
  const Region region = small_pages(count * page_size);
  const GuestMemory memory(*MemoryMap::make({region}));
  const auto place = [&](std::uint64_t step) { return (from * (steps - step) + to * step) / steps; };
  std::atomic<int> reading = 0; // the round that reads
  std::atomic<int> reset = 0;   // the last one after which all data is where it was
  std::atomic<bool> is_surveyed = false;
  for (std::uint64_t page = 0; page < count; ++page)
    store(region, page, from);
  std::jthread writer([&] {
    for (int round = 1; round <= rounds; ++round) {
      reading.wait(round - 1);
      for (std::uint64_t step = 0; step < steps; ++step)
        for (std::uint64_t page = 0; page < count; ++page) {
          store(region, page, place(step + 1));
          store(region, page, place(step), 0);
        }
      is_surveyed.wait(false);
      for (std::uint64_t page = 0; page < count; ++page) {
        store(region, page, from);
        store(region, page, to, 0);
      }
      is_surveyed = false;
      reset = round;
      reset.notify_all();
    }
  });
  for (int round = 1; round <= rounds; ++round) {
    // The executor is asked right before reading begins.
    const auto begin = [&](const auto&) {
      reading = round;
      reading.notify_all();
    };
    const Survey survey = memory.survey(with({.executor = begin, .parallel_tasks = 1}));
    EXPECT_TRUE(survey.zeroed().empty()) << survey.zeroed().page_count() << " pages in round " << round;
    EXPECT_EQ(reading, round);
    begin(0);
    is_surveyed = true;
    is_surveyed.notify_all();
    reset.wait(round - 1);
  }
}

TEST(ContentCheck, NeverReportsDataThatMovesDown) { never_reports_data_that_moves(4095, 0); }
TEST(ContentCheck, NeverReportsDataThatMovesUp) { never_reports_data_that_moves(0, 4095); }

} // namespace
