#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <new>
#include <optional>
#include <poll.h>
#include <random>
#include <span>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "support/descriptor.hpp"
#include "support/huge_pages_test.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"

import cppvmm.guest_memory;

// What was written to memory that is all present: by a watch of the page tables, and by a log with a record of the
// accessors.

using namespace cppvmm;

namespace {

constexpr std::uint64_t region_pages = 1024;
constexpr std::uint64_t bytes = region_pages * page_size;
constexpr GuestAddress start(0x100 * page_size);

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

PageSet each(const std::vector<std::uint64_t>& numbers) {
  PageSet set;
  for (const auto number : numbers)
    set.add(pages(number, 1));
  return set;
}

/// 4 MiB that is present as a whole: zero, with data in pages 0x110 and 0x4FF.
class PopulatedMemory : public testing::TestWithParam<Backing> {
protected:
  void SetUp() override {
    if (GetParam() == Backing::shared_anonymous) {
      own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
      ASSERT_NE(own, MAP_FAILED);
      region.emplace(*Region::adopt(start, {own, bytes, Backing::shared_anonymous}));
    } else {
      region.emplace(GetParam() == Backing::memfd ? *Region::memfd(start, bytes) : *Region::anonymous(start, bytes));
    }
    for (std::uint64_t page = 0; page < region_pages; ++page)
      *host(0x100 + page) = std::byte{0};
    *host(0x110) = std::byte{1};
    *(host(0x4FF) + page_size - 1) = std::byte{1};
    memory.replace(*MemoryMap::make({*region}));
    ASSERT_TRUE(memory.survey().zeroed().empty());
  }
  void TearDown() override {
    memory.replace({});
    region.reset();
    if (own != nullptr) munmap(own, bytes);
  }

  [[nodiscard]] volatile std::byte* host(std::uint64_t page) const {
    return static_cast<volatile std::byte*>(region->host_address()) + (page - 0x100) * page_size;
  }
  /// Arms with the promise that shared memory needs.
  [[nodiscard]] testing::AssertionResult arm(Baseline baseline = Baseline::content) {
    const auto armed = memory.arm_write_watch(start, {.baseline = baseline, .written_through_this_mapping_only = true});
    if (armed) return testing::AssertionSuccess();
    return testing::AssertionFailure() << armed.error().message();
  }
  void expect_touched(const std::vector<std::uint64_t>& numbers) const {
    const Survey survey = memory.survey();
    EXPECT_EQ(survey.touched, each(numbers));
    EXPECT_EQ(survey.regions[0].zeroed_pages, region_pages - numbers.size());
    EXPECT_EQ(survey.zeroed().page_count(), region_pages - numbers.size());
  }

