#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <gtest/gtest.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <string>
#include <string_view>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <tuple>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"
#include "support/system_calls.hpp"

import cppvmm.guest_memory;

// Memory of which the kernel's list of mappings, and a registration that fails, tell all that has to be known.

using namespace cppvmm;

namespace {

constexpr std::uint64_t huge = std::uint64_t{2} << 20;
constexpr std::uint64_t bytes = 4 * huge;
constexpr int user_mode_only = 1;                     // UFFD_USER_MODE_ONLY, Linux 5.11
constexpr std::uint64_t wp_hugetlbfs_shmem = 1 << 12; // Linux 5.19, which older headers lack
constexpr std::uint64_t minor_hugetlbfs = 1 << 9;
constexpr std::uint64_t minor_shmem = 1 << 10;

/// What is behind adopted memory.
enum class Behind { guard, nothing, anonymous, file, many };

std::string name_of(const testing::TestParamInfo<std::tuple<Backing, Behind>>& info) {
  const char* behind = "own";
  switch (std::get<1>(info.param)) {
  case Behind::guard:
    break;
  case Behind::nothing:
    behind = "before_nothing";
    break;
  case Behind::anonymous:
    behind = "before_anonymous_memory";
    break;
  case Behind::file:
    behind = "before_a_file";
    break;
  case Behind::many:
    behind = "before_many_mappings";
    break;
  }
  return std::string(to_string(std::get<0>(info.param))) + "_" + behind;
}

class ListedMemory : public testing::TestWithParam<std::tuple<Backing, Behind>> {
protected:
  void SetUp() override {
    if (!test::machine_facts().userfaultfd) GTEST_SKIP() << "this kernel, or this process, has no userfaultfd";
    if (backing() == Backing::shared_anonymous && !test::machine_facts().map_files)
      GTEST_SKIP() << "/proc/self/map_files needs privileges";
    if (is_huge()) {
      auto taken = test::HugePagePool::take();
      if (!taken) GTEST_SKIP() << taken.error();
      pool.emplace(std::move(*taken));
    }
    const auto made = behind() == Behind::guard ? make() : adopt();
    ASSERT_TRUE(made) << made.error().message();
    region.emplace(*made);
    if (backing() == Backing::anonymous) {
      if (!test::machine_facts().pagemap_scan || !test::machine_facts().membarrier)
        GTEST_SKIP() << "this kernel does not tell that there are no huge pages";
      if (auto set = region->set_huge_pages(HugePages::never); !set) GTEST_SKIP() << set.error().message();
    }
    memory.replace(*MemoryMap::make({*region}));
    ASSERT_TRUE(memory.write_value(GuestAddress(0), std::uint64_t{1}));
  }
  void TearDown() override {
    memory.replace({});
    region.reset();
    if (space != MAP_FAILED) EXPECT_EQ(munmap(space, mapped), 0);
  }
  [[nodiscard]] static Backing backing() { return std::get<0>(GetParam()); }
  [[nodiscard]] static bool is_huge() { return backing() == Backing::hugetlb || backing() == Backing::hugetlb_memfd; }
  [[nodiscard]] static Behind behind() { return std::get<1>(GetParam()); }

  [[nodiscard]] static MemoryResult<Region> make() {
    switch (backing()) {
    case Backing::hugetlb:
      return Region::hugetlb(GuestAddress(0), bytes, HugePageSize::two_mib);
    case Backing::hugetlb_memfd:
      return Region::hugetlb_memfd(GuestAddress(0), bytes, HugePageSize::two_mib);
    case Backing::anonymous:
      return Region::anonymous(GuestAddress(0), bytes);
    default:
      return Region::memfd(GuestAddress(0), bytes);
    }
  }

