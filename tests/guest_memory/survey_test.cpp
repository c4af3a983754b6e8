#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <initializer_list>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <vector>

#include "support/machine_facts.hpp"

import cppvmm.guest_memory;

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t region_pages = 1024;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

PageSet each(std::initializer_list<std::uint64_t> numbers) {
  PageSet set;
  for (const auto number : numbers)
    set.add(pages(number, 1));
  return set;
}

enum class Memory { anonymous, memfd, adopted_anonymous, adopted_memfd };

/// One region of 4 MiB at page 0x100, of each kind whose evidence is exact, looked at in the newest way and in the one
/// that older kernels have.
class SurveyOf : public testing::TestWithParam<std::tuple<Memory, EvidenceSource>> {
protected:
  static constexpr std::uint64_t first_page = 0x100;

  void SetUp() override {
    const GuestAddress start(first_page * page_size);
    constexpr std::uint64_t bytes = region_pages * page_size;
    switch (std::get<Memory>(GetParam())) {
    case Memory::anonymous:
      region.emplace(*Region::anonymous(start, bytes));
      break;
    case Memory::memfd:
      region.emplace(*Region::memfd(start, bytes));
      break;
    case Memory::adopted_anonymous:
      own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      region.emplace(*Region::adopt(start, {own, bytes, Backing::anonymous}));
      break;
    case Memory::adopted_memfd:
      own_fd = memfd_create("adopted", MFD_CLOEXEC);
      ASSERT_EQ(ftruncate(own_fd, bytes + mib), 0);
      own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, own_fd, mib / 2);
      region.emplace(*Region::adopt(start, {own, bytes, Backing::memfd, own_fd, mib / 2}));
      break;
    }
    // Whole huge pages would be touched at once.
    madvise(region->host_address(), bytes, MADV_NOHUGEPAGE);
    memory.replace(*MemoryMap::make({*region}));
  }

  void TearDown() override {
    memory.replace({});
    region.reset();
    if (own != nullptr) munmap(own, region_pages * page_size);
    if (own_fd >= 0) close(own_fd);
  }

  [[nodiscard]] bool is_shared() const {
    return std::get<Memory>(GetParam()) == Memory::memfd || std::get<Memory>(GetParam()) == Memory::adopted_memfd;
  }
  /// A way to write the file.
  [[nodiscard]] int writable_fd() const { return own_fd >= 0 ? own_fd : region->file_descriptor(); }
  [[nodiscard]] std::byte* host(std::uint64_t page) const {
    return static_cast<std::byte*>(region->host_address()) + (page - first_page) * page_size;
  }
  [[nodiscard]] Survey survey() const { return memory.survey({.leave_out = {}, .source = std::get<1>(GetParam())}); }
  void expect_touched(std::initializer_list<std::uint64_t> numbers) const {
    const Survey result = survey();
    EXPECT_EQ(result.touched, each(numbers));
    PageSet rest(region->pages());
    rest.remove(each(numbers));
    EXPECT_EQ(result.zeroed(), rest);
    EXPECT_EQ(result.ram, PageSet(region->pages()));
    ASSERT_EQ(result.regions.size(), 1U);
    EXPECT_NE(result.regions[0].evidence, Evidence::none)
        << (result.regions[0].error ? result.regions[0].error->message() : "");
    EXPECT_EQ(result.regions[0].unaccounted_pages, 0U);
  }

  /// Of what was not written through this mapping, whose advice to have no huge pages does not bind others.
  void expect_touched_by_others(std::initializer_list<std::uint64_t> numbers) const {
    if (!test::machine_facts().shmem_thp_unasked()) return expect_touched(numbers);
    PageSet missing = each(numbers);
    missing.remove(survey().touched);
    EXPECT_TRUE(missing.empty());
  }

  GuestMemory memory;
  std::optional<Region> region;
  void* own = nullptr;
  int own_fd = -1;
};

/// The kinds that other processes can write to, the one that is part of a file, and those that are this process's own.
class SurveyOfShared : public SurveyOf {};
class SurveyOfSlice : public SurveyOf {};
class SurveyOfPrivate : public SurveyOf {};

TEST_P(SurveyOf, FindsNothingTouchedInFreshMemory) { expect_touched({}); }

