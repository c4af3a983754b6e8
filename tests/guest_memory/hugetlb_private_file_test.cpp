#include <array>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <initializer_list>
#include <linux/falloc.h>
#include <linux/memfd.h>
#include <optional>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include "support/descriptor.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"
#include "support/temporary_file.hpp"

import cppvmm.guest_memory;

// Private mappings of files of huge pages: kvmtool's --hugetlbfs, QEMU's memory-backend-file with share=off, snapshots.

using namespace cppvmm;

namespace {

constexpr std::uint64_t huge = std::uint64_t{2} << 20;
constexpr std::uint64_t pages_of_huge = huge / page_size;
constexpr std::uint64_t count = 8;
constexpr std::uint64_t bytes = count * huge;

PageRange huge_pages(std::uint64_t first, std::uint64_t number = 1) {
  return *PageRange::make(PageNumber(first * pages_of_huge), number * pages_of_huge);
}

PageSet huge_set(std::initializer_list<std::uint64_t> numbers) {
  PageSet set;
  for (const std::uint64_t number : numbers)
    set.add(huge_pages(number));
  return set;
}

volatile char& byte_of(const Region& region, std::uint64_t huge_page, std::uint64_t offset = 0) {
  return *(static_cast<volatile char*>(region.host_address()) + huge_page * huge + offset);
}

constexpr std::array sources = {EvidenceSource::automatic, EvidenceSource::legacy};

class HugetlbPrivateFile : public testing::Test {
protected:
  void SetUp() override {
    auto taken = test::HugePagePool::take(32);
    if (!taken) GTEST_SKIP() << taken.error();
    pool.emplace(std::move(*taken));
    file = test::Descriptor(memfd_create("snapshot", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB));
    ASSERT_TRUE(file.is_open());
    ASSERT_EQ(ftruncate(file.number(), bytes), 0);
  }

  void write_file(std::uint64_t huge_page, std::uint64_t offset, char value) const {
    void* const all = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.number(), 0);
    ASSERT_NE(all, MAP_FAILED);
    static_cast<volatile char*>(all)[huge_page * huge + offset] = value;
    munmap(all, bytes);
  }
  [[nodiscard]] Region region(FileContent content = {}) const {
    return *Region::private_file(GuestAddress(0), bytes, file.number(), 0, RegionKind::ram, content);
  }

  std::optional<test::HugePagePool> pool;
  test::Descriptor file;
};

TEST_F(HugetlbPrivateFile, HoldsWhatTheFileHeldAndWhatWasWritten) {
  write_file(2, huge - 1, 42);
  ASSERT_EQ(fallocate(file.number(), 0, 3 * huge, huge), 0);
  const Region ram = region();
  EXPECT_EQ(ram.backing(), Backing::hugetlb_private_file);
  const GuestMemory memory(*MemoryMap::make({ram}));
  for (const auto source : sources) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_EQ(survey.touched, huge_set({2})) << "what is allocated and was never written reads zero";
    EXPECT_EQ(survey.regions[0].evidence, Evidence::file_content)
        << (survey.regions[0].error ? survey.regions[0].error->message() : "");
  }
  byte_of(ram, 5) = 1;
  byte_of(ram, 2, 4096) = 1; // a copy
  for (const auto source : sources)
    EXPECT_EQ(memory.survey({.leave_out = {}, .source = source}).touched, huge_set({2, 5}));
  EXPECT_EQ(byte_of(ram, 2, huge - 1), 42);
  // The file stays what it was.
  char in_file = 0;
  ASSERT_EQ(pread(file.number(), &in_file, 1, 5 * huge), 1);
  EXPECT_EQ(in_file, 0);
}

TEST_F(HugetlbPrivateFile, IsAdoptedAsWhatItIs) {
  write_file(1, 0, 1);
  void* const own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.number(), 0);
  ASSERT_NE(own, MAP_FAILED);
  const auto adopt = [&](Backing backing, int fd) {
    return Region::adopt(GuestAddress(0), {own, bytes, backing, fd, 0});
  };
  for (const Backing stated : {Backing::private_file, Backing::hugetlb_private_file}) {
    const auto ram = adopt(stated, file.number());
    ASSERT_TRUE(ram) << ram.error().message();
    EXPECT_EQ(ram->backing(), Backing::hugetlb_private_file);
    EXPECT_FALSE(ram->shared_file_id());
    const GuestMemory memory(*MemoryMap::make({*ram}));
    EXPECT_EQ(memory.survey().touched, huge_set({1}));
    EXPECT_EQ(ram->resident_bytes().value(), 0U);
  }
  for (const auto& wrong : {adopt(Backing::hugetlb, -1), adopt(Backing::hugetlb_memfd, file.number()),
                            adopt(Backing::shared_file, file.number()), adopt(Backing::anonymous, -1)}) {
    ASSERT_FALSE(wrong);
    EXPECT_EQ(wrong.error().code, MemoryErrc::wrong_nature);
  }
  munmap(own, bytes);

  const test::Descriptor other(test::temporary_file().value());
  ASSERT_EQ(ftruncate(other.number(), bytes), 0);
  void* const small = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, other.number(), 0);
  ASSERT_NE(small, MAP_FAILED);
  const auto wrong = Region::adopt(GuestAddress(0), {small, bytes, Backing::hugetlb_private_file, other.number(), 0});
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.error().code, MemoryErrc::wrong_nature);
  munmap(small, bytes);
}

