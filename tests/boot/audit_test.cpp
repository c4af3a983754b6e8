#include "examples/boot/audit.hpp"
#include "support/huge_pages.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <gtest/gtest.h>
#include <optional>
#include <stop_token>
#include <sys/mman.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

namespace {

using namespace cppvmm::boot;
using Memory = AuditedRegion::Memory;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t pages = 2048;
constexpr std::uint64_t first = 0x100; // guest page number of the region

/// A mapping with data in a few pages, in the middle of 2 MiB blocks and at both ends.
class MappedRegion {
public:
  explicit MappedRegion(Memory memory) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    if (memory == Memory::shared_file) {
      fd_ = memfd_create("audit", MFD_CLOEXEC);
      EXPECT_EQ(ftruncate(fd_, static_cast<off_t>(pages * page)), 0);
      flags = MAP_SHARED;
    }
    if (memory == Memory::private_hugetlb) flags |= MAP_HUGETLB | 21 << MAP_HUGE_SHIFT;
    void* mapped = mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, flags, fd_, 0);
    if (mapped == MAP_FAILED) return;
    if (memory == Memory::private_anonymous) {
      EXPECT_EQ(madvise(mapped, pages * page, MADV_NOHUGEPAGE), 0);
    }
    host_ = static_cast<unsigned char*>(mapped);
    region_ = {first, pages, host_, memory, fd_, 0};
  }
  MappedRegion(const MappedRegion&) = delete;
  MappedRegion& operator=(const MappedRegion&) = delete;
  ~MappedRegion() {
    if (host_ != nullptr) munmap(host_, pages * page);
    if (fd_ >= 0) close(fd_);
  }

  [[nodiscard]] bool exists() const { return host_ != nullptr; }
  void put(std::uint64_t guest_page, std::uint64_t offset) const { host_[(guest_page - first) * page + offset] = 1; }
  [[nodiscard]] const AuditedRegion& region() const { return region_; }
  [[nodiscard]] unsigned char* host() const { return host_; }

  /// Pages of the mapping that this process's page tables have an entry for.
  [[nodiscard]] std::uint64_t entries() const {
    const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    std::vector<std::uint64_t> words(pages);
    EXPECT_EQ(
        pread(pagemap, words.data(), pages * 8, static_cast<off_t>(reinterpret_cast<std::uintptr_t>(host_) / page * 8)),
        static_cast<ssize_t>(pages * 8));
    close(pagemap);
    return static_cast<std::uint64_t>(std::ranges::count_if(words, [](auto word) { return word >> 62 != 0; }));
  }
  [[nodiscard]] std::uint64_t file_blocks() const {
    struct stat status{};
    EXPECT_EQ(fstat(fd_, &status), 0);
    return static_cast<std::uint64_t>(status.st_blocks);
  }

private:
  unsigned char* host_ = nullptr;
  int fd_ = -1;
  AuditedRegion region_;
};

class Audit : public testing::TestWithParam<Memory> {
protected:
  void SetUp() override {
    if (GetParam() == Memory::private_hugetlb) {
      auto taken = cppvmm::test::HugePagePool::take();
      if (!taken) GTEST_SKIP() << taken.error();
      pool.emplace(std::move(*taken));
    }
    mapped.emplace(GetParam());
    ASSERT_TRUE(mapped->exists());
  }
  std::optional<cppvmm::test::HugePagePool> pool;
  std::optional<MappedRegion> mapped; // gone before the pool is made smaller
};