  GuestMemory memory;
  std::optional<Region> region;
  void* own = nullptr;
};

const char* const no_watch = "this kernel has no asynchronous write protection";

bool has_watch() { return test::machine_facts().async_write_protect; }

class WriteWatchOf : public PopulatedMemory {
protected:
  void SetUp() override {
    if (!has_watch()) GTEST_SKIP() << no_watch;
    PopulatedMemory::SetUp();
  }
};

TEST_P(WriteWatchOf, ProvesWhatWasNotWritten) {
  ASSERT_TRUE(arm());
  expect_touched({0x110, 0x4FF});
  *host(0x120) = std::byte{1};
  *host(0x130) = std::byte{0};
  ASSERT_TRUE(memory.write_value(GuestAddress(0x140 * page_size), std::uint8_t{1}));
  static_cast<void>(*host(0x150)); // a read is no write
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(::write(ends[1], "data", 4), 4);
  ASSERT_EQ(::read(ends[0], const_cast<std::byte*>(host(0x160)), 4), 4);
  close(ends[0]);
  close(ends[1]);
  char word[] = "word";
  iovec from{word, 4};
  iovec into{const_cast<std::byte*>(host(0x170)), 4};
  ASSERT_EQ(process_vm_writev(getpid(), &from, 1, &into, 1, 0), 4);
  expect_touched({0x110, 0x120, 0x130, 0x140, 0x160, 0x170, 0x4FF});
  const Survey survey = memory.survey();
  ASSERT_TRUE(survey.regions[0].watch);
  EXPECT_EQ(survey.regions[0].watch->written_pages, 7U);
  EXPECT_EQ(survey.regions[0].watch->zero_pages, region_pages - 7);
  EXPECT_TRUE(memory.disarm_write_watch(start));
  EXPECT_FALSE(memory.disarm_write_watch(start));
  EXPECT_TRUE(memory.survey().zeroed().empty());
}

TEST_P(WriteWatchOf, BelievesAPromise) {
  for (const std::uint64_t page : {0x110U, 0x4FFU})
    for (std::uint64_t i = 0; i < page_size; ++i)
      *(host(page) + i) = std::byte{0};
  ASSERT_TRUE(arm(Baseline::promise));
  expect_touched({});
  *host(0x200) = std::byte{1};
  expect_touched({0x200});
}

TEST_P(WriteWatchOf, KeepsAWrittenPageWhoseEntryIsGone) {
  ASSERT_TRUE(arm());
  *host(0x200) = std::byte{1};
  // What reclaim does to shared memory, and a balloon to private memory.
  ASSERT_EQ(madvise(const_cast<std::byte*>(host(0x200)), 2 * page_size, MADV_DONTNEED), 0);
  const Survey survey = memory.survey();
  if (GetParam() == Backing::anonymous) {
    expect_touched({0x110, 0x4FF}); // it reads zero again
    *host(0x200) = std::byte{1};
  }
  EXPECT_TRUE(memory.survey().touched.contains(PageNumber(0x200)));
  EXPECT_TRUE(memory.survey().zeroed().contains(PageNumber(0x202)));
}

TEST_P(WriteWatchOf, SurvivesBeingPagedOut) {
  ASSERT_TRUE(arm());
  *host(0x200) = std::byte{1};
  // Where there is swap, the entries change their form.
  madvise(region->host_address(), bytes, 21 /* MADV_PAGEOUT, Linux 5.4 */);
  const Survey survey = memory.survey();
  for (const std::uint64_t page : {0x110U, 0x200U, 0x4FFU})
    EXPECT_FALSE(survey.zeroed().contains(PageNumber(page))) << page;
  EXPECT_EQ(survey.zeroed().page_count(), region_pages - 3);
}

TEST_P(WriteWatchOf, SurvivesALookAtTheContent) {
  ASSERT_TRUE(arm());
  *host(0x200) = std::byte{0};
  SurveyOptions options;
  options.content_check.emplace();
  EXPECT_EQ(memory.survey(options).touched, each({0x110, 0x4FF})) << "what was written with zeros reads zero";
  *host(0x201) = std::byte{1};
  expect_touched({0x110, 0x200, 0x201, 0x4FF});
}

class WriteWatchWithoutAPromise : public PopulatedMemory {};

TEST_P(WriteWatchWithoutAPromise, IsForPrivateMemoryOfKernelsThatHaveIt) {
  const auto armed = memory.arm_write_watch(start);
  EXPECT_EQ(armed.has_value(), GetParam() == Backing::anonymous && has_watch());
  if (armed) return;
  EXPECT_EQ(armed.error().code,
            GetParam() == Backing::anonymous ? MemoryErrc::unavailable : MemoryErrc::invalid_argument);
}

TEST_P(WriteWatchOf, IsArmedOnceARegionAndGoesWithIt) {
  ASSERT_TRUE(arm());
  EXPECT_EQ(memory.arm_write_watch(start, {.written_through_this_mapping_only = true}).error().code,
            MemoryErrc::invalid_argument);
  EXPECT_EQ(memory.arm_write_watch(GuestAddress(0)).error().code, MemoryErrc::not_backed);
  ASSERT_TRUE(memory.remove_region(start));
  ASSERT_TRUE(memory.add_region(*region));
  EXPECT_TRUE(memory.survey().zeroed().empty()) << "the watch went with the region";
  ASSERT_TRUE(arm());
  expect_touched({0x110, 0x4FF});
}

TEST_P(WriteWatchOf, CountsForNothingWhereTheMemoryIsNoLongerWatched) {
  ASSERT_TRUE(arm());
  // Memory that was moved there comes with its data, and without the watch.
  void* other = mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(other, MAP_FAILED);
  *static_cast<volatile char*>(other) = 1;
  void* const at = const_cast<std::byte*>(host(0x200));
  ASSERT_EQ(mremap(other, page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED, at), at);
  EXPECT_FALSE(memory.survey().zeroed().contains(PageNumber(0x200)));
}

TEST_P(WriteWatchOf, CountsForNothingInAForkedChild) {
  ASSERT_TRUE(arm());
  const pid_t child = fork();
  if (child == 0) {
    *host(0x300) = std::byte{1};
    _exit(memory.survey().zeroed().contains(PageNumber(0x300)) ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_P(WriteWatchOf, DoesNotEndWhenAForkedChildEndsIts) {
  ASSERT_TRUE(arm());
  const pid_t child = fork();
  if (child == 0) _exit(memory.disarm_write_watch(start) ? 0 : 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  expect_touched({0x110, 0x4FF});
}

TEST_P(WriteWatchOf, EndsWhileASurveyHasIt) {
  // The survey has come to the first region when the watch of the second one ends, and another one begins.
  ASSERT_TRUE(memory.add_region(*Region::anonymous(GuestAddress(0), page_size)));
  ASSERT_TRUE(arm());
  *host(0x120) = std::byte{1};
  GuestMemory other(*MemoryMap::make({*region}));
  bool has_ended = false;
  ASSERT_TRUE(memory.begin_write_log({.collect = [&](PageRange, std::span<std::uint64_t>) -> MemoryResult<void> {
    if (has_ended) return {};
    std::jthread([&] {
      has_ended = memory.disarm_write_watch(start);
      const auto armed =
          other.arm_write_watch(start, {.baseline = Baseline::promise, .written_through_this_mapping_only = true});
      EXPECT_TRUE(armed) << armed.error().message();
    }).join();
    return {};
  }}));
  const Survey survey = memory.survey();
  EXPECT_TRUE(has_ended);
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(0x120)));
  ASSERT_TRUE(survey.regions[1].watch);
  ASSERT_TRUE(survey.regions[1].watch->error);
  EXPECT_EQ(survey.regions[1].watch->error->code, MemoryErrc::unavailable);
}

TEST_P(WriteWatchOf, EndsThoughAForkedChildHasItsDescriptor) {
  ASSERT_TRUE(arm());
  const pid_t child = fork();
  if (child == 0) {
    pause();
    _exit(0);
  }
  EXPECT_TRUE(memory.disarm_write_watch(start));
  EXPECT_TRUE(arm());
  expect_touched({0x110, 0x4FF});
  ASSERT_EQ(kill(child, SIGKILL), 0);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
}

TEST_P(WriteWatchOf, IsExactForRandomWriters) {
  ASSERT_TRUE(arm());
  std::mt19937 random(11);
  PageSet expected = each({0x110, 0x4FF});
  for (int round = 0; round < 40; ++round) {
    for (int i = 0; i < 12; ++i) {
      const std::uint64_t page = 0x100 + random() % region_pages;
      *(host(page) + random() % page_size) = std::byte{1};
      expected.add(pages(page, 1));
    }
    ASSERT_EQ(memory.survey().touched, expected) << "round " << round;
  }
}

std::string name_of(const testing::TestParamInfo<Backing>& info) { return to_string(info.param); }

// The swap cache has them then, as it has what was lost to a memory error in the eyes of mincore(2).
TEST_P(WriteWatchOf, KnowsPagesThatAForkedChildBroughtBackFromSwap) {
  if (GetParam() != Backing::anonymous) GTEST_SKIP() << "a child has no pages of its own of shared memory";
  const auto swap = test::SwapSpace::take();
  if (!swap) GTEST_SKIP() << swap.error();
  ASSERT_TRUE(arm());
  const auto swapped = [&] { return test::swapped_pages(region->host_address(), bytes); };
  // The kernel leaves alone what is on some CPU's list just now.
  for (int i = 0; i < 100 && std::ranges::count(swapped(), false) > 0; ++i)
    ASSERT_EQ(madvise(region->host_address(), bytes, 21 /* MADV_PAGEOUT, Linux 5.4 */), 0);
  const pid_t child = fork();
  if (child == 0) {
    for (std::uint64_t page = 0; page < region_pages; page += 2)
      static_cast<void>(*host(0x100 + page));
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  const std::vector<bool> out = swapped();
  const std::vector<bool> cached = test::cached_pages(region->host_address(), bytes);
  // Of page 0x110, which holds data, nothing is left to know.
  const auto is_in_doubt = [&](std::uint64_t page) { return out[page] && cached[page] && page != 0x10; };
  std::vector<bool> still_out = out;
  for (std::uint64_t page = 0; page < region_pages; ++page)
    if (is_in_doubt(page)) still_out[page] = false;
  if (still_out == out) GTEST_SKIP() << "the kernel keeps nothing in the swap cache";
  expect_touched({0x110, 0x4FF});
  EXPECT_EQ(swapped(), still_out);
  expect_touched({0x110, 0x4FF});
}

const auto kinds = testing::Values(Backing::anonymous, Backing::memfd, Backing::shared_anonymous);
INSTANTIATE_TEST_SUITE_P(All, WriteWatchOf, kinds, name_of);
INSTANTIATE_TEST_SUITE_P(All, WriteWatchWithoutAPromise, kinds, name_of);

TEST(WriteWatch, SeesPagesWithinAHugePage) {
  if (!has_watch()) GTEST_SKIP() << no_watch;
  if (!test::machine_facts().membarrier) GTEST_SKIP() << "membarrier is refused: huge pages have no evidence";
  constexpr std::uint64_t huge = 512 * page_size;
  const Region region = *Region::anonymous(GuestAddress(0), 2 * huge);
  madvise(region.host_address(), 2 * huge, MADV_HUGEPAGE);
  auto* const host = static_cast<volatile std::byte*>(region.host_address());
  host[5 * page_size] = std::byte{1};
  if (test::huge_page_bytes(region.host_address()) == 0) GTEST_SKIP() << "the kernel gave no huge page";
  EXPECT_EQ(*region.huge_page_bytes(), huge);
  GuestMemory memory(*MemoryMap::make({region}));
  EXPECT_EQ(memory.survey().touched.page_count(), 512U);
  const auto armed = memory.arm_write_watch(GuestAddress(0));
  ASSERT_TRUE(armed) << armed.error().message();
  EXPECT_EQ(memory.survey().touched, each({5}));
  host[7 * page_size] = std::byte{1};
  host[700 * page_size] = std::byte{1};
  const Survey survey = memory.survey();
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(5)));
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(7)));
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(700)));
  EXPECT_GE(survey.zeroed().page_count(), 510U);
}

