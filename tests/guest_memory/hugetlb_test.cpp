#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <gtest/gtest.h>
#include <linux/falloc.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <sched.h>
#include <stop_token>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fcntl.h>

#include "support/descriptor.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"

import cppvmm.guest_memory;

// Surveys of huge pages while their page table entries come and go: pages that migrate, that are copied on write, that
// are discarded, and entries of no page.

using namespace cppvmm;

namespace {

constexpr std::uint64_t huge = std::uint64_t{2} << 20;
constexpr std::uint64_t pages_of_huge = huge / page_size;

PageRange huge_pages(std::uint64_t first, std::uint64_t count) {
  return *PageRange::make(PageNumber(first * pages_of_huge), count * pages_of_huge);
}

char* host_of(const Region& region, std::uint64_t huge_page) {
  return static_cast<char*>(region.host_address()) + huge_page * huge;
}

void store(const Region& region, std::uint64_t huge_page, char value = 1) {
  *static_cast<volatile char*>(host_of(region, huge_page)) = value;
}

/// Runs in a process of its own, which has the region's memory too; whether it came through.
bool in_child(const std::function<void()>& run) {
  const pid_t child = fork();
  if (child == 0) {
    run();
    _exit(0);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

constexpr std::array sources = {EvidenceSource::automatic, EvidenceSource::legacy};

const char* name_of(EvidenceSource source) { return source == EvidenceSource::automatic ? "automatic" : "legacy"; }

class HugePages : public testing::Test {
protected:
  void SetUp() override {
    auto taken = test::HugePagePool::take(pool_pages);
    if (!taken) GTEST_SKIP() << taken.error();
    pool.emplace(std::move(*taken));
  }

  static constexpr long pool_pages = 48;
  std::optional<test::HugePagePool> pool;
};

/// What is done to the pages with data while they are surveyed.
enum class Disturbance { migration, copy_on_write };

class DisturbedHugePages : public HugePages, public testing::WithParamInterface<Disturbance> {
protected:
  static constexpr std::uint64_t data_pages = 8;
  static constexpr int surveys = 200;

  void SetUp() override {
    HugePages::SetUp();
    if (!IsSkipped() && GetParam() == Disturbance::migration &&
        !std::filesystem::exists("/sys/devices/system/node/node1"))
      GTEST_SKIP() << "this machine has one NUMA node: ./dev lab --numa 2 has two";
  }

  /// Moves the first pages from node to node, or has a child share them and writes them, until it is stopped.
  static void disturb(const Region& region, const std::stop_token& stop, std::atomic<long>& disturbed) {
    for (int node = 1; !stop.stop_requested(); node = 1 - node) {
      if (GetParam() == Disturbance::migration) {
        std::array<void*, data_pages> addresses{};
        for (std::uint64_t page = 0; page < data_pages; ++page)
          addresses[page] = host_of(region, page);
        std::array<int, data_pages> nodes{};
        nodes.fill(node);
        std::array<int, data_pages> status{};
        constexpr int move = 2; // MPOL_MF_MOVE
        if (syscall(SYS_move_pages, 0, data_pages, addresses.data(), nodes.data(), status.data(), move) >= 0)
          disturbed += std::ranges::count(status, node);
        continue;
      }
      std::array<int, 2> ends{};
      if (pipe2(ends.data(), O_CLOEXEC) != 0) return;
      const test::Descriptor wait(ends[0]);
      std::optional<test::Descriptor> go(ends[1]);
      const pid_t child = fork();
      if (child == 0) {
        close(ends[1]);
        char none = 0;
        _exit(read(ends[0], &none, 1) == 0 ? 0 : 1);
      }
      if (child < 0) return;
      for (std::uint64_t page = 0; page < data_pages; ++page)
        store(region, page);
      disturbed += data_pages;
      go.reset();
      waitpid(child, nullptr, 0);
    }
  }

  static void survey_disturbed(const Region& region, const PageSet& empty) {
    for (std::uint64_t page = 0; page < data_pages; ++page)
      store(region, page);
    const GuestMemory memory(*MemoryMap::make({region}));
    std::atomic<long> disturbed = 0;
    const std::jthread other([&](const std::stop_token& stop) { disturb(region, stop, disturbed); });
    for (const auto source : sources) {
      int unsound = 0;
      int incomplete = 0;
      int without = 0;
      for (int i = 0; i < surveys; ++i) {
        const Survey survey = memory.survey({.leave_out = {}, .source = source});
        PageSet wrong = survey.zeroed();
        wrong.remove(empty);
        if (!wrong.empty()) ++unsound;
        if (survey.regions[0].evidence == Evidence::none)
          ++without;
        else if (survey.zeroed() != empty)
          ++incomplete;
      }
      EXPECT_EQ(unsound, 0) << "of " << surveys << " surveys, " << name_of(source);
      EXPECT_EQ(incomplete, unsound) << name_of(source);
      // By their number, which takes as many looks as it takes, not all; with the lock, nearly all.
      if (source == EvidenceSource::legacy || !test::machine_facts().async_write_protect)
        EXPECT_LT(without, surveys) << name_of(source);
      else
        EXPECT_LE(without * 20, surveys) << name_of(source);
      RecordProperty(std::string("without_evidence_") + name_of(source), without);
    }
    EXPECT_GT(disturbed.load(), 0);
  }
};

TEST_P(DisturbedHugePages, OfPrivateMemoryAreNeverReported) {
  const Region region = *Region::hugetlb(GuestAddress(0), 2 * data_pages * huge, HugePageSize::two_mib);
  survey_disturbed(region, PageSet(huge_pages(data_pages, data_pages)));
}

TEST_P(DisturbedHugePages, OfAFileAreNeverReported) {
  if (GetParam() == Disturbance::copy_on_write) GTEST_SKIP() << "shared memory is not copied on write";
  const Region region = *Region::hugetlb_memfd(GuestAddress(0), 2 * data_pages * huge, HugePageSize::two_mib);
  survey_disturbed(region, PageSet(huge_pages(data_pages, data_pages)));
}

TEST_P(DisturbedHugePages, OfAPrivateFileAreNeverReported) {
  constexpr std::uint64_t bytes = 2 * data_pages * huge;
  const test::Descriptor file(memfd_create("snapshot", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB));
  ASSERT_EQ(ftruncate(file.number(), bytes), 0);
  // Half of the data is the file's, until it is copied.
  ASSERT_EQ(fallocate(file.number(), 0, 0, data_pages / 2 * huge), 0);
  const Region region = *Region::private_file(GuestAddress(0), bytes, file.number(), 0);
  survey_disturbed(region, PageSet(huge_pages(data_pages, data_pages)));
}

TEST_P(DisturbedHugePages, AreNotTakenForOneThatIsDiscardedAndComesBack) {
  if (!test::machine_facts().hugetlb_dontneed) GTEST_SKIP() << "MADV_DONTNEED does not take huge pages here";
  const Region region = *Region::hugetlb(GuestAddress(0), 2 * data_pages * huge, HugePageSize::two_mib);
  const std::jthread balloon([&region](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      if (madvise(host_of(region, data_pages), huge, MADV_DONTNEED) != 0) return;
      store(region, data_pages);
    }
  });
  for (std::uint64_t page = 0; page < data_pages; ++page)
    store(region, page);
  const GuestMemory memory(*MemoryMap::make({region}));
  std::atomic<long> disturbed = 0;
  const std::jthread other([&](const std::stop_token& stop) { disturb(region, stop, disturbed); });
  for (const auto source : sources) {
    int unsound = 0;
    for (int i = 0; i < surveys; ++i) {
      PageSet wrong = memory.survey({.leave_out = {}, .source = source}).zeroed();
      wrong.intersect(PageSet(huge_pages(0, data_pages)));
      if (!wrong.empty()) ++unsound;
    }
    EXPECT_EQ(unsound, 0) << "of " << surveys << " surveys, " << name_of(source);
  }
}

INSTANTIATE_TEST_SUITE_P(Hugetlb, DisturbedHugePages,
                         testing::Values(Disturbance::migration, Disturbance::copy_on_write),
                         [](const auto& disturbance) {
                           return disturbance.param == Disturbance::migration ? "Migration" : "CopyOnWrite";
                         });

/// A userfaultfd of the embedder's.
class Userfaultfd {
public:
  explicit Userfaultfd(std::uint64_t features)
      : descriptor_(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY))) {
    uffdio_api api{.api = UFFD_API, .features = features, .ioctls = 0};
    works_ = descriptor_.is_open() && ioctl(descriptor_.number(), UFFDIO_API, &api) == 0;
  }

