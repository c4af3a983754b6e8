// Where things are in the zeroing guest's memory, and what is there when it starts.
#pragma once

#include "tests/guests/zeroing/abi.hpp"

#include <cstddef>
#include <cstdint>
#include <expected>
#include <span>
#include <string>
#include <vector>

namespace cppvmm::boot {

/// RAM is flat from 0; what does not fit below here starts at 4 GiB, as on a PC, where devices have the gap.
inline constexpr std::uint64_t low_ram_end = std::uint64_t{3} << 30;
inline constexpr std::uint64_t high_ram_start = std::uint64_t{4} << 30;

/// `memory_bytes` (a multiple of 4 KiB, not 0) of RAM, ascending.
[[nodiscard]] std::vector<zeroing::Pages> ram_ranges(std::uint64_t memory_bytes);

struct Layout {
  std::vector<zeroing::Pages> ram; ///< Ascending.
  std::uint64_t boot_info = 0;     ///< Guest-physical addresses, all in the block below.
  std::uint64_t report = 0;
  std::uint64_t stacks = 0;      ///< zeroing::stack_bytes for each vCPU.
  std::uint64_t page_tables = 0; ///< The PML4, for CR3.
  std::uint64_t end = 0;         ///< One past the last guest-physical address.
  /// What the guest lives in, as one block to be loaded at zeroing::image_address: image, BootInfo, Report, stacks, and
  /// page tables that map RAM to itself in 2 MiB pages.
  std::vector<std::byte> block;

  /// The pages of `block`.
  [[nodiscard]] zeroing::Pages lives_in() const {
    return {zeroing::image_address / zeroing::page_bytes, block.size() / zeroing::page_bytes};
  }
  [[nodiscard]] std::uint64_t stack_top(std::uint32_t cpu) const { return stacks + (cpu + 1) * zeroing::stack_bytes; }
};

/// Lays out `memory_bytes` (a multiple of 4 KiB) for `cpus` vCPUs (1 to zeroing::max_cpus). Fails with one line for a
/// person when what the guest lives in does not fit.
[[nodiscard]] std::expected<Layout, std::string> make_layout(std::uint64_t memory_bytes, std::uint32_t cpus,
                                                             std::span<const std::byte> image);

/// Page numbers of `count` pages spread evenly over `ram`; those that would fall into `taken` are left out.
[[nodiscard]] std::vector<std::uint64_t> spread_pages(std::span<const zeroing::Pages> ram, std::uint32_t count,
                                                      zeroing::Pages taken);

/// The zeroing guest's image, which is part of this program.
[[nodiscard]] std::span<const std::byte> zeroing_guest_image();

} // namespace cppvmm::boot