class WriteWatchOfHugePages : public test::HugePagesTest {};

// The protection of a huge page outlives it, as an entry that looks like a page.
TEST_F(WriteWatchOfHugePages, ForgetsThoseThatAreDiscarded) {
  if (!has_watch()) GTEST_SKIP() << no_watch;
  constexpr std::uint64_t huge = 512 * page_size;
  for (const bool is_shared : {false, true}) {
    const Region region = is_shared ? *Region::hugetlb_memfd(GuestAddress(0), 4 * huge, HugePageSize::two_mib)
                                    : *Region::hugetlb(GuestAddress(0), 4 * huge, HugePageSize::two_mib);
    auto* const host = static_cast<volatile std::byte*>(region.host_address());
    GuestMemory memory(*MemoryMap::make({region}));
    host[huge] = std::byte{1};
    host[2 * huge] = std::byte{1};
    const auto armed = memory.arm_write_watch(GuestAddress(0), {.written_through_this_mapping_only = true});
    ASSERT_TRUE(armed) << armed.error().message();
    ASSERT_EQ(memory.survey().touched, each({512, 1024}));
    // From within a huge page that is not there.
    const auto done = memory.discard(pages(511, 513));
    ASSERT_TRUE(done) << done.error().message();
    if (!is_shared && !test::machine_facts().hugetlb_dontneed) {
      EXPECT_EQ(done->cleared_pages, 512U) << "there is no other way";
      continue;
    }
    EXPECT_EQ(done->cleared_pages, 0U);
    EXPECT_EQ(memory.survey().touched, each({1024})) << (is_shared ? "shared" : "private");
    EXPECT_TRUE(host[huge] == std::byte{0}); // which brings a page that is not watched
    host[2 * huge + 5 * page_size] = std::byte{1};
    PageSet touched(pages(512, 1024));
    EXPECT_EQ(memory.survey().touched, touched);
  }
}

