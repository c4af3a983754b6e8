// A Linux kernel image (bzImage) and where things go to start it by its 64-bit boot protocol (Linux
// Documentation/arch/x86/boot.rst). Pure functions over bytes.
#pragma once

#include "tests/guests/zeroing/abi.hpp"

#include <cstddef>
#include <cstdint>
#include <expected>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cppvmm::boot {

/// What an image says of itself, checked. The spans are parts of the file.
struct LinuxImage {
  std::span<const std::byte> header;    ///< The setup header, which lies at 0x1F1 of the file and of the zero page.
  std::span<const std::byte> kernel;    ///< What is loaded.
  std::uint64_t preferred_address = 0;  ///< Where it wants to be.
  bool relocatable = false;             ///< Whether it may be elsewhere, at a multiple of `alignment`.
  std::uint64_t alignment = 0;          ///< A power of two, at least 4 KiB.
  std::uint64_t working_bytes = 0;      ///< What it needs from its address on until it can read its memory map.
  std::uint64_t initrd_last = 0;        ///< The last address that an initrd may have.
  std::uint64_t command_line_bytes = 0; ///< The longest command line, its end not counted.
};

/// Reads the headers of a bzImage. An error is the rest of a sentence about the file: "is ...", "has ...". Damage
/// further inside is not looked for: the kernel's own decompressor finds it.
[[nodiscard]] std::expected<LinuxImage, std::string> parse_linux_image(std::span<const std::byte> file);

/// Bytes to be loaded at an address.
struct LoadedBlock {
  std::uint64_t address = 0;
  std::vector<std::byte> bytes;
};

/// Where a kernel and what it starts with go; all of it in RAM, none over another.
struct LinuxPlan {
  std::uint64_t kernel = 0; ///< For LinuxImage::kernel.
  std::uint64_t initrd = 0; ///< For the initrd; 0 without one.
  std::uint64_t entry = 0;  ///< 64-bit, with RSI = zero_page, interrupts off.
  std::uint64_t zero_page = 0;
  std::uint64_t page_tables = 0; ///< For CR3: the first 4 GiB, each page mapped to itself.
  std::uint64_t gdt = 0;
  std::uint16_t gdt_limit = 0;
  std::vector<LoadedBlock> blocks; ///< All but the kernel and the initrd: the above, the command line, the MP table.
};

/// The selectors of the GDT's flat segments (boot.rst: __BOOT_CS and __BOOT_DS).
inline constexpr std::uint16_t linux_code_selector = 0x10;
inline constexpr std::uint16_t linux_data_selector = 0x18;

/// `ram` as ram_ranges makes it; `initrd_bytes` is 0 without an initrd; `cpus` from 1 on. An error is one line for a
/// person: memory that is too small, a command line that is too long, too many CPUs.
[[nodiscard]] std::expected<LinuxPlan, std::string> plan_linux(const LinuxImage& image,
                                                               std::span<const zeroing::Pages> ram,
                                                               std::uint64_t initrd_bytes,
                                                               std::string_view command_line, std::uint32_t cpus);

} // namespace cppvmm::boot