  [[nodiscard]] bool add(const Region& region, std::uint64_t huge_pages, std::uint64_t mode) const {
    uffdio_register request{};
    request.range = range(region, huge_pages);
    request.mode = mode;
    return works_ && ioctl(descriptor_.number(), UFFDIO_REGISTER, &request) == 0;
  }
  [[nodiscard]] bool protect(const Region& region, std::uint64_t huge_pages) const {
    uffdio_writeprotect request{};
    request.range = range(region, huge_pages);
    request.mode = UFFDIO_WRITEPROTECT_MODE_WP;
    return ioctl(descriptor_.number(), UFFDIO_WRITEPROTECT, &request) == 0;
  }
  [[nodiscard]] bool poison(const Region& region, std::uint64_t huge_pages) const {
    // include/uapi/linux/userfaultfd.h (Linux 6.6).
    struct Poison {
      uffdio_range range;
      std::uint64_t mode;
      std::int64_t updated;
    } request{range(region, huge_pages), 0, 0};
    return ioctl(descriptor_.number(), _IOWR(UFFDIO, 8, Poison), &request) == 0;
  }
  [[nodiscard]] bool remove(const Region& region, std::uint64_t huge_pages) const {
    uffdio_range request = range(region, huge_pages);
    return ioctl(descriptor_.number(), UFFDIO_UNREGISTER, &request) == 0;
  }

private:
  [[nodiscard]] static uffdio_range range(const Region& region, std::uint64_t huge_pages) {
    return {.start = reinterpret_cast<std::uintptr_t>(region.host_address()), .len = huge_pages * huge};
  }