TEST_F(HugetlbPrivateFile, IsMadeOfWholeHugePagesThatThePoolHas) {
  const auto code = [&](std::uint64_t size, std::uint64_t offset) {
    const auto made = Region::private_file(GuestAddress(0), size, file.number(), offset);
    return made ? std::optional<MemoryErrc>() : made.error().code;
  };
  EXPECT_EQ(code(huge + page_size, 0), MemoryErrc::invalid_argument);
  EXPECT_EQ(code(huge, page_size), MemoryErrc::invalid_argument);
  EXPECT_EQ(code(huge, bytes), MemoryErrc::invalid_argument) << "the file ends there";
  EXPECT_EQ(code(huge, huge), std::nullopt);
  constexpr std::uint64_t too_much = std::uint64_t{1} << 42;
  ASSERT_EQ(ftruncate(file.number(), too_much), 0);
  EXPECT_EQ(code(too_much, 0), MemoryErrc::unavailable);
}

TEST_F(HugetlbPrivateFile, ReadsZeroWhereItIsDiscarded) {
  if (!test::machine_facts().hugetlb_dontneed) GTEST_SKIP() << "this kernel discards no huge pages of private memory";
  write_file(2, 0, 42);
  write_file(3, 0, 42);
  const Region ram = region();
  GuestMemory memory(*MemoryMap::make({ram}));
  for (const std::uint64_t page : std::array<std::uint64_t, 4>{1, 2, 5, 6})
    byte_of(ram, page, 100) = 1;
  const auto whole = ram.discard(huge_pages(1, 3));
  ASSERT_TRUE(whole) << whole.error().message();
  // The file's data would come back where there is some.
  EXPECT_EQ(*whole, (Discarded{.freed_pages = pages_of_huge, .cleared_pages = 2 * pages_of_huge}));
  const auto part = ram.discard(*PageRange::make(PageNumber(5 * pages_of_huge), 1));
  ASSERT_TRUE(part) << part.error().message();
  EXPECT_EQ(*part, (Discarded{.freed_pages = 0, .cleared_pages = 1}));
  EXPECT_EQ(memory.survey().touched, huge_set({2, 3, 5, 6}));
  for (const std::uint64_t page : std::array<std::uint64_t, 4>{1, 2, 3, 5}) {
    EXPECT_EQ(byte_of(ram, page), 0) << page;
    EXPECT_EQ(byte_of(ram, page, 100), 0) << page;
  }
  EXPECT_EQ(byte_of(ram, 6, 100), 1);
}

TEST_F(HugetlbPrivateFile, IsLookedAtByContent) {
  write_file(2, 0, 42);
  const Region ram = region();
  const GuestMemory memory(*MemoryMap::make({ram}));
  byte_of(ram, 2, 5 * page_size) = 0; // a copy
  byte_of(ram, 4, 7 * page_size) = 1;
  const Survey survey = memory.survey({.leave_out = {}, .content_check = ContentCheckOptions{}});
  PageSet touched;
  touched.add(*PageRange::make(PageNumber(2 * pages_of_huge), 1));
  touched.add(*PageRange::make(PageNumber(4 * pages_of_huge + 7), 1));
  EXPECT_EQ(survey.touched, touched);
}

TEST_F(HugetlbPrivateFile, IsReadAsFarAsIsAllowedAndNotAtAllWhenEmpty) {
  const GuestMemory empty(*MemoryMap::make({region({.max_bytes = 0})}));
  EXPECT_TRUE(empty.survey().touched.empty());
  write_file(1, 0, 1);
  const GuestMemory memory(*MemoryMap::make({region({.max_bytes = 3 * huge})}));
  const Survey survey = memory.survey();
  PageSet touched = huge_set({1});
  touched.add(huge_pages(3, count - 3));
  EXPECT_EQ(survey.touched, touched);
  EXPECT_EQ(survey.regions[0].unaccounted_pages, (count - 3) * pages_of_huge);
}

// Of a file whose holes others may punch, pages can go away and tell nobody: the kernel's count proves nothing then.
TEST_F(HugetlbPrivateFile, IsCountedAloneOrNotAtAll) {
  const test::Descriptor other(memfd_create("other", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB));
  ASSERT_EQ(ftruncate(other.number(), bytes), 0);
  void* const beside = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, other.number(), 0);
  ASSERT_NE(beside, MAP_FAILED);
  const Region ram = region();
  byte_of(ram, 3) = 1;
  const GuestMemory memory(*MemoryMap::make({ram}));
  const SurveyOptions legacy{.leave_out = {}, .source = EvidenceSource::legacy};
  EXPECT_EQ(memory.survey(legacy).touched, huge_set({3}));
  static_cast<volatile char*>(beside)[0] = 1;
  EXPECT_EQ(memory.survey(legacy).regions[0].evidence, Evidence::none);
  EXPECT_TRUE(memory.survey(legacy).zeroed().empty());
  munmap(beside, bytes);
  EXPECT_EQ(memory.survey(legacy).touched, huge_set({3}));
}

} // namespace
