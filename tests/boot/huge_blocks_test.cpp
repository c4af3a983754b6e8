#include "examples/boot/huge_blocks.hpp"

#include <cstdint>
#include <gtest/gtest.h>
#include <vector>

namespace {

using namespace cppvmm::boot;
using Ranges = std::vector<ReportedRange>;

std::uint64_t pages(const Ranges& ram, const Ranges& touched) { return pages_in_untouched_blocks(ram, touched); }

TEST(HugeBlocks, AreLostAsAWhole) {
  EXPECT_EQ(pages({{0, 4096}}, {}), 4096U);
  EXPECT_EQ(pages({{0, 4096}}, {{0, 1}}), 3584U);
  EXPECT_EQ(pages({{0, 4096}}, {{511, 2}}), 3072U);
  EXPECT_EQ(pages({{0, 4096}}, {{0, 1}, {3, 2}, {100, 412}, {4095, 1}}), 3072U);
  EXPECT_EQ(pages({{0, 4096}}, {{0, 4096}}), 0U);
  EXPECT_EQ(pages({}, {{5, 1}}), 0U);
}

TEST(HugeBlocks, CountTheirRamAlone) {
  EXPECT_EQ(pages({{0, 160}, {256, 768}}, {{512, 1}}), 416U);
  EXPECT_EQ(pages({{0, 160}, {256, 768}}, {{300, 1}}), 512U) << "RAM on both sides of a hole is in one block";
  EXPECT_EQ(pages({{0, 512}, {1024, 512}}, {{600, 1}}), 1024U) << "nothing of it is RAM";
}

TEST(HugeBlocks, AreReportedInNoMoreRangesThanAnAnswerHas) {
  Ranges touched;
  for (std::uint64_t block = 1; block < 600; block += 2)
    touched.push_back({block * 512, 1});
  EXPECT_EQ(pages({{0, 600 * 512}}, touched), 255U * 512);
  EXPECT_EQ(pages({{0, 256}, {256, 256}}, {}), 512U);
}

} // namespace