  test::Descriptor descriptor_;
  bool works_ = false;
};

constexpr std::uint64_t feature_wp_hugetlbfs_shmem = 1 << 12;
constexpr std::uint64_t feature_poison = 1 << 14;

class SharedHugePages : public HugePages {
protected:
  /// Another process writes one.
  static bool store_elsewhere(const Region& region, std::uint64_t huge_page) {
    return in_child([&] { store(region, huge_page); });
  }
};

TEST_F(SharedHugePages, OfAnotherProcessAreFound) {
  const Region region = *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  store(region, 2);
  ASSERT_TRUE(store_elsewhere(region, 5));
  PageSet touched(huge_pages(2, 1));
  touched.add(huge_pages(5, 1));
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_EQ(survey.touched, touched);
    EXPECT_EQ(survey.regions[0].evidence, Evidence::page_cache_lookup);
  }
}

TEST_F(SharedHugePages, AreNotTakenForProtectedOnes) {
  const Userfaultfd other(feature_wp_hugetlbfs_shmem);
  const Region region = *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_TRUE(store_elsewhere(region, 5));
  if (!other.add(region, 2, UFFDIO_REGISTER_MODE_WP)) GTEST_SKIP() << "huge pages cannot be write-protected here";
  ASSERT_TRUE(other.protect(region, 1));
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_FALSE(survey.zeroed().contains(PageNumber(5 * pages_of_huge)));
    EXPECT_EQ(survey.regions[0].evidence, Evidence::none) << "another userfaultfd has the memory";
    ASSERT_TRUE(survey.regions[0].error);
    EXPECT_EQ(survey.regions[0].error->os_error, EBUSY);
  }
  ASSERT_TRUE(other.remove(region, 2));
  EXPECT_EQ(memory.survey().touched, PageSet(huge_pages(5, 1)));
}