TEST_P(SurveyOf, SeesTypedWritesAndRawPointers) {
  ASSERT_TRUE(memory.write_value(GuestAddress(0x110'008), std::uint8_t{1}));
  *static_cast<volatile std::byte*>(host(0x120)) = std::byte{1};
  *static_cast<volatile std::byte*>(host(first_page + region_pages - 1) + 4095) = std::byte{1};
  *static_cast<volatile std::byte*>(host(first_page)) = std::byte{1};
  expect_touched({0x100, 0x110, 0x120, 0x4FF});
}

TEST_P(SurveyOf, CountsAWriteOfZeros) {
  *static_cast<volatile std::byte*>(host(0x150)) = std::byte{0};
  expect_touched({0x150});
}

TEST_P(SurveyOf, SeesWhatTheKernelWritesForUs) {
  int pipe_ends[2];
  ASSERT_EQ(pipe(pipe_ends), 0);
  ASSERT_EQ(::write(pipe_ends[1], "data", 4), 4);
  ASSERT_EQ(::read(pipe_ends[0], host(0x130), 4), 4);
  close(pipe_ends[0]);
  close(pipe_ends[1]);
  char word[] = "word";
  iovec from{word, 4};
  iovec into{host(0x140), 4};
  ASSERT_EQ(process_vm_writev(getpid(), &from, 1, &into, 1, 0), 4);
  expect_touched({0x130, 0x140});
}

TEST_P(SurveyOfSlice, SeesOnlyItsOwnPages) {
  // Of the adopted file, what lies before and behind the region counts for nothing.
  ASSERT_EQ(pwrite(own_fd, "x", 1, 0), 1);
  ASSERT_EQ(pwrite(own_fd, "x", 1, mib / 2 - 1), 1);
  ASSERT_EQ(pwrite(own_fd, "x", 1, mib / 2 + region_pages * page_size), 1);
  if (test::machine_facts().shmem_thp_unasked())
    GTEST_SKIP() << "shared memory gets huge pages unasked, which reach over the region's ends";
  expect_touched({});
}

TEST_P(SurveyOfShared, SeesAnotherProcess) {
  const std::uint64_t file_start = region->file_offset();
  const pid_t child = fork();
  if (child == 0) {
    // A mapping of its own, as a vhost-user process has: nothing of it shows in our page tables.
    void* view = mmap(nullptr, region_pages * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, writable_fd(),
                      static_cast<off_t>(file_start));
    if (view == MAP_FAILED) _exit(1);
    static_cast<volatile char*>(view)[5 * page_size] = 1;
    _exit(pwrite(writable_fd(), "x", 1, static_cast<off_t>(file_start + 9 * page_size)) == 1 ? 0 : 2);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  expect_touched_by_others({first_page + 5, first_page + 9});
}

TEST_P(SurveyOfPrivate, KeepsAForkedChildsWritesApart) {
  *static_cast<volatile std::byte*>(host(0x110)) = std::byte{1};
  const pid_t child = fork();
  if (child == 0) {
    *static_cast<volatile std::byte*>(host(0x111)) = std::byte{1};
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  expect_touched({0x110});
}

TEST_P(SurveyOfPrivate, SurveysTheChildsMemoryInAFork) {
  expect_touched({});
  const pid_t child = fork();
  if (child == 0) {
    *static_cast<volatile std::byte*>(host(0x111)) = std::byte{1};
    _exit(survey().touched == each({0x111}) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_P(SurveyOf, ReportsDiscardedMemoryAgain) {
  for (const std::uint64_t page : {0x110U, 0x111U, 0x112U})
    *static_cast<volatile std::byte*>(host(page)) = std::byte{1};
  if (is_shared())
    ASSERT_EQ(fallocate(writable_fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                        static_cast<off_t>(region->file_offset() + 0x11 * page_size), page_size),
              0);
  else
    ASSERT_EQ(madvise(host(0x111), page_size, MADV_DONTNEED), 0);
  expect_touched({0x110, 0x112});
}

TEST_P(SurveyOf, LeavesOutWhatItIsTold) {
  const Survey result =
      memory.survey({.leave_out = each({0x110, 0x9999}), .source = std::get<EvidenceSource>(GetParam())});
  EXPECT_TRUE(result.touched.empty());
  EXPECT_FALSE(result.zeroed().contains(PageNumber(0x110)));
  EXPECT_EQ(result.zeroed().page_count(), region_pages - 1);
}

TEST_P(SurveyOf, CountsMarksAsTouched) {
  memory.mark_touched(pages(0x110, 2), Toucher::device);
  memory.mark_touched(pages(0x5000, 2), Toucher::device); // no memory there
  *static_cast<volatile std::byte*>(host(0x120)) = std::byte{1};
  expect_touched({0x110, 0x111, 0x120});
  const TouchedMap touched = survey().touched_map();
  EXPECT_EQ(touched.at(PageNumber(0x110)), Toucher::device);
  EXPECT_EQ(touched.at(PageNumber(0x120)), Toucher::unknown);
  memory.clear_marks(pages(0x110, 2));
  expect_touched({0x120});
}

// Random stores, in random order, with the surveys between them: exactly the stored pages are touched.
TEST_P(SurveyOf, IsExactForRandomWriters) {
  std::mt19937 random(7);
  std::set<std::uint64_t> stored;
  for (int round = 0; round < 40; ++round) {
    for (int i = 0; i < 12; ++i) {
      const std::uint64_t page = first_page + random() % region_pages;
      *static_cast<volatile std::byte*>(host(page) + random() % page_size) = std::byte{1};
      stored.insert(page);
    }
    PageSet expected;
    for (const auto page : stored)
      expected.add(pages(page, 1));
    ASSERT_EQ(survey().touched, expected) << "round " << round;
  }
}

// Whatever other threads write meanwhile: a page that held data before the survey began is never zeroed.
TEST_P(SurveyOf, NeverReportsDataWhileOthersWrite) {
  constexpr std::uint64_t chunk = 8;
  std::atomic<std::uint64_t> written = 0; // pages from the start on that hold data for certain
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (std::uint64_t page = 0; page < region_pages && !stop; page += chunk) {
      for (std::uint64_t i = 0; i < chunk; ++i)
        *static_cast<volatile std::byte*>(host(first_page + page + i)) = std::byte{1};
      written.store(page + chunk, std::memory_order_release);
    }
  });
  std::uint64_t before = 0;
  do {
    before = written.load(std::memory_order_acquire);
    const Survey result = survey();
    EXPECT_FALSE(result.zeroed().intersects(pages(first_page, before))) << before << " pages were written";
  } while (before < region_pages && !HasFailure());
  stop = true;
  writer.join();
}

std::string name_of(const testing::TestParamInfo<std::tuple<Memory, EvidenceSource>>& info) {
  constexpr std::array memories = {"anonymous", "memfd", "adopted_anonymous", "adopted_memfd"};
  const auto [memory, source] = info.param;
  return std::string(memories[static_cast<std::size_t>(memory)]) +
         (source == EvidenceSource::automatic ? "_newest" : "_legacy");
}

const auto sources = testing::Values(EvidenceSource::automatic, EvidenceSource::legacy);
const auto shared_kinds = testing::Values(Memory::memfd, Memory::adopted_memfd);
const auto private_kinds = testing::Values(Memory::anonymous, Memory::adopted_anonymous);

INSTANTIATE_TEST_SUITE_P(Shared, SurveyOf, testing::Combine(shared_kinds, sources), name_of);
INSTANTIATE_TEST_SUITE_P(Private, SurveyOf, testing::Combine(private_kinds, sources), name_of);
INSTANTIATE_TEST_SUITE_P(Shared, SurveyOfShared, testing::Combine(shared_kinds, sources), name_of);
INSTANTIATE_TEST_SUITE_P(Private, SurveyOfPrivate, testing::Combine(private_kinds, sources), name_of);
INSTANTIATE_TEST_SUITE_P(Shared, SurveyOfSlice, testing::Combine(testing::Values(Memory::adopted_memfd), sources),
                         name_of);

TEST(Survey, NamesItsEvidence) {
  const GuestMemory memory(
      *MemoryMap::make({*Region::anonymous(GuestAddress(0), mib), *Region::memfd(GuestAddress(mib), mib)}));
  const Survey legacy = memory.survey({.leave_out = {}, .source = EvidenceSource::legacy});
  EXPECT_EQ(legacy.regions[0].evidence, Evidence::page_tables_read);
  EXPECT_EQ(legacy.regions[1].evidence, Evidence::page_cache_blocks);
  const test::MachineFacts& machine = test::machine_facts();
  const Survey newest = memory.survey();
  EXPECT_EQ(newest.regions[0].evidence, machine.pagemap_scan ? Evidence::page_tables_scan : Evidence::page_tables_read);
  EXPECT_EQ(newest.regions[1].evidence, machine.cachestat ? Evidence::page_cache : Evidence::page_cache_blocks);
  EXPECT_STREQ(to_string(Evidence::page_cache), "page_cache");
}

TEST(Survey, TellsAReadOfTheZeroPageFromData) {
  const Region region = *Region::anonymous(GuestAddress(0), mib);
  madvise(region.host_address(), mib, MADV_NOHUGEPAGE);
  const GuestMemory memory(*MemoryMap::make({region}));
  EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x3000)), 0U);
  // Kernels that cannot tell, and those that give the reader a page of its own: sound, less complete.
  const PageSet read = each({3});
  const bool is_told = test::machine_facts().reads_told_apart;
  EXPECT_EQ(memory.survey().touched, is_told ? PageSet() : read);
  EXPECT_EQ(memory.survey({.leave_out = {}, .source = EvidenceSource::legacy}).touched, read);
}

TEST(Survey, CountsMemoryOfUnknownNatureAsTouched) {
  void* host = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const GuestMemory memory(*MemoryMap::make({*Region::adopt(GuestAddress(0), {.host_address = host, .bytes = mib})}));
  const Survey result = memory.survey();
  EXPECT_TRUE(result.zeroed().empty());
  EXPECT_EQ(result.regions[0].evidence, Evidence::none);
  EXPECT_EQ(result.regions[0].touched_pages, 256U);
  munmap(host, mib);
}

TEST(Survey, NoticesThatAdoptedMemoryIsNoLongerWhatItWas) {
  void* host = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const GuestMemory memory(*MemoryMap::make({*Region::adopt(GuestAddress(0), {host, mib, Backing::anonymous})}));
  EXPECT_EQ(memory.survey().zeroed().page_count(), 256U);
  const int fd = memfd_create("replacement", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, mib), 0);
  ASSERT_NE(mmap(host, mib, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0), MAP_FAILED);
  ASSERT_EQ(pwrite(fd, "data", 4, 0), 4);
  const Survey result = memory.survey();
  EXPECT_TRUE(result.zeroed().empty());
  ASSERT_TRUE(result.regions[0].error);
  EXPECT_EQ(result.regions[0].error->code, MemoryErrc::wrong_nature);
  munmap(host, mib);
  close(fd);
}

TEST(Survey, NeverReportsRom) {
  const GuestMemory memory(*MemoryMap::make(
      {*Region::anonymous(GuestAddress(0), mib), *Region::memfd(GuestAddress(mib), mib, RegionKind::rom)}));
  const Survey result = memory.survey();
  EXPECT_EQ(result.zeroed(), PageSet(pages(0, 256)));
  EXPECT_EQ(result.ram, PageSet(pages(0, 256)));
  EXPECT_EQ(result.regions.size(), 2U);
}

TEST(Survey, TellsAllocatedFromWritten) {
  // fallocate gives pages that SEEK_DATA cannot tell from pages in migration; reading them settles it.
  if (test::machine_facts().shmem_thp_unasked()) GTEST_SKIP() << "here a write to a huge page writes all of it";
  const Region region = *Region::memfd(GuestAddress(0), 4 * mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_EQ(fallocate(region.file_descriptor(), FALLOC_FL_KEEP_SIZE, mib, mib), 0);
  ASSERT_EQ(pwrite(region.file_descriptor(), "x", 1, mib + mib / 2), 1);
  const Survey result = memory.survey();
  if (test::machine_facts().cachestat) {
    EXPECT_EQ(result.touched, each({0x180}));
  } else {
    // Nothing settles it: nothing is reported, and the report says why.
    EXPECT_TRUE(result.zeroed().empty());
    EXPECT_EQ(result.regions[0].unaccounted_pages, 255U);
  }
  const Survey legacy = memory.survey({.leave_out = {}, .source = EvidenceSource::legacy});
  EXPECT_TRUE(legacy.zeroed().empty());
  EXPECT_EQ(legacy.regions[0].unaccounted_pages, 255U);
  EXPECT_EQ(legacy.regions[0].evidence, Evidence::none);
}

// Compaction moves pages about, and while one is on its way SEEK_DATA does not see it (met on Linux 6.1). The pages are
// written through the descriptor, so that this process's page tables do not show them either.
TEST(Survey, NeverReportsDataInMigration) {
  if (!test::machine_facts().compaction) GTEST_SKIP() << "compaction needs root and CONFIG_COMPACTION";
  const int compact = open("/proc/sys/vm/compact_memory", O_WRONLY | O_CLOEXEC);
  ASSERT_GE(compact, 0) << errno;
  constexpr std::uint64_t all = 64 * mib / page_size;
  const Region shared = *Region::memfd(GuestAddress(0), all * page_size);
  const Region own = *Region::anonymous(GuestAddress(all * page_size), all * page_size);
  madvise(own.host_address(), all * page_size, MADV_NOHUGEPAGE);
  const GuestMemory memory(*MemoryMap::make({shared, own}));
  // Fill, then free three pages of four, so that there is something to compact.
  PageSet data;
  const std::vector<std::byte> filling(all * page_size, std::byte{1});
  ASSERT_EQ(pwrite(shared.file_descriptor(), filling.data(), filling.size(), 0), static_cast<ssize_t>(filling.size()));
  ASSERT_TRUE(memory.write(own.start(), filling));
  for (std::uint64_t page = 0; page < all; page += 4) {
    data.add(pages(page, 1));
    data.add(pages(all + page, 1));
    ASSERT_EQ(fallocate(shared.file_descriptor(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                        static_cast<off_t>((page + 1) * page_size), 3 * page_size),
              0);
    ASSERT_EQ(
        madvise(static_cast<std::byte*>(own.host_address()) + (page + 1) * page_size, 3 * page_size, MADV_DONTNEED), 0);
  }
  std::atomic<bool> stop = false;
  std::thread compactor([&] {
    while (!stop && pwrite(compact, "1", 1, 0) == 1) {
    }
  });
  for (const auto source : {EvidenceSource::automatic, EvidenceSource::legacy})
    for (int i = 0; i < 50; ++i) {
      PageSet wrong = memory.survey({.leave_out = {}, .source = source}).zeroed();
      wrong.intersect(data);
      EXPECT_TRUE(wrong.empty()) << wrong.page_count() << " pages with data were reported";
    }
  stop = true;
  compactor.join();
  close(compact);
}

TEST(Survey, ConfirmsHolesAndSaysWhatItCouldNot) {
  // More pages that SEEK_DATA calls a hole, and that are allocated all the same, than a survey is ready to read.
  constexpr std::uint64_t many = (std::uint64_t{1} << 18) + 1;
  const Region region = *Region::memfd(GuestAddress(0), 2 * many * page_size);
  if (fallocate(region.file_descriptor(), FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(many * page_size)) != 0)
    GTEST_SKIP() << "this host cannot spare 1 GiB: errno " << errno;
  const GuestMemory memory(*MemoryMap::make({region}));
  const Survey result = memory.survey();
  EXPECT_FALSE(result.zeroed().intersects(pages(0, many)));
  EXPECT_GE(result.regions[0].unaccounted_pages, many);
  if (test::machine_facts().cachestat)
    EXPECT_EQ(result.zeroed(), PageSet(pages(many, many)));
  else
    EXPECT_TRUE(result.zeroed().empty());
}

TEST(Survey, SeesARegionThatIsPluggedAndOneThatIsGone) {
  GuestMemory memory(*MemoryMap::make({*Region::anonymous(GuestAddress(0), mib)}));
  ASSERT_TRUE(memory.add_region(*Region::memfd(GuestAddress(16 * mib), mib)));
  EXPECT_EQ(memory.survey().zeroed().page_count(), 512U);
  ASSERT_TRUE(memory.remove_region(GuestAddress(0)));
  EXPECT_EQ(memory.survey().zeroed(), PageSet(pages(0x1000, 256)));
}

TEST(Survey, NeverMixesTwoMaps) {
  // Of each map, either half is full of data; a survey that mixed two would call some of the current one's data zero.
  const auto half_full = [](std::uint64_t data_start) {
    const MemoryMap map =
        *MemoryMap::make({*Region::memfd(GuestAddress(0), mib), *Region::memfd(GuestAddress(mib), mib)});
    EXPECT_TRUE(map.write(GuestAddress(data_start), std::vector<std::byte>(mib, std::byte{1})));
    return map;
  };
  GuestMemory memory(half_full(0));
  std::atomic<bool> stop = false;
  std::thread replacer([&] {
    for (std::uint64_t i = 0; !stop; ++i)
      memory.replace(half_full(i % 2 * mib));
  });
  for (int i = 0; i < 200; ++i) {
    const Survey result = memory.survey();
    EXPECT_FALSE(result.zeroed().intersects(pages(0, 256)) && result.zeroed().intersects(pages(256, 256)));
  }
  stop = true;
  replacer.join();
}

// A survey of a map that is no longer the guest's says nothing about the one that is.
TEST(Survey, ReportsNothingWhileTheMapIsReplacedAgainAndAgain) {
  // So large that the legacy survey takes far longer than a replacement.
  constexpr std::uint64_t bytes = std::uint64_t{64} << 30;
  const MemoryMap map = *MemoryMap::make({*Region::anonymous(GuestAddress(0), bytes)});
  GuestMemory memory(map);
  std::atomic<bool> stop = false;
  std::thread replacer([&] {
    while (!stop)
      memory.replace(map);
  });
  bool reported_nothing = false;
  for (int tries = 0; tries < 100 && !reported_nothing; ++tries)
    reported_nothing = memory.survey({.leave_out = {}, .source = EvidenceSource::legacy}).zeroed().empty();
  stop = true;
  replacer.join();
  EXPECT_TRUE(reported_nothing);
  EXPECT_EQ(memory.survey().zeroed().page_count(), bytes / page_size);
}

// Snapshot restore and device windows are mapped over guest memory in some VMMs.
TEST(Survey, NoticesWhatIsMappedOverItsMemory) {
  const int fd = memfd_create("over", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, mib), 0);
  ASSERT_EQ(pwrite(fd, "data", 4, 0), 4);
  for (const auto& region : {*Region::anonymous(GuestAddress(0), 4 * mib), *Region::memfd(GuestAddress(0), 4 * mib)}) {
    const GuestMemory memory(*MemoryMap::make({region}));
    EXPECT_EQ(memory.survey().zeroed().page_count(), 1024U);
    ASSERT_NE(mmap(static_cast<char*>(region.host_address()) + mib, mib, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_FIXED, fd, 0),
              MAP_FAILED);
    const Survey survey = memory.survey();
    EXPECT_TRUE(survey.zeroed().empty());
    EXPECT_EQ(survey.regions[0].error.value().code, MemoryErrc::wrong_nature);
  }
  close(fd);
}

TEST(Survey, KeepsTheLargestRangesWhateverTheGuestScatters) {
  // More touched extents than a survey keeps, and a few larger gaps among them.
  constexpr std::uint64_t extents = (1 << 18) + 1000;
  constexpr std::uint64_t all = 2 * extents + 100'000;
  for (const auto& region :
       {*Region::anonymous(GuestAddress(0), all * page_size), *Region::memfd(GuestAddress(0), all * page_size)}) {
    madvise(region.host_address(), all * page_size, MADV_NOHUGEPAGE);
    std::uint64_t page = 0;
    PageSet gaps;
    for (std::uint64_t i = 0; i < extents; ++i) {
      static_cast<volatile std::byte*>(region.host_address())[page * page_size] = std::byte{1};
      const std::uint64_t gap = i % 1000 == 999 ? 1 + i / 1000 : 1;
      if (gap > 1) gaps.add(pages(page + 1, gap));
      page += 1 + gap;
    }
    gaps.add(pages(page - 1, all - page + 1));
    const GuestMemory memory(*MemoryMap::make({region}));
    for (const auto source : {EvidenceSource::automatic, EvidenceSource::legacy}) {
      const Survey result = memory.survey({.leave_out = {}, .source = source});
      const PageSet zeroed = result.zeroed();
      EXPECT_EQ(zeroed.largest(255), gaps.largest(255));
      EXPECT_GT(result.regions[0].given_up_pages, 0U);
      EXPECT_LT(zeroed.range_count(), (1U << 18) + 1);
      for (std::uint64_t i = 0; i < 1000; i += 2)
        EXPECT_FALSE(zeroed.contains(PageNumber(i)));
    }
  }
}

} // namespace
