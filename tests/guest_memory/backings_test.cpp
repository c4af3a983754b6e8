#include <atomic>
#include <barrier>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <initializer_list>
#include <linux/userfaultfd.h>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "support/huge_pages_test.hpp"
#include "support/machine_facts.hpp"

import cppvmm.guest_memory;

// The kinds of memory whose evidence is of their own: huge pages, files, shared anonymous memory, userfaultfd.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t huge = 2 * mib;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

void store(const Region& region, std::uint64_t offset, char value = 1) {
  static_cast<volatile char*>(region.host_address())[offset] = value;
}

constexpr EvidenceSource sources[] = {EvidenceSource::automatic, EvidenceSource::legacy};

class HugetlbPages : public test::HugePagesTest {};

TEST_F(HugetlbPages, OfPrivateMemoryAreToldApart) {
  const Region region = *Region::hugetlb(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  for (const auto source : sources)
    EXPECT_EQ(memory.survey({.leave_out = {}, .source = source}).zeroed().page_count(), 8 * 512U);
  store(region, 3 * huge + 5);
  ASSERT_TRUE(memory.write_value(GuestAddress(7 * huge), std::uint8_t{0}));
  PageSet touched(pages(3 * 512, 512));
  touched.add(pages(7 * 512, 512));
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_EQ(survey.touched, touched);
    EXPECT_EQ(*region.resident_bytes(), 2 * huge);
  }
}

TEST_F(HugetlbPages, OfAFileAreFoundWhoeverWroteThem) {
  const Region region = *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  store(region, 3 * huge + 5);
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_EQ(survey.touched, PageSet(pages(3 * 512, 512)));
    EXPECT_EQ(survey.regions[0].evidence, Evidence::page_cache_lookup);
  }
  // Another process writes.
  const pid_t child = fork();
  if (child == 0) {
    void* view = mmap(nullptr, 8 * huge, PROT_READ | PROT_WRITE, MAP_SHARED, region.file_descriptor(), 0);
    if (view == MAP_FAILED) _exit(1);
    static_cast<volatile char*>(view)[5 * huge] = 1;
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  PageSet touched(pages(3 * 512, 512));
  touched.add(pages(5 * 512, 512));
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_EQ(survey.touched, touched);
    EXPECT_EQ(survey.regions[0].unaccounted_pages, 0U);
  }
}