  /// The embedder's own, at an address of its own, with what is to be behind it.
  [[nodiscard]] MemoryResult<Region> adopt() {
    const auto refuse = [](const char* what) {
      return std::unexpected(MemoryError{.code = MemoryErrc::os, .os_error = errno, .operation = what});
    };
    space = mmap(nullptr, 3 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return refuse("mmap");
    const std::uintptr_t at = (reinterpret_cast<std::uintptr_t>(space) + huge - 1) / huge * huge;
    auto* const host = reinterpret_cast<char*>(at);
    int flags = (backing() == Backing::shared_anonymous ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS;
    if (backing() == Backing::hugetlb) flags |= MAP_HUGETLB;
    if (backing() == Backing::memfd || backing() == Backing::hugetlb_memfd) {
      flags = MAP_SHARED;
      file = test::Descriptor(memfd_create("listed", MFD_CLOEXEC | (is_huge() ? MFD_HUGETLB : 0U)));
      if (!file.is_open() || ftruncate(file.number(), bytes) != 0) return refuse("memfd_create");
    }
    if (mmap(host, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, file.number(), 0) == MAP_FAILED)
      return refuse("mmap of the memory");
    if (!put_behind(host + bytes)) return refuse("mmap of what is behind");
    return Region::adopt(GuestAddress(0),
                         {.host_address = host, .bytes = bytes, .backing = backing(), .fd = file.number()});
  }

  /// And nothing behind that.
  [[nodiscard]] bool put_behind(char* at) {
    std::uint64_t pages = 1;
    if (behind() == Behind::nothing) pages = 0;
    if (behind() == Behind::file) {
      const test::Descriptor program(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
      if (mmap(at, page_size, PROT_READ, MAP_PRIVATE | MAP_FIXED, program.number(), 0) != at) return false;
    }
    if (behind() == Behind::many) {
      pages = 32;
      for (std::uint64_t i = 0; i < pages; ++i)
        if (mprotect(at + i * page_size, page_size, i % 2 == 0 ? PROT_READ : PROT_NONE) != 0) return false;
    }
    const std::size_t whole =
        std::exchange(mapped, static_cast<std::size_t>(at - static_cast<char*>(space)) + pages * page_size);
    return munmap(at + pages * page_size, whole - mapped) == 0;
  }

  /// Whether the list of the process's mappings says that a userfaultfd holds any of the memory.
  [[nodiscard]] bool is_held() const {
    const auto host = reinterpret_cast<std::uintptr_t>(region->host_address());
    std::ifstream smaps("/proc/self/smaps");
    bool is_here = false;
    for (std::string line; std::getline(smaps, line);) {
      unsigned long long start = 0;
      unsigned long long end = 0;
      if (std::sscanf(line.c_str(), "%llx-%llx ", &start, &end) == 2) is_here = start < host + bytes && end > host;
      if (is_here && line.starts_with("VmFlags:") &&
          (line.find(" um") != std::string::npos || line.find(" uw") != std::string::npos ||
           line.find(" ui") != std::string::npos))
        return true;
    }
    return false;
  }

  /// Registers a part of the memory: why not, errno.
  [[nodiscard]] static int hold(const test::Descriptor& userfaultfd, void* at, std::uint64_t mode) {
    uffdio_api api{};
    api.api = UFFD_API;
    if (mode == UFFDIO_REGISTER_MODE_WP) api.features = wp_hugetlbfs_shmem;
    if (mode == UFFDIO_REGISTER_MODE_MINOR) api.features = is_huge() ? minor_hugetlbfs : minor_shmem;
    if (ioctl(userfaultfd.number(), UFFDIO_API, &api) != 0) return errno;
    uffdio_register request{};
    request.range = {.start = reinterpret_cast<std::uintptr_t>(at), .len = huge};
    request.mode = mode;
    return ioctl(userfaultfd.number(), UFFDIO_REGISTER, &request) == 0 ? 0 : errno;
  }

  std::optional<test::HugePagePool> pool;
  test::Descriptor file;
  void* space = MAP_FAILED;
  std::size_t mapped = 3 * bytes; // of the space
  std::optional<Region> region;
  GuestMemory memory;
};

INSTANTIATE_TEST_SUITE_P(Kinds, ListedMemory,
                         testing::Combine(testing::Values(Backing::memfd, Backing::shared_anonymous, Backing::anonymous,
                                                          Backing::hugetlb, Backing::hugetlb_memfd),
                                          testing::Values(Behind::nothing, Behind::anonymous, Behind::file,
                                                          Behind::many)),
                         name_of);

/// Of regions that cppvmm makes.
class OwnListedMemory : public ListedMemory {};

constexpr auto of_ours = [] {
  return testing::Combine(testing::Values(Backing::memfd, Backing::anonymous, Backing::hugetlb, Backing::hugetlb_memfd),
                          testing::Values(Behind::guard));
};
INSTANTIATE_TEST_SUITE_P(Own, ListedMemory, of_ours(), name_of);
INSTANTIATE_TEST_SUITE_P(Kinds, OwnListedMemory, of_ours(), name_of);

/// Pages that a survey must not report where it is known who holds what: the one that was written, or its huge page.
std::uint64_t written_pages(Backing backing) {
  return backing == Backing::hugetlb || backing == Backing::hugetlb_memfd ? huge / page_size : 1;
}

TEST_P(ListedMemory, IsAnsweredAsByTheWholeList) {
  const Survey survey = memory.survey();
  const Survey by_the_whole = memory.survey({.leave_out = {}, .source = EvidenceSource::legacy});
  EXPECT_EQ(survey.zeroed().page_count(), bytes / page_size - written_pages(backing()));
  EXPECT_EQ(survey.zeroed(), by_the_whole.zeroed());
  EXPECT_FALSE(is_held()) << "the survey's own registration stays behind";
}

// A handler has yet to fill it: nothing is known to be zero, in the last part of the memory as in the first.
TEST_P(ListedMemory, IsNotAnsweredWhereAnotherHoldsIt) {
  auto* const host = static_cast<char*>(region->host_address());
  for (const std::uint64_t mode : {UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_MINOR})
    for (char* const at : {host, host + bytes - huge}) {
      const test::Descriptor holder(
          static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | user_mode_only)));
      ASSERT_TRUE(holder.is_open()) << errno;
      if (const int refused = hold(holder, at, mode); refused != 0) {
        // Of private memory there are no minor faults.
        EXPECT_TRUE(mode == UFFDIO_REGISTER_MODE_MINOR) << std::strerror(refused);
        continue;
      }
      const Survey survey = memory.survey();
      EXPECT_TRUE(survey.zeroed().empty()) << "mode " << mode << ", " << at - host;
      ASSERT_TRUE(survey.regions[0].error);
      EXPECT_EQ(survey.regions[0].error->code, MemoryErrc::wrong_nature);
      EXPECT_TRUE(is_held()) << "the survey took the memory from who holds it";
    }
  EXPECT_EQ(memory.survey().zeroed().page_count(), bytes / page_size - written_pages(backing()));
}

// Write protection leaves pages that nobody touched as zero as they were.
TEST_P(ListedMemory, IsAnsweredWhereAnotherWatchesItsWrites) {
  const test::Descriptor holder(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | user_mode_only)));
  ASSERT_TRUE(holder.is_open()) << errno;
  if (const int refused = hold(holder, region->host_address(), UFFDIO_REGISTER_MODE_WP); refused != 0)
    GTEST_SKIP() << "this memory, or kernel, has no write protection by userfaultfd: " << std::strerror(refused);
  const Survey survey = memory.survey();
  // Of the pool's pages, the survey needs a registration of its own.
  if (!is_huge()) EXPECT_EQ(survey.zeroed().page_count(), bytes / page_size - 1);
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(0)));
  EXPECT_TRUE(is_held());
}