// Adopted memory is written by the kernel, through its own mapping of pages that it has looked up before: here it has
// all of them when it waits for what it is to write.
TEST(WriteWatch, MissesNoWriteToAdoptedMemoryWhileItIsArmed) {
  if (!has_watch()) GTEST_SKIP() << no_watch;
  const test::Descriptor uffd(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  if (!uffd.is_open()) GTEST_SKIP() << "no userfaultfd for the kernel's faults: errno " << errno;
  uffdio_api api{};
  api.api = UFFD_API;
  ASSERT_EQ(ioctl(uffd.number(), UFFDIO_API, &api), 0);
  std::byte* both[2]; // what is to be written, and where
  for (std::byte*& one : both) {
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(mapped, MAP_FAILED);
    one = static_cast<std::byte*>(mapped);
    madvise(one, bytes, MADV_NOHUGEPAGE);
  }
  const auto [data, own] = both;
  std::memset(own, 0, bytes);
  std::memset(data, 1, bytes);
  const auto missing = reinterpret_cast<std::uintptr_t>(data + page_size);
  uffdio_register watched{};
  watched.range = {.start = missing, .len = page_size};
  watched.mode = UFFDIO_REGISTER_MODE_MISSING;
  ASSERT_EQ(ioctl(uffd.number(), UFFDIO_REGISTER, &watched), 0);
  ASSERT_EQ(madvise(data + page_size, page_size, MADV_DONTNEED), 0);
  {
    GuestMemory memory(*MemoryMap::make({*Region::adopt(start, {own, bytes, Backing::anonymous})}));
    std::atomic<bool> is_over = false;
    std::thread writer([&] {
      EXPECT_TRUE(memory.write(start, std::span(data, bytes)));
      is_over = true;
    });
    pollfd waits{.fd = uffd.number(), .events = POLLIN, .revents = 0};
    while (poll(&waits, 1, 10) == 0 && !is_over) {
    }
    EXPECT_FALSE(is_over);
    const auto armed = memory.arm_write_watch(start);
    uffdio_copy page{};
    page.dst = missing;
    page.src = reinterpret_cast<std::uintptr_t>(data);
    page.len = page_size;
    EXPECT_EQ(ioctl(uffd.number(), UFFDIO_COPY, &page), 0);
    writer.join();
    EXPECT_TRUE(armed);
    EXPECT_EQ(memory.survey().zeroed().page_count(), 0U) << "pages with data";
  }
  for (std::byte* const one : both)
    munmap(one, bytes);
}

TEST(WriteWatch, IsNotForFiles) {
  const int fd = memfd_create("snapshot", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, bytes), 0);
  GuestMemory memory(*MemoryMap::make(
      {*Region::private_file(start, bytes, fd, 0), *Region::anonymous(GuestAddress(0), page_size, RegionKind::rom)}));
  EXPECT_EQ(memory.arm_write_watch(start).error().code, MemoryErrc::unavailable);
  EXPECT_EQ(memory.arm_write_watch(GuestAddress(0)).error().code, MemoryErrc::read_only);
  close(fd);
}

