#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"
#include "support/machine_facts.hpp"
#include "support/overlay_file.hpp"
#include "support/temporary_file.hpp"

import cppvmm.guest_memory;

// What a file proves depends on where its file system keeps its pages.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t bytes = 16 * mib;
constexpr std::uint64_t count = bytes / page_size;

PageRange pages(std::uint64_t first, std::uint64_t number) { return *PageRange::make(PageNumber(first), number); }

PageSet every_other_page() {
  PageSet set;
  for (std::uint64_t page = 0; page < count; page += 2)
    set.add(pages(page, 1));
  return set;
}

bool write_pages(int file, const PageSet& set) {
  const std::vector<std::byte> data(page_size, std::byte{1});
  for (const PageRange& range : set.ranges())
    for (std::uint64_t page = range.first().value(); page < range.end().value(); ++page)
      if (pwrite(file, data.data(), page_size, static_cast<off_t>(page * page_size)) != page_size) return false;
  return true;
}

constexpr EvidenceSource sources[] = {EvidenceSource::automatic, EvidenceSource::legacy};

/// A file of which every other page holds data.
class OverlayFile : public testing::TestWithParam<Backing> {
protected:
  void SetUp() override {
    auto made = test::overlay_file();
    if (!made) GTEST_SKIP() << made.error();
    file = std::move(*made);
    ASSERT_EQ(ftruncate(file.number(), bytes), 0);
    const test::FileFacts facts = test::file_facts(file.number());
    ASSERT_TRUE(facts.can_be_made);
    if (!facts.named_by_fstat) GTEST_SKIP() << "fstat and /proc/self/maps name files of an overlay differently";
    ASSERT_TRUE(write_pages(file.number(), data));
    own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, GetParam() == Backing::private_file ? MAP_PRIVATE : MAP_SHARED,
               file.number(), 0);
    ASSERT_NE(own, MAP_FAILED);
    const auto region = Region::adopt(GuestAddress(0), {own, bytes, GetParam(), file.number(), 0});
    ASSERT_TRUE(region) << region.error().message();
    memory.replace(*MemoryMap::make({*region}));
  }
  void TearDown() override {
    memory.replace({});
    if (own != nullptr) munmap(own, bytes);
  }

  test::Descriptor file;
  PageSet data = every_other_page();
  void* own = nullptr;
  GuestMemory memory;
};

INSTANTIATE_TEST_SUITE_P(Kinds, OverlayFile, testing::Values(Backing::shared_file, Backing::private_file),
                         [](const auto& info) { return std::string(to_string(info.param)); });

// The descriptor's inode has no pages of its own: those of the layer below are seen by nobody.
TEST_P(OverlayFile, ProvesNothingAndSaysWhy) {
  if (GetParam() == Backing::private_file) GTEST_SKIP() << "it is read, for nobody changes it";
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_TRUE(survey.zeroed().empty());
    EXPECT_EQ(survey.regions[0].evidence, Evidence::none);
    ASSERT_TRUE(survey.regions[0].error);
    EXPECT_NE(survey.regions[0].error->message().find("file system"), std::string::npos)
        << survey.regions[0].error->message();
  }
}

TEST_P(OverlayFile, NeverReportsDataInMigration) {
  if (!test::machine_facts().compaction) GTEST_SKIP() << "compaction needs root and CONFIG_COMPACTION";
  const test::Descriptor compact(open("/proc/sys/vm/compact_memory", O_WRONLY | O_CLOEXEC));
  ASSERT_TRUE(compact.is_open()) << errno;
  std::atomic<bool> stop = false;
  std::thread compactor([&] {
    while (!stop && pwrite(compact.number(), "1", 1, 0) == 1) {
    }
  });
  for (int i = 0; i < 50; ++i) {
    PageSet zeroed = memory.survey().zeroed();
    zeroed.intersect(data);
    EXPECT_TRUE(zeroed.empty()) << zeroed.page_count() << " pages with data were reported";
  }
  stop = true;
  compactor.join();
}

// Blocks that are allocated and not written look like a hole once the pages that hold their data have left the page
// cache, which happens when the data is on the disk and not before.
TEST(DiskFile, NeverReportsDataThatIsWrittenBackAndDropped) {
  const auto made = test::temporary_file();
  ASSERT_TRUE(made) << made.error();
  const test::Descriptor file(*made);
  ASSERT_EQ(ftruncate(file.number(), bytes), 0);
  const test::FileFacts facts = test::file_facts(file.number());
  if (facts.in_memory || !facts.tell_the_truth()) GTEST_SKIP() << "there is no file system on a disk here";
  if (!test::machine_facts().cachestat) GTEST_SKIP() << "this kernel has no cachestat";
  void* const own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.number(), 0);
  ASSERT_NE(own, MAP_FAILED);
  const auto region = Region::adopt(GuestAddress(0), {own, bytes, Backing::shared_file, file.number(), 0});
  ASSERT_TRUE(region) << region.error().message();
  const PageSet data = every_other_page();
  std::uint64_t unsound = 0;
  {
    const GuestMemory memory(*MemoryMap::make({*region}));
    for (int round = 0; round < 10; ++round) {
      if (fallocate(file.number(), FALLOC_FL_ZERO_RANGE, 0, bytes) != 0) break;
      ASSERT_TRUE(write_pages(file.number(), data));
      std::atomic<bool> is_dropped = false;
      std::thread dropper([&] {
        EXPECT_EQ(fsync(file.number()), 0);
        EXPECT_EQ(posix_fadvise(file.number(), 0, 0, POSIX_FADV_DONTNEED), 0);
        is_dropped = true;
      });
      do {
        PageSet zeroed = memory.survey().zeroed();
        zeroed.intersect(data);
        unsound += zeroed.page_count();
      } while (!is_dropped);
      dropper.join();
    }
    EXPECT_EQ(memory.survey().regions[0].evidence, Evidence::page_cache);
  }
  EXPECT_EQ(unsound, 0U);
  munmap(own, bytes);
}

} // namespace