TEST_F(HugetlbPages, OfAFileAreNotTakenForOneThatIsDiscardedMeanwhile) {
  const Region region = *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  const pid_t child = fork();
  if (child == 0) {
    void* view = mmap(nullptr, 8 * huge, PROT_READ | PROT_WRITE, MAP_SHARED, region.file_descriptor(), 0);
    if (view == MAP_FAILED) _exit(1);
    static_cast<volatile char*>(view)[5 * huge] = 1;
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  // One huge page is mapped here, and another one is allocated: as many, once the first is discarded.
  static constexpr int rounds = 3000;
  std::barrier each_round(2);
  std::jthread balloon([&region, &each_round] {
    for (int round = 0; round < rounds; ++round) {
      each_round.arrive_and_wait();
      for (volatile int wait = round % 300 * 300; wait > 0;)
        wait = wait - 1;
      EXPECT_TRUE(region.discard(pages(0, 512)));
      each_round.arrive_and_wait();
    }
  });
  int unsound = 0;
  for (int round = 0; round < rounds; ++round) {
    store(region, 0);
    each_round.arrive_and_wait();
    if (memory.survey().zeroed().contains(PageNumber(5 * 512))) ++unsound;
    each_round.arrive_and_wait();
  }
  EXPECT_EQ(unsound, 0);
}

TEST_F(HugetlbPages, AreAdoptedAsWhatTheyAre) {
  void* host = mmap(nullptr, 2 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
  ASSERT_NE(host, MAP_FAILED);
  EXPECT_EQ(Region::adopt(GuestAddress(0), {host, 2 * huge, Backing::anonymous}).error().code,
            MemoryErrc::wrong_nature);
  const auto region = Region::adopt(GuestAddress(0), {host, 2 * huge, Backing::hugetlb});
  ASSERT_TRUE(region) << region.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  store(*region, huge);
  EXPECT_EQ(memory.survey().zeroed(), PageSet(pages(0, 512)));
  munmap(host, 2 * huge);
}

/// A sparse file on a disk (or on whatever this machine has its build folder on): data in page 5, holes elsewhere.
class SnapshotFile : public testing::Test {
protected:
  void SetUp() override {
    std::string name = "snapshot-XXXXXX";
    fd = mkstemp(name.data());
    ASSERT_GE(fd, 0);
    unlink(name.c_str());
    ASSERT_EQ(ftruncate(fd, 4 * mib), 0);
    facts = test::file_facts(fd);
    ASSERT_TRUE(facts.can_be_made);
    if (!facts.tell_holes || !facts.pages_are_known)
      GTEST_SKIP() << "this file system does not tell holes, or not truly";
    if (!facts.named_by_fstat)
      GTEST_SKIP() << "fstat and /proc/self/maps name this file differently (overlayfs, btrfs)";
    ASSERT_EQ(pwrite(fd, "snapshot", 8, 5 * page_size), 8);
    ASSERT_EQ(fsync(fd), 0);
    const off_t data = lseek(fd, 0, SEEK_DATA);
    ASSERT_GT(data, 0);
    data_first = static_cast<std::uint64_t>(data) / page_size;
    data_end = (static_cast<std::uint64_t>(lseek(fd, data, SEEK_HOLE)) + page_size - 1) / page_size;
  }
  void TearDown() override { close(fd); }

  int fd = -1;
  test::FileFacts facts;
  std::uint64_t data_first = 0; // the file system's blocks may be larger than a page, or smaller
  std::uint64_t data_end = 0;
};

TEST_F(SnapshotFile, MappedPrivatelyHasDataAndCopies) {
  const auto region = Region::private_file(GuestAddress(0), 4 * mib, fd, 0);
  ASSERT_TRUE(region) << region.error().message();
  const auto set = region->set_huge_pages(HugePages::never);
  ASSERT_TRUE(set || set.error().code == MemoryErrc::unavailable) << set.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  PageSet touched(pages(data_first, data_end - data_first));
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_EQ(survey.touched, touched) << survey.regions[0].error.value_or(MemoryError{}).message();
  }
  // Reading brings pages of the file in, holes too: they are still no data (but tmpfs makes them so).
  for (std::uint64_t page = 0; page < 1024 && !facts.reads_make_data; ++page)
    static_cast<void>(static_cast<volatile char*>(region->host_address())[page * page_size]);
  EXPECT_EQ(*memory.read_value<char>(GuestAddress(5 * page_size)), 's');
  store(*region, 100 * page_size);
  store(*region, 200 * page_size, 0);
  touched.add(pages(100, 1));
  touched.add(pages(200, 1));
  for (const auto source : sources)
    EXPECT_EQ(memory.survey({.leave_out = {}, .source = source}).touched, touched);
}

TEST_F(SnapshotFile, MappedSharedHasWhatAnyoneWrote) {
  void* host = mmap(nullptr, 4 * mib, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(host, MAP_FAILED);
  const auto region = Region::adopt(GuestAddress(0), {host, 4 * mib, Backing::shared_file, fd, 0});
  if (facts.in_memory) {
    EXPECT_EQ(region.error().code, MemoryErrc::wrong_nature) << "which is a memfd's kind of file";
    munmap(host, 4 * mib);
    return;
  }
  ASSERT_TRUE(region) << region.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  store(*region, 300 * page_size);
  ASSERT_EQ(pwrite(fd, "x", 1, 400 * page_size), 1);
  const Survey survey = memory.survey();
  for (const std::uint64_t page : {data_first, std::uint64_t{300}, std::uint64_t{400}})
    EXPECT_FALSE(survey.zeroed().contains(PageNumber(page)));
  EXPECT_EQ(survey.regions[0].evidence, test::machine_facts().cachestat ? Evidence::page_cache : Evidence::none);
  if (test::machine_facts().cachestat) EXPECT_GT(survey.zeroed().page_count(), 900U);
  // Without cachestat nothing confirms a hole of a file that others may write.
  EXPECT_TRUE(memory.survey({.leave_out = {}, .source = EvidenceSource::legacy}).zeroed().empty());
  munmap(host, 4 * mib);
}

TEST_F(SnapshotFile, IsRefusedWhenItIsTooShort) {
  EXPECT_EQ(Region::private_file(GuestAddress(0), 8 * mib, fd, 0).error().code, MemoryErrc::invalid_argument);
  EXPECT_EQ(Region::private_file(GuestAddress(0), 4 * mib, fd, page_size).error().code, MemoryErrc::invalid_argument);
  EXPECT_EQ(Region::private_file(GuestAddress(0), mib, fd, UINT64_MAX & ~std::uint64_t{0xFFF}).error().code,
            MemoryErrc::invalid_argument);
  EXPECT_EQ(Region::private_file(GuestAddress(0), mib, fd, 5).error().code, MemoryErrc::invalid_argument);
}

TEST(SharedAnonymous, IsSurveyedThroughItsHiddenFile) {
  void* host = mmap(nullptr, 4 * mib, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  madvise(host, 4 * mib, MADV_NOHUGEPAGE);
  EXPECT_FALSE(Region::adopt(GuestAddress(0), {host, 4 * mib, Backing::anonymous}));
  // Not from the start of the mapping.
  auto* const inside = static_cast<char*>(host) + mib;
  const auto region = Region::adopt(GuestAddress(0), {inside, 2 * mib, Backing::shared_anonymous});
  ASSERT_TRUE(region) << region.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  const pid_t child = fork();
  if (child == 0) {
    store(*region, 7 * page_size);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  store(*region, 9 * page_size);
  static_cast<volatile char*>(host)[0] = 1;
  PageSet touched(pages(7, 1));
  touched.add(pages(9, 1));
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    if (!test::machine_facts().map_files) {
      // Only a privileged process may look there.
      EXPECT_TRUE(survey.zeroed().empty());
      ASSERT_TRUE(survey.regions[0].error);
      EXPECT_EQ(survey.regions[0].error->os_error, EPERM);
    } else {
      EXPECT_EQ(survey.touched, touched);
    }
  }
  munmap(host, 4 * mib);
}

// Whatever happens to the mappings while they are listed: what is not in the list is not known.
TEST(SharedAnonymous, CountsWhereItIsGoneWhileMappingsAreListed) {
  if (!test::machine_facts().map_files) GTEST_SKIP() << "/proc/self/map_files needs privileges";
  constexpr std::uint64_t half = mib;
  const auto map = [](void* at, std::uint64_t bytes, int flags) {
    return static_cast<char*>(mmap(at, bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0));
  };
  // Two mappings, of a file each, and room to move the second one to. Who else maps memory meanwhile takes the higher
  // of two gaps, and so not the one that the second leaves.
  constexpr std::uint64_t space = 512 * mib;
  char* const host = map(nullptr, 2 * space, MAP_PRIVATE | MAP_NORESERVE);
  ASSERT_NE(host, MAP_FAILED);
  ASSERT_EQ(munmap(host + space, space), 0);
  ASSERT_NE(map(host, half, MAP_SHARED | MAP_FIXED), MAP_FAILED);
  ASSERT_NE(map(host + half, half, MAP_SHARED | MAP_FIXED), MAP_FAILED);
  for (std::uint64_t page = 0; page < half / page_size; ++page)
    static_cast<volatile char*>(host + half)[page * page_size] = 1;
  const auto region = Region::adopt(GuestAddress(0), {host, 2 * half, Backing::shared_anonymous});
  ASSERT_TRUE(region) << region.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  std::atomic<bool> stop = false;
  std::jthread mover([&] {
    const auto move = [&](char* from, char* to) {
      return mremap(from, half, half, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED;
    };
    while (!stop)
      if (!move(host + half, host + 3 * half) || !move(host + 3 * half, host + half)) ADD_FAILURE() << errno;
  });
  int unsound = 0;
  for (int i = 0; i < 5000; ++i)
    if (memory.survey().zeroed().intersects(pages(half / page_size, half / page_size))) ++unsound;
  stop = true;
  mover.join();
  EXPECT_EQ(unsound, 0);
  munmap(host, space);
}

TEST(Userfaultfd, MemoryThatAHandlerFillsIsNeverReported) {
  if (!test::machine_facts().userfaultfd) GTEST_SKIP() << "this kernel, or this process, has no userfaultfd";
  const int uffd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY));
  ASSERT_GE(uffd, 0) << errno;
  uffdio_api api{.api = UFFD_API, .features = 0, .ioctls = 0};
  ASSERT_EQ(ioctl(uffd, UFFDIO_API, &api), 0);
  for (const auto& region : {*Region::anonymous(GuestAddress(0), mib), *Region::memfd(GuestAddress(0), mib)}) {
    const GuestMemory memory(*MemoryMap::make({region}));
    EXPECT_EQ(memory.survey().zeroed().page_count(), 256U);
    uffdio_register request{};
    request.range = {.start = reinterpret_cast<std::uintptr_t>(region.host_address()) + mib / 2, .len = page_size};
    request.mode = UFFDIO_REGISTER_MODE_MISSING;
    ASSERT_EQ(ioctl(uffd, UFFDIO_REGISTER, &request), 0);
    EXPECT_TRUE(memory.survey().zeroed().empty());
    ASSERT_EQ(ioctl(uffd, UFFDIO_UNREGISTER, &request.range), 0);
    EXPECT_EQ(memory.survey().zeroed().page_count(), 256U);
  }
  close(uffd);
}

} // namespace
