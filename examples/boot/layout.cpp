#include "layout.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

extern "C" {
extern const std::byte cppvmm_zeroing_image[];
extern const std::byte cppvmm_zeroing_image_end[];
}

namespace cppvmm::boot {
namespace {

using zeroing::image_address;
using zeroing::page_bytes;

// Page-table entries: Intel SDM vol. 3, 4.5 "4-Level Paging".
constexpr std::uint64_t entry_present = 1 << 0;
constexpr std::uint64_t entry_writable = 1 << 1;
constexpr std::uint64_t entry_is_page = 1 << 7;
constexpr std::uint64_t entries_per_table = 512;
constexpr std::uint64_t large_page = std::uint64_t{2} << 20;
constexpr std::uint64_t table_span = large_page * entries_per_table; // what one page directory maps

template <class T>
void put(std::vector<std::byte>& block, std::uint64_t address, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::memcpy(block.data() + (address - image_address), &value, sizeof value);
}

constexpr std::uint64_t divide_up(std::uint64_t value, std::uint64_t by) {
  return value / by + (value % by != 0 ? 1 : 0);
}

/// One PML4, then its page-directory-pointer tables, then their page directories; every directory below `end` is there.
struct Tables {
  std::uint64_t directories;
  std::uint64_t pointer_tables;

  explicit Tables(std::uint64_t end)
      : directories(divide_up(end, table_span)), pointer_tables(divide_up(directories, entries_per_table)) {}
  [[nodiscard]] std::uint64_t bytes() const { return (1 + pointer_tables + directories) * page_bytes; }

  void write(Layout& layout) const {
    const std::uint64_t pointers = layout.page_tables + page_bytes;
    const std::uint64_t first_directory = pointers + pointer_tables * page_bytes;
    constexpr std::uint64_t flags = entry_present | entry_writable;
    for (std::uint64_t i = 0; i < pointer_tables; ++i)
      put(layout.block, layout.page_tables + i * 8, (pointers + i * page_bytes) | flags);
    for (std::uint64_t i = 0; i < directories; ++i)
      put(layout.block, pointers + i * 8, (first_directory + i * page_bytes) | flags);
    for (const auto& ram : layout.ram) {
      const std::uint64_t ram_end = (ram.first + ram.count) * page_bytes;
      for (std::uint64_t at = ram.first * page_bytes / large_page * large_page; at < ram_end; at += large_page)
        put(layout.block, first_directory + at / large_page * 8, at | flags | entry_is_page);
    }
  }
};

} // namespace

std::vector<zeroing::Pages> ram_ranges(std::uint64_t memory_bytes) {
  const std::uint64_t low = std::min(memory_bytes, low_ram_end);
  std::vector<zeroing::Pages> ram{{0, low / page_bytes}};
  if (memory_bytes > low) ram.push_back({high_ram_start / page_bytes, (memory_bytes - low) / page_bytes});
  return ram;
}

std::vector<std::uint64_t> spread_pages(std::span<const zeroing::Pages> ram, std::uint32_t count,
                                        zeroing::Pages taken) {
  std::uint64_t ram_pages = 0;
  for (const auto& range : ram)
    ram_pages += range.count;
  std::vector<std::uint64_t> pages;
  for (std::uint64_t i = 0; i < std::min<std::uint64_t>(count, ram_pages); ++i) {
    // In the middle of the i-th of `count` equal parts. Neither product overflows: both factors are below 2^35.
    std::uint64_t index = count < ram_pages ? (2 * i + 1) * ram_pages / (2 * std::uint64_t{count}) : i;
    for (const auto& range : ram) {
      if (index < range.count) {
        const std::uint64_t page = range.first + index;
        if (page < taken.first || page - taken.first >= taken.count) pages.push_back(page);
        break;
      }
      index -= range.count;
    }
  }
  return pages;
}

std::span<const std::byte> zeroing_guest_image() { return {cppvmm_zeroing_image, cppvmm_zeroing_image_end}; }

std::expected<Layout, std::string> make_layout(std::uint64_t memory_bytes, std::uint32_t cpus,
                                               std::span<const std::byte> image) {
  Layout layout;
  layout.ram = ram_ranges(memory_bytes);
  const std::uint64_t low = layout.ram.front().count * page_bytes;
  layout.end = (layout.ram.back().first + layout.ram.back().count) * page_bytes;

  const Tables tables(layout.end);
  layout.boot_info = image_address + divide_up(image.size(), page_bytes) * page_bytes;
  layout.report = layout.boot_info + page_bytes;
  layout.stacks = layout.report + page_bytes;
  layout.page_tables = layout.stacks + cpus * zeroing::stack_bytes;
  const std::uint64_t block_end = layout.page_tables + tables.bytes();
  if (block_end > low)
    return std::unexpected("the guest needs " + std::to_string(block_end >> 10) +
                           " KiB of memory to live in, --memory " + "gives it " + std::to_string(low >> 10) + " KiB");

  layout.block.resize(block_end - image_address);
  std::ranges::copy(image, layout.block.begin());
  zeroing::BootInfo info{};
  info.magic = zeroing::BootInfo::expected_magic;
  info.cpus = cpus;
  info.report = layout.report;
  info.balloon_target = zeroing::no_balloon_target;
  std::ranges::copy(layout.ram, info.ram);
  info.ram_ranges = static_cast<std::uint32_t>(layout.ram.size());
  info.lives_in[0] = layout.lives_in();
  info.lives_in_ranges = 1;
  put(layout.block, layout.boot_info, info);
  tables.write(layout);
  return layout;
}

} // namespace cppvmm::boot