TEST_P(ListedMemory, IsNotAnsweredWhereAnotherFileIsMappedOverIt) {
  const test::Descriptor other(memfd_create("other", MFD_CLOEXEC | (is_huge() ? MFD_HUGETLB : 0U)));
  ASSERT_EQ(ftruncate(other.number(), bytes), 0);
  auto* const at = static_cast<char*>(region->host_address()) + huge;
  ASSERT_EQ(mmap(at, huge, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, other.number(), 0), at)
      << std::strerror(errno);
  const Survey survey = memory.survey();
  EXPECT_TRUE(survey.zeroed().empty());
  ASSERT_TRUE(survey.regions[0].error);
  EXPECT_EQ(survey.regions[0].error->code, MemoryErrc::wrong_nature);
}

// A registration that was to fail succeeds, and is taken back.
TEST_P(OwnListedMemory, IsAnsweredWhereItsGuardPagesAreGone) {
  auto* const behind = static_cast<char*>(region->host_address()) + bytes;
  // So that what is behind it can be registered as the memory can.
  ASSERT_EQ(mmap(behind, page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), behind);
  EXPECT_EQ(memory.survey().zeroed().page_count(), bytes / page_size - written_pages(backing()));
  EXPECT_FALSE(is_held()) << "the survey's own registration stays behind";
  // With a userfaultfd that stays open.
  const auto books = KernelBooks::open();
  ASSERT_TRUE(books) << books.error().message();
  EXPECT_EQ(memory.survey().zeroed().page_count(), bytes / page_size - written_pages(backing()));
  EXPECT_FALSE(is_held()) << "the survey's own registration stays behind";
}

/// The names of the kernel's files that a survey opens.
std::vector<std::string> opened_by_a_survey(const GuestMemory& memory) {
  std::vector<std::string> names;
  static_cast<void>(memory.survey());
  for (const test::SystemCall& call : test::record_system_calls([&] { static_cast<void>(memory.survey()); }))
    if (call.number == SYS_openat) names.emplace_back(call.path.data());
  return names;
}

TEST_P(ListedMemory, CostsNoWalkOfTheProcessesPageTables) {
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  if (backing() == Backing::hugetlb && !test::machine_facts().async_write_protect)
    GTEST_SKIP() << "of this kernel's private huge pages, the evidence needs all mappings";
  const std::vector<std::string> names = opened_by_a_survey(memory);
  EXPECT_NE(std::ranges::find(names, "/proc/self/maps"), names.end());
  EXPECT_EQ(std::ranges::find(names, "/proc/self/smaps"), names.end());
}

} // namespace