TEST_P(Audit, CountsReportedPagesThatHoldDataAndZeroPagesThatWereNotReported) {
  mapped->put(first, 0);
  mapped->put(first + 700, 4095);
  mapped->put(first + pages - 1, 2048);
  // Two ranges that overlap, one that reaches beyond the region, one elsewhere: 1000 pages of the region in all.
  const std::array<ReportedRange, 4> reported = {
      {{first + pages - 100, 5000}, {first + 600, 500}, {first + 300, 600}, {0, first}}};
  const auto figures = audit(std::array{mapped->region()}, reported);
  ASSERT_TRUE(figures) << figures.error();
  EXPECT_EQ(figures->ram_pages, pages);
  EXPECT_EQ(figures->data_pages, 3U);
  EXPECT_EQ(figures->reported_pages, 900U);
  EXPECT_EQ(figures->unsound_pages, 2U);
  EXPECT_EQ(figures->first_unsound_page, first + 700);
  EXPECT_EQ(figures->missed_zero_pages, pages - 900 - 1);
}

TEST_P(Audit, FindsASoundAndCompleteAnswerSo) {
  mapped->put(first + 10, 17);
  const std::array<ReportedRange, 2> reported = {{{first, 10}, {first + 11, pages - 11}}};
  const auto figures = audit(std::array{mapped->region()}, reported);
  ASSERT_TRUE(figures) << figures.error();
  EXPECT_EQ(figures->reported_pages, pages - 1);
  EXPECT_EQ(figures->unsound_pages, 0U);
  EXPECT_FALSE(figures->first_unsound_page);
  EXPECT_EQ(figures->missed_zero_pages, 0U);
}

TEST_P(Audit, MakesNoPageResident) {
  mapped->put(first + 10, 17);
  const auto entries = mapped->entries();
  const auto blocks = GetParam() == Memory::shared_file ? mapped->file_blocks() : 0;
  ASSERT_GT(entries, 0U);
  ASSERT_LT(entries, pages);
  ASSERT_TRUE(audit(std::array{mapped->region()}, {}));
  EXPECT_EQ(mapped->entries(), entries);
  if (GetParam() == Memory::shared_file) {
    EXPECT_EQ(mapped->file_blocks(), blocks);
  }
}

TEST_P(Audit, StopsWhenAsked) {
  std::stop_source stop;
  stop.request_stop();
  const auto figures = audit(std::array{mapped->region()}, {}, stop.get_token());
  ASSERT_FALSE(figures);
  EXPECT_EQ(figures.error(), "audit: stopped");
}

INSTANTIATE_TEST_SUITE_P(Memory, Audit,
                         testing::Values(Memory::private_anonymous, Memory::shared_file, Memory::private_hugetlb),
                         [](const auto& info) {
                           switch (info.param) {
                           case Memory::private_anonymous:
                             return "Anonymous";
                           case Memory::shared_file:
                             return "SharedFile";
                           case Memory::private_hugetlb:
                             return "Hugetlb";
                           }
                           return "Unknown";
                         });

TEST(AuditFailure, IsReportedWhenAPageCannotBeRead) {
  MappedRegion mapped(Memory::private_anonymous);
  ASSERT_EQ(munmap(mapped.host() + 100 * page, page), 0);
  const auto figures = audit(std::array{mapped.region()}, {});
  ASSERT_FALSE(figures);
  EXPECT_NE(figures.error().find("process_vm_readv"), std::string::npos) << figures.error();
}

TEST(AuditFailure, IsReportedWhenTheFileIsShorterThanTheRegion) {
  MappedRegion mapped(Memory::shared_file);
  ASSERT_EQ(ftruncate(mapped.region().fd, static_cast<off_t>(page)), 0);
  const auto figures = audit(std::array{mapped.region()}, {});
  ASSERT_FALSE(figures);
  EXPECT_NE(figures.error().find("ends within"), std::string::npos) << figures.error();
}

TEST(Audit, LeavesNoChildBehind) {
  MappedRegion mapped(Memory::private_anonymous);
  ASSERT_TRUE(audit(std::array{mapped.region()}, {}));
  std::ifstream children("/proc/self/task/" + std::to_string(getpid()) + "/children");
  std::string text;
  std::getline(children, text);
  EXPECT_EQ(text, "");
}

} // namespace