/// A log that a test fills by hand.
struct TestLog {
  std::vector<std::uint64_t> fresh; // since it was asked last
  bool fails = false;
  bool throws = false; // having taken out what is fresh

  [[nodiscard]] WriteLog log() {
    return {.collect = [this](PageRange range, std::span<std::uint64_t> bitmap) -> MemoryResult<void> {
      if (fails) return std::unexpected(MemoryError{.code = MemoryErrc::os, .os_error = EIO, .operation = "test"});
      if (throws) {
        fresh.clear();
        throw std::bad_alloc();
      }
      for (const auto page : fresh)
        if (range.contains(PageNumber(page))) {
          const std::uint64_t bit = page - range.first().value();
          bitmap[bit / 64] |= std::uint64_t{1} << (bit % 64);
        }
      fresh.clear();
      return {};
    }};
  }
};

class WriteLogOf : public PopulatedMemory {};

TEST_P(WriteLogOf, ThatIsCompleteProvesWhatIsNeitherInItNorRecorded) {
  TestLog test;
  ASSERT_TRUE(memory.begin_write_log(test.log(), {.complete = true}));
  expect_touched({0x110, 0x4FF});
  test.fresh = {0x200, 0x201, 0x4FE};
  ASSERT_TRUE(memory.write_value(GuestAddress(0x300 * page_size - 4), std::uint64_t{0}));
  const std::byte more[2 * page_size] = {};
  ASSERT_TRUE(memory.load(GuestAddress(0x400 * page_size), more));
  expect_touched({0x110, 0x200, 0x201, 0x2FF, 0x300, 0x400, 0x401, 0x4FE, 0x4FF});
  // What is new in it comes on top of what was before.
  test.fresh = {0x203};
  const Survey survey = memory.survey();
  const TouchedMap touched = survey.touched_map();
  EXPECT_EQ(touched.at(PageNumber(0x200)), Toucher::guest);
  EXPECT_EQ(touched.at(PageNumber(0x203)), Toucher::guest);
  EXPECT_EQ(touched.at(PageNumber(0x300)), Toucher::host);
  EXPECT_EQ(touched.at(PageNumber(0x110)), Toucher::unknown);
  EXPECT_EQ(touched.at(PageNumber(0x202)), Touchers());
  ASSERT_TRUE(survey.regions[0].log);
  EXPECT_EQ(survey.regions[0].log->zero_pages, region_pages - 10);
  EXPECT_TRUE(memory.end_write_log());
  EXPECT_FALSE(memory.end_write_log());
  EXPECT_TRUE(memory.survey().zeroed().empty());
}

