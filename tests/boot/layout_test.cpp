#include "examples/boot/layout.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <gtest/gtest.h>
#include <optional>

namespace {

using namespace cppvmm;
using namespace cppvmm::boot;

constexpr std::uint64_t mebi = std::uint64_t{1} << 20;
constexpr std::uint64_t gibi = std::uint64_t{1} << 30;

std::uint64_t word(const Layout& layout, std::uint64_t address) {
  const std::uint64_t offset = address - zeroing::image_address;
  if (address < zeroing::image_address || offset + 8 > layout.block.size()) return 0;
  std::uint64_t value;
  std::memcpy(&value, layout.block.data() + offset, 8);
  return value;
}

/// Where the page tables send a linear address, walked as the processor does (Intel SDM vol. 3, 4.5).
std::optional<std::uint64_t> translate(const Layout& layout, std::uint64_t linear) {
  constexpr std::uint64_t address_bits = 0x000F'FFFF'FFFF'F000;
  std::uint64_t table = layout.page_tables;
  for (const unsigned shift : {39U, 30U, 21U}) {
    const std::uint64_t entry = word(layout, table + (linear >> shift & 511) * 8);
    if ((entry & 3) != 3) return std::nullopt;
    if (shift == 21)
      return (entry & 0x80) != 0 ? std::optional((entry & address_bits) + (linear & (2 * mebi - 1))) : std::nullopt;
    table = entry & address_bits;
  }
  return std::nullopt;
}

class LayoutOf : public testing::TestWithParam<std::uint64_t> {};

TEST_P(LayoutOf, MapsAllRamToItselfAndNothingElse) {
  const std::uint64_t memory = GetParam();
  const auto layout = make_layout(memory, 3, zeroing_guest_image());
  ASSERT_TRUE(layout) << layout.error();
  std::uint64_t bytes = 0;
  for (const auto& ram : layout->ram) {
    const std::uint64_t start = ram.first * 4096;
    const std::uint64_t end = start + ram.count * 4096;
    bytes += end - start;
    for (std::uint64_t at = start; at < end; at += 2 * mebi)
      ASSERT_EQ(translate(*layout, at), at);
    EXPECT_EQ(translate(*layout, end - 1), end - 1);
    EXPECT_LE(end, layout->end);
  }
  EXPECT_EQ(bytes, memory);
  if (memory > low_ram_end) {
    EXPECT_FALSE(translate(*layout, low_ram_end));
    EXPECT_FALSE(translate(*layout, high_ram_start - 1));
  }
  EXPECT_FALSE(translate(*layout, (layout->end + 2 * mebi - 1) / (2 * mebi) * (2 * mebi)));
}

TEST_P(LayoutOf, PutsEverythingTheGuestLivesInWhereItSaysSo) {
  const auto layout = make_layout(GetParam(), 3, zeroing_guest_image());
  ASSERT_TRUE(layout) << layout.error();
  const std::uint64_t block_end = zeroing::image_address + layout->block.size();
  zeroing::BootInfo info;
  std::memcpy(&info, layout->block.data() + (layout->boot_info - zeroing::image_address), sizeof info);
  EXPECT_EQ(info.magic, zeroing::BootInfo::expected_magic);
  EXPECT_EQ(info.cpus, 3U);
  EXPECT_EQ(info.report, layout->report);
  ASSERT_EQ(info.ram_ranges, layout->ram.size());
  ASSERT_EQ(info.lives_in_ranges, 1U);
  EXPECT_EQ(info.lives_in[0].first * 4096, zeroing::image_address);
  EXPECT_EQ((info.lives_in[0].first + info.lives_in[0].count) * 4096, block_end);
  EXPECT_LE(block_end, layout->ram[0].count * 4096);

  // Image, BootInfo, Report, stacks and tables follow each other and do not overlap.
  const auto image = zeroing_guest_image();
  EXPECT_EQ(std::memcmp(layout->block.data(), image.data(), image.size()), 0);
  EXPECT_GE(layout->boot_info, zeroing::image_address + image.size());
  EXPECT_GE(layout->report, layout->boot_info + sizeof(zeroing::BootInfo));
  EXPECT_GE(layout->stacks, layout->report + sizeof(zeroing::Report));
  EXPECT_EQ(layout->stack_top(0), layout->stacks + zeroing::stack_bytes);
  EXPECT_LE(layout->stack_top(2), layout->page_tables);
}

INSTANTIATE_TEST_SUITE_P(Memory, LayoutOf,
                         testing::Values(4 * mebi, 4 * mebi + 4096, 64 * mebi, gibi, 3 * gibi, 3 * gibi + 4096,
                                         5 * gibi, 600 * gibi));

TEST(Layout, SpreadsPagesOverRamAroundWhatTheGuestLivesIn) {
  const auto layout = make_layout(5 * gibi, 1, zeroing_guest_image());
  ASSERT_TRUE(layout) << layout.error();
  const auto pages = spread_pages(layout->ram, 1000, layout->lives_in());
  EXPECT_GE(pages.size(), 999U);
  EXPECT_TRUE(std::ranges::is_sorted(pages, std::less_equal<>())) << "none twice";
  EXPECT_LT(pages.front() * 4096, 5 * gibi / 1000);
  EXPECT_GT(pages.back() * 4096, layout->end - 5 * gibi / 1000);
  for (const auto page : pages)
    EXPECT_FALSE(page * 4096 >= low_ram_end && page * 4096 < high_ram_start) << page;

  const auto small = make_layout(4 * mebi, 1, zeroing_guest_image());
  const auto all = spread_pages(small->ram, 1'000'000, small->lives_in());
  EXPECT_EQ(all.size(), 1024 - small->lives_in().count);
  EXPECT_TRUE(std::ranges::none_of(all, [&](auto page) {
    return page >= small->lives_in().first && page < small->lives_in().first + small->lives_in().count;
  }));
  EXPECT_TRUE(spread_pages(small->ram, 0, small->lives_in()).empty());
}

TEST(Layout, RefusesMemoryThatTheGuestDoesNotFitIn) {
  const auto layout = make_layout(mebi + 65536, 200, zeroing_guest_image());
  ASSERT_FALSE(layout);
  EXPECT_NE(layout.error().find("--memory"), std::string::npos);
}

} // namespace
