#include "support/machine_facts.hpp"

#include "support/descriptor.hpp"
#include "support/temporary_file.hpp"

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// What was found does not contradict itself, and finding it leaves nothing behind.

using namespace cppvmm::test;

namespace {

TEST(MachineFacts, DoNotContradictEachOther) {
  const MachineFacts& facts = machine_facts();
  EXPECT_NE(facts.kernel, "");
  if (facts.reads_told_apart) {
    EXPECT_TRUE(facts.pagemap_scan);
    EXPECT_EQ(facts.read_of_absent, ReadOfAbsent::shared_zero_page);
  }
  if (facts.huge_reads_told_apart) EXPECT_EQ(facts.huge_read, ReadOfAbsent::shared_zero_page);
  if (facts.gives_huge_pages) {
    EXPECT_NE(facts.thp_policy, "");
    EXPECT_NE(facts.thp_policy, "never");
  }
  if (facts.async_write_protect) EXPECT_TRUE(facts.userfaultfd && facts.pagemap_scan);
  if (facts.kvm_forwards) EXPECT_TRUE(facts.kvm_hyperv);
  if (!facts.kvm_missing.empty()) EXPECT_FALSE(facts.kvm_hyperv);
  EXPECT_LE(facts.huge_pool_2m.free, facts.huge_pool_2m.pages);
}

// Where a kernel has a thing, and the probe misses it, tests that need it would be skipped in silence.
TEST(MachineFacts, AreThoseOfTheLabsKernels) {
  if (std::getenv("CPPVMM_LAB") == nullptr) GTEST_SKIP() << "this is not the lab, whose kernels are known";
  const MachineFacts& facts = machine_facts();
  unsigned major = 0;
  unsigned minor = 0;
  // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
  ASSERT_EQ(std::sscanf(facts.kernel.c_str(), "%u.%u", &major, &minor), 2);
  const auto at_least = [&](unsigned wanted) { return major > 6 || (major == 6 && minor >= wanted); };
  EXPECT_EQ(facts.kvm_missing, "");
  EXPECT_EQ(facts.kvm_forwards, at_least(3));
  EXPECT_EQ(facts.cachestat, at_least(5));
  EXPECT_EQ(facts.pagemap_scan, at_least(7));
  EXPECT_EQ(facts.async_write_protect, at_least(7));
  EXPECT_EQ(facts.reads_told_apart, at_least(7));
  EXPECT_EQ(facts.read_of_absent, ReadOfAbsent::shared_zero_page);
  EXPECT_TRUE(facts.mincore);
  EXPECT_TRUE(facts.membarrier);
  EXPECT_TRUE(facts.map_files);
  EXPECT_TRUE(facts.entry_kinds);
  EXPECT_TRUE(facts.userfaultfd);
  EXPECT_TRUE(facts.gives_huge_pages);
  EXPECT_TRUE(facts.hugetlb_dontneed);
  EXPECT_TRUE(facts.compaction);
  EXPECT_TRUE(facts.zram);
}

TEST(MachineFacts, AreFoundOnce) { EXPECT_EQ(&machine_facts(), &machine_facts()); }

TEST(FileFacts, LeaveAHoleOfTheOldSize) {
  const auto made = temporary_file();
  ASSERT_TRUE(made) << made.error();
  const Descriptor file(*made);
  constexpr off_t size = (1 << 20) + 12345;
  ASSERT_EQ(ftruncate(file.number(), size), 0);
  ASSERT_EQ(pwrite(file.number(), "data", 4, 4096), 4);
  const FileFacts facts = file_facts(file.number());
  ASSERT_TRUE(facts.can_be_made);
  struct stat status{};
  ASSERT_EQ(fstat(file.number(), &status), 0);
  EXPECT_EQ(status.st_size, size);
  if (facts.tell_holes) {
    EXPECT_GE(facts.data_bytes, 1U);
    EXPECT_EQ(lseek(file.number(), 0, SEEK_DATA), -1);
    EXPECT_EQ(errno, ENXIO);
  }
}

TEST(FileFacts, OfAFolderThatIsNotThereAreUnknown) {
  EXPECT_FALSE(file_facts("/proc/self/no-such-folder").can_be_made);
}

TEST(KvmMissing, SaysWhatTheFactsSayAndCreatesNothing) {
  const bool was_there = std::filesystem::exists("/dev/kvm");
  EXPECT_EQ(kvm_missing(), machine_facts().kvm_missing);
  EXPECT_EQ(std::filesystem::exists("/dev/kvm"), was_there);
  if (!was_there) EXPECT_NE(kvm_missing(), "");
}

TEST(HugePageBytes, OfNoMappingAreUnknown) { EXPECT_FALSE(huge_page_bytes(nullptr)); }

TEST(HugePageBytes, OfMemoryThatIsKeptFromThemAreNone) {
  constexpr std::size_t bytes = std::size_t{4} << 20;
  void* const host = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(host, MAP_FAILED);
  static_cast<void>(madvise(host, bytes, MADV_NOHUGEPAGE));
  static_cast<volatile char*>(host)[bytes / 2] = 1;
  EXPECT_EQ(huge_page_bytes(host), 0U);
  munmap(host, bytes);
}

} // namespace