TEST_P(WriteLogOf, ThatIsNotCompleteOnlyTellsWhoWrote) {
  TestLog test;
  ASSERT_TRUE(memory.begin_write_log(test.log()));
  test.fresh = {0x200};
  ASSERT_TRUE(memory.write_value(GuestAddress(0x300 * page_size), std::uint8_t{0}));
  const Survey survey = memory.survey();
  EXPECT_TRUE(survey.zeroed().empty());
  EXPECT_FALSE(survey.regions[0].log);
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x200)), Toucher::guest);
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x300)), Toucher::host);
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x301)), Toucher::unknown);
}

TEST_P(WriteLogOf, ThatFailedOnceCountsForNothing) {
  TestLog test;
  ASSERT_TRUE(memory.begin_write_log(test.log(), {.complete = true}));
  test.fails = true;
  EXPECT_TRUE(memory.survey().zeroed().empty());
  test.fails = false;
  const Survey survey = memory.survey();
  EXPECT_TRUE(survey.zeroed().empty()) << "what the failed call took out of the log is lost";
  ASSERT_TRUE(survey.regions[0].log && survey.regions[0].log->error);
  EXPECT_EQ(survey.regions[0].log->error->os_error, EIO);
}

TEST_P(WriteLogOf, ThatThrewOnceCountsForNothing) {
  TestLog test;
  ASSERT_TRUE(memory.begin_write_log(test.log(), {.complete = true}));
  test.fresh = {region->pages().first().value() + 3};
  test.throws = true;
  EXPECT_THROW(static_cast<void>(memory.survey()), std::bad_alloc);
  test.throws = false;
  const Survey survey = memory.survey();
  EXPECT_TRUE(survey.zeroed().empty()) << "what was taken out of the log when it threw is lost";
  ASSERT_TRUE(survey.regions[0].log && survey.regions[0].log->error);
}