TEST_F(SharedHugePages, AreNotTakenForPoisonedOnes) {
  const Region region = *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_TRUE(store_elsewhere(region, 5));
  {
    const Userfaultfd other(feature_poison);
    if (!other.add(region, 2, UFFDIO_REGISTER_MODE_MISSING) || !other.poison(region, 1))
      GTEST_SKIP() << "this kernel, or this process, cannot poison memory";
    ASSERT_TRUE(other.remove(region, 2));
  }
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_FALSE(survey.zeroed().contains(PageNumber(5 * pages_of_huge)));
    EXPECT_FALSE(survey.zeroed().contains(PageNumber(0))) << "which cannot be read";
    EXPECT_TRUE(survey.zeroed().contains(PageNumber(pages_of_huge)));
  }
}

TEST_F(SharedHugePages, AreNotTakenForOneThatAnotherProcessPunchesOut) {
  const Region region = *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_TRUE(store_elsewhere(region, 5));
  std::array<int, 2> ends{};
  ASSERT_EQ(pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK), 0);
  const test::Descriptor wait(ends[0]);
  std::optional<test::Descriptor> go(ends[1]);
  const pid_t child = fork();
  if (child == 0) {
    close(ends[1]);
    char none = 0;
    while (read(ends[0], &none, 1) != 0)
      if (fallocate(region.file_descriptor(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, huge) != 0) _exit(1);
    _exit(0);
  }
  ASSERT_GT(child, 0);
  int unsound = 0;
  for (int i = 0; i < 500; ++i) {
    store(region, 0);
    if (memory.survey().zeroed().contains(PageNumber(5 * pages_of_huge))) ++unsound;
  }
  go.reset();
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(unsound, 0);
}

class SurveyedHugePages : public HugePages {
protected:
  /// VmFlags of the region's mapping.
  static std::string flags_of(const Region& region) {
    std::ifstream smaps("/proc/self/smaps");
    bool is_it = false;
    for (std::string line; std::getline(smaps, line);) {
      if (line.find('-') != std::string::npos && line.find(' ') > line.find('-'))
        is_it = std::strtoull(line.c_str(), nullptr, 16) == reinterpret_cast<std::uintptr_t>(region.host_address());
      if (is_it && line.starts_with("VmFlags:")) return line;
    }
    return {};
  }
  static std::ptrdiff_t open_descriptors() {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  }
};

TEST_F(SurveyedHugePages, AreLeftAsTheyWere) {
  for (const bool is_shared : {false, true}) {
    const Region region = is_shared ? *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib)
                                    : *Region::hugetlb(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
    const GuestMemory memory(*MemoryMap::make({region}));
    store(region, 3, 42);
    const std::string flags = flags_of(region);
    ASSERT_FALSE(flags.empty());
    const std::ptrdiff_t descriptors = open_descriptors();
    for (int i = 0; i < 3; ++i)
      for (const auto source : sources) {
        EXPECT_EQ(memory.survey({.leave_out = {}, .source = source}).touched, PageSet(huge_pages(3, 1)));
        EXPECT_EQ(flags_of(region), flags);
        EXPECT_EQ(open_descriptors(), descriptors);
      }
    EXPECT_EQ(*host_of(region, 3), 42);
    store(region, 4);
    EXPECT_EQ(memory.survey().touched, PageSet(huge_pages(3, 2)));
  }
}

