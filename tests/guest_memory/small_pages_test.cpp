#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <gtest/gtest.h>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <vector>

#include "support/machine_facts.hpp"
#include "support/system_calls.hpp"

import cppvmm.guest_memory;

// Anonymous memory that is known to have no transparent huge pages, because its owner wanted none from the start.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = std::uint64_t{1} << 20;
constexpr std::uint64_t bytes = 16 * mib;
constexpr std::uint64_t huge_pages = 2 * mib / page_size;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

class SmallPages : public testing::Test {
protected:
  void SetUp() override {
    if (test::machine_facts().thp_policy.empty()) GTEST_SKIP() << "this kernel has no transparent huge pages";
    if (!test::machine_facts().membarrier) GTEST_SKIP() << "membarrier is refused";
    if (!test::machine_facts().pagemap_scan) GTEST_SKIP() << "this kernel does not tell huge pages (Linux 6.7)";
  }
  void store(std::uint64_t page) const { static_cast<volatile char*>(region.host_address())[page * page_size] = 1; }
  [[nodiscard]] int advise(int advice) const { return madvise(region.host_address(), bytes, advice) == 0 ? 0 : errno; }
  /// Whether a survey goes through all mappings of the process, or waits.
  [[nodiscard]] bool is_costly() const {
    static_cast<void>(memory.survey());
    const auto calls = test::record_system_calls([&] { static_cast<void>(memory.survey()); });
    return std::ranges::any_of(calls, [](const test::SystemCall& call) {
      return call.number == SYS_membarrier ||
             (call.number == SYS_openat && call.path.data() == std::string_view("/proc/self/smaps"));
    });
  }

  Region region = *Region::anonymous(GuestAddress(0), bytes);
  GuestMemory memory{*MemoryMap::make({region})};
};

TEST_F(SmallPages, AreSurveyedWithoutAWalkOfTheProcessesPageTables) {
  if (!test::machine_facts().userfaultfd) GTEST_SKIP() << "this kernel, or this process, has no userfaultfd";
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  EXPECT_TRUE(is_costly());
  ASSERT_TRUE(region.set_huge_pages(HugePages::never));
  store(700);
  EXPECT_FALSE(is_costly());
  EXPECT_EQ(memory.survey().touched, PageSet(pages(700, 1)));
  ASSERT_TRUE(region.set_huge_pages(HugePages::preferred));
  EXPECT_TRUE(is_costly());
  ASSERT_TRUE(region.set_huge_pages(HugePages::never));
  EXPECT_FALSE(is_costly());
}

TEST_F(SmallPages, AreNotToBeFoundWhereThereAreHugePages) {
  if (!test::machine_facts().gives_huge_pages) GTEST_SKIP() << "the host gives no transparent huge pages";
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  ASSERT_TRUE(region.set_huge_pages(HugePages::preferred));
  store(huge_pages);
  ASSERT_TRUE(region.set_huge_pages(HugePages::never));
  EXPECT_TRUE(is_costly());
  EXPECT_EQ(memory.survey().touched, PageSet(pages(huge_pages, huge_pages)));
}

// smaps does not count the huge page of zeros that a read brings, and from Linux 6.13 on a store makes a huge page of
// it.
TEST_F(SmallPages, AreNotToBeFoundWhereTheHugePageOfZerosIs) {
  if (!test::machine_facts().gives_huge_pages) GTEST_SKIP() << "the host gives no transparent huge pages";
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  ASSERT_TRUE(region.set_huge_pages(HugePages::preferred));
  static_cast<void>(static_cast<volatile char*>(region.host_address())[huge_pages * page_size]);
  ASSERT_TRUE(region.set_huge_pages(HugePages::never));
  // Whether a read brings that page, and what a store makes of it, kernels differ in: all is as evidence says.
  store(huge_pages + 1);
  const std::uint64_t made = *region.huge_page_bytes() != 0 ? huge_pages : 1;
  EXPECT_EQ(memory.survey().touched.page_count(), made);
  if (made != 1) EXPECT_TRUE(is_costly());
}

// It is a promise that it is not.
TEST_F(SmallPages, AreNotBelievedInWhereAHugePageIsSeen) {
  if (!test::machine_facts().gives_huge_pages) GTEST_SKIP() << "the host gives no transparent huge pages";
  ASSERT_TRUE(region.set_huge_pages(HugePages::never));
  store(0);
  ASSERT_EQ(advise(MADV_HUGEPAGE), 0);
  store(huge_pages);
  const Survey survey = memory.survey();
  EXPECT_TRUE(survey.zeroed().empty());
  ASSERT_TRUE(survey.regions[0].error);
  EXPECT_EQ(survey.regions[0].error->code, MemoryErrc::unavailable);
  // Who says so gets an answer again.
  ASSERT_TRUE(region.set_huge_pages(HugePages::preferred));
  EXPECT_EQ(memory.survey().zeroed().page_count(), bytes / page_size - 1 - huge_pages);
}

// What the argument rests on: the kernel makes no huge pages of such memory.
TEST_F(SmallPages, StaySmall) {
  constexpr int collapse = 25; // MADV_COLLAPSE, Linux 6.1
  ASSERT_TRUE(region.set_huge_pages(HugePages::never));
  for (std::uint64_t page = 0; page < bytes / page_size; ++page)
    store(page);
  EXPECT_EQ(advise(collapse), EINVAL);
  EXPECT_EQ(*region.huge_page_bytes(), 0U);
}

} // namespace