TEST_P(WriteLogOf, IsOneAtATimeAndBeginsAnew) {
  TestLog test;
  ASSERT_TRUE(memory.begin_write_log(test.log(), {.complete = true}));
  EXPECT_EQ(memory.begin_write_log(test.log()).error().code, MemoryErrc::invalid_argument);
  GuestMemory other(*MemoryMap::make({*region}));
  EXPECT_EQ(other.begin_write_log(test.log()).error().code, MemoryErrc::invalid_argument)
      << "two records would take each other's bits";
  ASSERT_TRUE(memory.write_value(GuestAddress(0x300 * page_size), std::uint8_t{0}));
  ASSERT_TRUE(memory.end_write_log());
  ASSERT_TRUE(other.begin_write_log(test.log(), {.complete = true}));
  EXPECT_EQ(other.survey().touched, each({0x110, 0x4FF}));
  ASSERT_TRUE(memory.write_value(GuestAddress(0x301 * page_size), std::uint8_t{0}));
  EXPECT_EQ(other.survey().touched, each({0x110, 0x301, 0x4FF})) << "other maps' accessors are recorded too";
}

TEST_P(WriteLogOf, KnowsNothingOfRegionsThatCameLater) {
  TestLog test;
  ASSERT_TRUE(memory.begin_write_log(test.log(), {.complete = true}));
  const Region later = *Region::anonymous(GuestAddress(0), page_size);
  *static_cast<volatile char*>(later.host_address()) = 1;
  ASSERT_TRUE(memory.add_region(later));
  EXPECT_TRUE(memory.survey().touched.contains(PageNumber(0)));
  // One that went and came back is such a region as well.
  ASSERT_TRUE(memory.remove_region(start));
  ASSERT_TRUE(memory.add_region(*region));
  EXPECT_TRUE(memory.survey().zeroed().empty());
}

INSTANTIATE_TEST_SUITE_P(All, WriteLogOf, kinds, name_of);

TEST(WriteLogs, AreNotAskedAnyMoreOnceTheyEnded) {
  // A survey in progress has looked at the first region when the log ends.
  const Region first = *Region::anonymous(GuestAddress(0), std::uint64_t{16} << 20);
  const Region second = *Region::anonymous(GuestAddress(std::uint64_t{1} << 30), page_size);
  for (const Region& region : {first, second})
    for (std::uint64_t page = 0; page < region.pages().count(); ++page)
      static_cast<volatile std::byte*>(region.host_address())[page * page_size] = std::byte{0};
  GuestMemory memory(*MemoryMap::make({first, second}));
  bool has_ended = false;
  ASSERT_TRUE(memory.begin_write_log({.collect = [&](PageRange, std::span<std::uint64_t>) -> MemoryResult<void> {
    EXPECT_FALSE(has_ended);
    return {};
  }}));
  SurveyOptions options;
  options.content_check =
      ContentCheckOptions{.executor = [&](const auto&) { has_ended |= memory.end_write_log(); }, .parallel_tasks = 1};
  static_cast<void>(memory.survey(options));
  EXPECT_TRUE(has_ended);
}

TEST(WriteLogs, OfOddSizesEndWithTheRegion) {
  // The last word of the bitmap has bits beyond the region's end.
  const Region region = *Region::anonymous(start, 70 * page_size);
  for (std::uint64_t page = 0; page < 70; ++page)
    static_cast<volatile std::byte*>(region.host_address())[page * page_size] = std::byte{0};
  GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_TRUE(memory.begin_write_log({.collect = [](PageRange, std::span<std::uint64_t> bitmap) -> MemoryResult<void> {
                                       EXPECT_EQ(bitmap.size(), 2U);
                                       bitmap[1] = UINT64_MAX;
                                       return {};
                                     }},
                                     {.complete = true}));
  const Survey survey = memory.survey();
  EXPECT_EQ(survey.zeroed(), PageSet(pages(0x100, 64)));
}

} // namespace