TEST_F(SurveyedHugePages, StayOneMappingWhenPartsOfThemAreDiscarded) {
  if (!test::machine_facts().hugetlb_dontneed) GTEST_SKIP() << "this kernel discards no huge pages of private memory";
  const Region region = *Region::hugetlb(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  for (std::uint64_t page = 0; page < 8; page += 2)
    store(region, page, 42);
  for (std::uint64_t page = 0; page < 8; ++page) {
    const auto done = region.discard(*PageRange::make(PageNumber(page * 512 + 7), 3));
    ASSERT_TRUE(done) << done.error().message();
  }
  std::ifstream maps("/proc/self/maps");
  const auto start = reinterpret_cast<std::uintptr_t>(region.host_address());
  int mappings = 0;
  for (std::string line; std::getline(maps, line);) {
    const auto at = std::strtoull(line.c_str(), nullptr, 16);
    if (start <= at && at < start + 8 * huge) ++mappings;
  }
  EXPECT_EQ(mappings, 1);
  EXPECT_EQ(*host_of(region, 2), 42);
}

// fork copies entries of pages in migration and does not count them.
TEST_F(SurveyedHugePages, AreNotCountedInAForkedProcess) {
  const Region region = *Region::hugetlb(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  store(region, 3);
  const pid_t child = fork();
  if (child == 0) {
    const Survey survey = memory.survey({.leave_out = {}, .source = EvidenceSource::legacy});
    _exit(survey.zeroed().empty() && survey.regions[0].evidence == Evidence::none ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

// What the test below starts, as the first process of a namespace; with huge pages of its pool.
TEST(FirstProcess, DISABLED_ItsHugePagesAreNotCountedInItsFork) {
  ASSERT_EQ(getpid(), 1);
  const Region region = *Region::hugetlb(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  store(region, 3);
  ASSERT_EQ(unshare(CLONE_NEWPID), 0);
  EXPECT_TRUE(in_child([&] {
    const Survey survey = memory.survey({.leave_out = {}, .source = EvidenceSource::legacy});
    if (getpid() != 1 || survey.regions[0].evidence != Evidence::none) _exit(1);
  }));
  // Whose children are of another namespace cannot have one look for its leaks at exit: LeakSanitizer gives up.
  std::fflush(nullptr);
  _exit(HasFailure() ? 1 : 0);
}

TEST_F(SurveyedHugePages, AreNotCountedInAForkThatHasTheSameProcessId) {
  if (!in_child([] {
        if (unshare(CLONE_NEWPID) != 0) _exit(1);
      }))
    GTEST_SKIP() << "no process namespaces here";
  EXPECT_TRUE(in_child([] {
    if (unshare(CLONE_NEWPID) != 0) _exit(1);
    const bool is_right = in_child([] {
      execl("/proc/self/exe", "guest_memory_tests", "--gtest_also_run_disabled_tests", "--gtest_filter=FirstProcess.*",
            nullptr);
    });
    _exit(is_right ? 0 : 1);
  }));
}

TEST_F(SurveyedHugePages, MayHaveNoPageTablesAtAll) {
  constexpr std::uint64_t bytes = std::uint64_t{5} << 30;
  void* const host =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE, -1, 0);
  ASSERT_NE(host, MAP_FAILED);
  {
    const auto region = Region::adopt(GuestAddress(0), {host, bytes, Backing::hugetlb});
    ASSERT_TRUE(region) << region.error().message();
    const GuestMemory memory(*MemoryMap::make({*region}));
    PageSet touched;
    for (const std::uint64_t page : std::array<std::uint64_t, 5>{0, 1, 700, 1537, 2559}) {
      for (const auto source : sources)
        EXPECT_EQ(memory.survey({.leave_out = {}, .source = source}).touched, touched) << name_of(source);
      store(*region, page);
      touched.add(huge_pages(page, 1));
    }
    for (const auto source : sources)
      EXPECT_EQ(memory.survey({.leave_out = {}, .source = source}).touched, touched) << name_of(source);
  }
  munmap(host, bytes);
}

TEST_F(SurveyedHugePages, MayBelongToAUserfaultfd) {
  const Region region = *Region::hugetlb(GuestAddress(0), 8 * huge, HugePageSize::two_mib);
  const GuestMemory memory(*MemoryMap::make({region}));
  const Userfaultfd other(feature_wp_hugetlbfs_shmem);
  if (!other.add(region, 2, UFFDIO_REGISTER_MODE_WP)) GTEST_SKIP() << "huge pages cannot be write-protected here";
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_TRUE(survey.zeroed().empty());
    EXPECT_EQ(survey.regions[0].evidence, Evidence::none);
    ASSERT_TRUE(survey.regions[0].error);
    EXPECT_EQ(survey.regions[0].error->os_error, EBUSY);
  }
  ASSERT_TRUE(other.remove(region, 2)) << "it is the embedder's still";
  EXPECT_EQ(memory.survey().zeroed().page_count(), 8 * pages_of_huge);
}

TEST_F(SurveyedHugePages, AreWatchedAndSurveyedByManyAtOnce) {
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << "no asynchronous write protection here";
  for (const auto& region : {*Region::hugetlb(GuestAddress(0), 8 * huge, HugePageSize::two_mib),
                             *Region::hugetlb_memfd(GuestAddress(0), 8 * huge, HugePageSize::two_mib)}) {
    GuestMemory memory(*MemoryMap::make({region}));
    store(region, 3);
    std::atomic<int> unsound = 0;
    std::atomic<int> unknown = 0;
    {
      std::vector<std::jthread> threads;
      for (int thread = 0; thread < 2; ++thread)
        threads.emplace_back([&] {
          for (int i = 0; i < 100; ++i) {
            const Survey survey = memory.survey();
            if (survey.zeroed().contains(PageNumber(3 * pages_of_huge))) ++unsound;
            if (survey.regions[0].evidence == Evidence::none) ++unknown;
          }
        });
      for (int i = 0; i < 100; ++i) {
        const auto armed = memory.arm_write_watch(
            GuestAddress(0), {.baseline = Baseline::content, .written_through_this_mapping_only = true});
        ASSERT_TRUE(armed) << armed.error().message();
        EXPECT_TRUE(memory.disarm_write_watch(GuestAddress(0)));
      }
    }
    EXPECT_EQ(unsound.load(), 0);
    EXPECT_EQ(unknown.load(), 0);
  }
}

/// Whether the memory is shared.
class GigabytePages : public testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Kinds, GigabytePages, testing::Bool(),
                         [](const auto& info) { return info.param ? "hugetlb_memfd" : "hugetlb"; });

TEST_P(GigabytePages, AreTouchedAndDiscardedAsAWhole) {
  constexpr std::uint64_t gib = std::uint64_t{1} << 30;
  constexpr GuestAddress start(4 * gib);
  const auto region = GetParam() ? Region::hugetlb_memfd(start, gib, HugePageSize::one_gib)
                                 : Region::hugetlb(start, gib, HugePageSize::one_gib);
  if (!region) GTEST_SKIP() << "the pool has no page of 1 GiB: " << region.error().message();
  GuestMemory memory(*MemoryMap::make({*region}));
  for (const auto source : sources) {
    SurveyOptions options;
    options.source = source;
    const auto look = [&] { return memory.survey(options); };
    EXPECT_TRUE(look().touched.empty()) << name_of(source) << ": " << to_string(look().regions[0].evidence);
    ASSERT_TRUE(memory.write_value(GuestAddress(5 * gib - 8), std::uint64_t{1}));
    const PageRange whole = region->pages();
    EXPECT_EQ(look().touched, PageSet(whole)) << name_of(source) << ": " << to_string(look().regions[0].evidence);
    const auto discarded = memory.discard(PageSet(whole));
    ASSERT_TRUE(discarded) << discarded.error().message();
    EXPECT_EQ(discarded->freed_pages, whole.count());
    EXPECT_TRUE(look().touched.empty()) << name_of(source);
    EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(5 * gib - 8)), 0U);
    ASSERT_TRUE(memory.reset()); // for reading has brought a page
  }
}

} // namespace
