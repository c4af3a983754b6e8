#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"
#include "support/snapshot_files.hpp"

import cppvmm.guest_memory;

// Snapshots on file systems that do not show where a file holds data: it is read once, when the region is made.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t bytes = 16 * mib;
constexpr std::uint64_t count = bytes / page_size;
const std::vector<std::uint64_t> with_data = {0, 300, 301, count - 1};

PageRange page(std::uint64_t number, std::uint64_t pages = 1) { return *PageRange::make(PageNumber(number), pages); }

PageSet data_of_file() {
  PageSet set;
  for (const std::uint64_t number : with_data)
    set.add(page(number));
  return set;
}

class Snapshot : public testing::TestWithParam<test::SnapshotPlace> {
protected:
  void SetUp() override {
    auto made = test::snapshot_files(GetParam(), count, with_data);
    if (!made) GTEST_SKIP() << made.error();
    files = std::move(*made);
    own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, files.file.number(), 0);
    ASSERT_NE(own, MAP_FAILED);
  }
  void TearDown() override {
    if (own != nullptr) munmap(own, bytes);
  }

  [[nodiscard]] MemoryResult<Region> adopt(Backing backing, int fd, FileContent content = {}) const {
    return Region::adopt(GuestAddress(0), {own, bytes, backing, fd, 0, content});
  }
  [[nodiscard]] std::byte at(const GuestMemory& memory, std::uint64_t number) const {
    return memory.read_value<std::byte>(GuestAddress(number * page_size + 77)).value();
  }

  test::SnapshotFiles files;
  void* own = nullptr;
};

INSTANTIATE_TEST_SUITE_P(Places, Snapshot,
                         testing::Values(test::SnapshotPlace::ramfs, test::SnapshotPlace::squashfs,
                                         test::SnapshotPlace::erofs, test::SnapshotPlace::btrfs,
                                         test::SnapshotPlace::btrfs_subvolume, test::SnapshotPlace::overlay,
                                         test::SnapshotPlace::block_device),
                         [](const auto& info) { return std::string(test::to_string(info.param)); });

TEST_P(Snapshot, IsKnownByWhatItHeld) {
  for (const bool is_adopted : {false, true}) {
    const auto region = is_adopted ? adopt(Backing::private_file, files.file.number())
                                   : Region::private_file(GuestAddress(0), bytes, files.file.number(), 0);
    ASSERT_TRUE(region) << region.error().message();
    GuestMemory memory(*MemoryMap::make({*region}));
    PageSet touched = data_of_file();
    const Survey first = memory.survey();
    EXPECT_EQ(first.touched, touched);
    EXPECT_EQ(first.regions[0].evidence, Evidence::file_content);
    EXPECT_EQ(first.regions[0].unaccounted_pages, 0U);

    // Reading brings in pages of the file, and writing private copies.
    EXPECT_EQ(at(memory, 300), std::byte{1});
    EXPECT_EQ(at(memory, 400), std::byte{0});
    ASSERT_TRUE(memory.write_value(GuestAddress(500 * page_size), std::uint64_t{1}));
    touched.add(page(500));
    EXPECT_EQ(memory.survey().touched, touched);
    EXPECT_EQ(memory.survey({.leave_out = {}, .source = EvidenceSource::legacy}).touched, touched);

    ASSERT_TRUE(memory.discard(PageSet(page(300))));
    ASSERT_TRUE(memory.discard(PageSet(page(500))));
    touched.remove(PageSet(page(300)));
    touched.remove(PageSet(page(500)));
    EXPECT_EQ(memory.survey().touched, touched);
    EXPECT_EQ(at(memory, 300), std::byte{0});
    EXPECT_EQ(at(memory, 301), std::byte{1});
  }
}

TEST_P(Snapshot, IsReadAsFarAsIsAllowed) {
  constexpr std::uint64_t half = count / 2;
  const auto part =
      Region::private_file(GuestAddress(0), bytes, files.file.number(), 0, RegionKind::ram, {.max_bytes = bytes / 2});
  ASSERT_TRUE(part) << part.error().message();
  const Survey survey = GuestMemory(*MemoryMap::make({*part})).survey();
  PageSet touched = data_of_file();
  touched.add(page(half, half));
  EXPECT_EQ(survey.touched, touched);
  EXPECT_EQ(survey.regions[0].evidence, Evidence::file_content);
  EXPECT_EQ(survey.regions[0].unaccounted_pages, half);

  const auto none = adopt(Backing::private_file, files.file.number(), {.max_bytes = 0});
  ASSERT_TRUE(none) << none.error().message();
  const Survey nothing = GuestMemory(*MemoryMap::make({*none})).survey();
  EXPECT_TRUE(nothing.zeroed().empty());
  EXPECT_EQ(nothing.regions[0].evidence, Evidence::none);
  EXPECT_TRUE(nothing.regions[0].error);
}

TEST_P(Snapshot, BeginsAnywhereInItsFile) {
  constexpr std::uint64_t offset = 290 * page_size;
  const auto region = Region::private_file(GuestAddress(0), mib, files.file.number(), offset);
  ASSERT_TRUE(region) << region.error().message();
  const Survey survey = GuestMemory(*MemoryMap::make({*region})).survey();
  EXPECT_EQ(survey.touched, PageSet(page(10, 2)))
      << survey.touched.page_count() << " pages; " << to_string(survey.regions[0].evidence) << "; "
      << (survey.regions[0].error ? survey.regions[0].error->message() : "");
  const auto beyond = Region::private_file(GuestAddress(0), bytes, files.file.number(), page_size);
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code, MemoryErrc::invalid_argument);
}

TEST_P(Snapshot, IsNotTakenForAnotherFile) {
  const auto other = adopt(Backing::private_file, files.other.number());
  ASSERT_FALSE(other);
  EXPECT_EQ(other.error().code, MemoryErrc::wrong_nature);
  EXPECT_FALSE(adopt(Backing::shared_file, files.file.number()));
  EXPECT_FALSE(adopt(Backing::memfd, files.file.number()));

  const auto region = adopt(Backing::private_file, files.file.number());
  ASSERT_TRUE(region) << region.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  ASSERT_NE(mmap(own, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, files.other.number(), 0), MAP_FAILED);
  EXPECT_TRUE(memory.survey().zeroed().empty());
}

TEST_P(Snapshot, ProvesNothingWhereOthersMayWriteIt) {
  void* const shared = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, files.file.number(), 0);
  ASSERT_NE(shared, MAP_FAILED);
  // ROM, for the file cannot be written here; what is asked for is whether it is accepted.
  const auto region =
      Region::adopt(GuestAddress(0), {shared, bytes, Backing::shared_file, files.file.number(), 0}, RegionKind::rom);
  EXPECT_TRUE(region) << region.error().message();
  EXPECT_FALSE(
      Region::adopt(GuestAddress(0), {shared, bytes, Backing::memfd, files.file.number(), 0}, RegionKind::rom));
  munmap(shared, bytes);
}

} // namespace
