#include <gtest/gtest.h>
#include <vector>

import cppvmm.vcpu;

namespace cppvmm::test {
namespace {

TEST(CpuidEntries, AreFoundByLeafAndBySubleafWhereItCounts) {
  const std::vector<CpuidEntry> entries = {{.function = 1, .eax = 10},
                                           {.function = 4, .index = 0, .index_significant = true, .eax = 40},
                                           {.function = 4, .index = 1, .index_significant = true, .eax = 41}};
  EXPECT_EQ(find_cpuid(entries, 1), &entries[0]);
  EXPECT_EQ(find_cpuid(entries, 1, 7), &entries[0]);
  EXPECT_EQ(find_cpuid(entries, 4, 1), &entries[2]);
  EXPECT_EQ(find_cpuid(entries, 4, 2), nullptr);
  EXPECT_EQ(find_cpuid(entries, 2), nullptr);
}

TEST(CpuidEntries, AreReplacedOrAdded) {
  std::vector<CpuidEntry> entries = {{.function = 1, .eax = 10},
                                     {.function = 4, .index = 1, .index_significant = true, .eax = 41}};
  set_cpuid_entry(entries, {.function = 1, .eax = 11});
  set_cpuid_entry(entries, {.function = 4, .index = 1, .index_significant = true, .eax = 42});
  ASSERT_EQ(entries.size(), 2U);
  EXPECT_EQ(entries[0].eax, 11U);
  EXPECT_EQ(entries[1].eax, 42U);
  set_cpuid_entry(entries, {.function = 4, .index = 2, .index_significant = true, .eax = 43});
  set_cpuid_entry(entries, {.function = 0x4000'0000});
  EXPECT_EQ(entries.size(), 4U);
}

} // namespace
} // namespace cppvmm::test
