#include "linux_image.hpp"

#include "mp_table.hpp"

#include <algorithm>
#include <array>
#include <asm/bootparam.h>
#include <bit>
#include <cstdio>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

namespace cppvmm::boot {
namespace {

constexpr std::uint64_t page_bytes = zeroing::page_bytes;
constexpr std::uint64_t mebi = std::uint64_t{1} << 20;
constexpr std::uint64_t gibi = std::uint64_t{1} << 30;

// boot.rst, "Details of Header Fields".
constexpr std::size_t header_offset = 0x1F1;
constexpr std::size_t header_length_offset = 0x201; // one byte: the header ends this much after 0x202
constexpr std::uint16_t boot_flag = 0xAA55;
constexpr std::uint32_t header_magic = 0x5372'6448; // "HdrS"
constexpr std::uint16_t oldest_version = 0x020C;    // 2.12, the first with xloadflags
constexpr std::uint64_t sector_bytes = 512;
constexpr std::uint64_t paragraph_bytes = 16;
constexpr std::uint64_t entry_offset = 0x200;
constexpr std::uint8_t loader_unregistered = 0xFF;
static_assert(offsetof(boot_params, hdr) == header_offset && sizeof(boot_params) == page_bytes);

// Below 640 KiB, as boot loaders have it. What lies at 0 belongs to real mode, and the extended BIOS data area is the
// last KiB before 640.
constexpr std::uint64_t gdt_address = 0x1000;
constexpr std::uint64_t zero_page_address = 0x2000;
constexpr std::uint64_t page_table_address = 0x3000;
constexpr std::uint64_t command_line_address = 0x1'0000;
constexpr std::uint64_t command_line_room = 0x1'0000;
constexpr std::uint64_t low_end = 0x9'FC00;
constexpr std::uint64_t mp_table_address = 0xF'0000; // where the MP specification has it searched for
constexpr std::uint64_t high_start = mebi;

constexpr std::uint32_t e820_ram = 1;
constexpr std::uint32_t e820_reserved = 2;

template <class T>
std::vector<std::byte> bytes_of(const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  const auto bytes = std::as_bytes(std::span(&value, 1));
  return {bytes.begin(), bytes.end()};
}

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t to) { return (value + to - 1) / to * to; }

std::string hex(std::uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string mebibytes(std::uint64_t bytes) { return std::to_string(round_up(bytes, mebi) / mebi) + " MiB"; }

/// Code and data, base 0, limit 4 GiB, as a descriptor (Intel SDM vol. 3, 3.4.5).
std::vector<std::byte> make_gdt() {
  constexpr std::uint64_t code64 = 0x00AF'9B00'0000'FFFF;
  constexpr std::uint64_t data = 0x00CF'9300'0000'FFFF;
  std::array<std::uint64_t, 4> gdt{};
  gdt[linux_code_selector / 8] = code64;
  gdt[linux_data_selector / 8] = data;
  return bytes_of(gdt);
}

/// PML4, page-directory-pointer table, and a page directory for each GiB.
std::vector<std::byte> make_page_tables() {
  constexpr std::uint64_t flags = 0b11;        // present, writable (Intel SDM vol. 3, 4.5)
  constexpr std::uint64_t large_page = 1 << 7; // a directory entry that maps 2 MiB
  constexpr std::size_t entries = 512;
  constexpr std::uint64_t pointers = page_table_address + page_bytes;
  constexpr std::uint64_t directories = pointers + page_bytes;
  std::array<std::uint64_t, 6 * entries> tables{};
  tables[0] = pointers | flags;
  for (std::size_t i = 0; i < 4; ++i)
    tables[entries + i] = (directories + i * page_bytes) | flags;
  for (std::size_t i = 0; i < 4 * entries; ++i)
    tables[2 * entries + i] = i * 2 * mebi | large_page | flags;
  return bytes_of(tables);
}

/// The lowest address from 1 MiB on that suits the kernel, with RAM up to `end`.
std::optional<std::uint64_t> place_kernel(const LinuxImage& image, std::uint64_t end) {
  const auto fits = [&](std::uint64_t at) { return at < end && end - at >= image.working_bytes; };
  if (fits(image.preferred_address)) return image.preferred_address;
  const std::uint64_t lowest = round_up(high_start, image.alignment);
  if (image.relocatable && fits(lowest)) return lowest;
  return std::nullopt;
}

boot_params make_zero_page(const LinuxImage& image, std::span<const zeroing::Pages> ram, const LinuxPlan& plan,
                           std::uint64_t initrd_bytes) {
  boot_params zero_page{};
  std::memcpy(&zero_page.hdr, image.header.data(), std::min(image.header.size(), sizeof zero_page.hdr));
  zero_page.hdr.type_of_loader = loader_unregistered;
  zero_page.hdr.cmd_line_ptr = static_cast<std::uint32_t>(command_line_address);
  zero_page.hdr.ramdisk_image = static_cast<std::uint32_t>(plan.initrd);
  zero_page.hdr.ramdisk_size = static_cast<std::uint32_t>(initrd_bytes);
  const auto add = [&](std::uint64_t start, std::uint64_t end, std::uint32_t type) {
    zero_page.e820_table[zero_page.e820_entries++] = {.addr = start, .size = end - start, .type = type};
  };
  add(0, low_end, e820_ram);
  add(low_end, 0xA'0000, e820_reserved);
  add(mp_table_address, high_start, e820_reserved);
  add(high_start, ram.front().count * page_bytes, e820_ram);
  for (const auto& range : ram.subspan(1))
    add(range.first * page_bytes, (range.first + range.count) * page_bytes, e820_ram);
  return zero_page;
}

} // namespace

std::expected<LinuxImage, std::string> parse_linux_image(std::span<const std::byte> file) {
  const auto wrong = [](std::string text) { return std::unexpected(std::move(text)); };
  constexpr std::array elf = {std::byte{0x7F}, std::byte{'E'}, std::byte{'L'}, std::byte{'F'}};
  if (file.size() >= elf.size() && std::ranges::equal(file.first(elf.size()), elf))
    return wrong("is an ELF file: the bzImage is wanted, which distributions call vmlinuz");
  if (file.size() < header_offset + sizeof(setup_header)) return wrong("is too short for a Linux kernel");

  setup_header header;
  std::memcpy(&header, file.data() + header_offset, sizeof header);
  if (header.boot_flag != boot_flag || header.header != header_magic)
    return wrong("is no bzImage: it has no Linux boot header");
  if (header.version < oldest_version)
    return wrong("has boot protocol " + std::to_string(header.version >> 8) + "." +
                 std::to_string(header.version & 0xFF) + ": 2.12 is needed (Linux 3.8)");
  if ((header.loadflags & LOADED_HIGH) == 0) return wrong("is a zImage, which loads below 1 MiB: a bzImage is needed");
  if ((header.xloadflags & XLF_KERNEL_64) == 0) return wrong("is a 32-bit kernel: it has no 64-bit entry point");

  const std::size_t header_end = header_length_offset + 1 + std::to_integer<std::size_t>(file[header_length_offset]);
  // 0 means 4 (boot.rst, setup_sects).
  const std::uint64_t setup_bytes = (header.setup_sects == 0 ? 5U : header.setup_sects + 1U) * sector_bytes;
  if (header_end < header_offset + offsetof(setup_header, handover_offset) || header_end > setup_bytes)
    return wrong("is damaged: its boot header ends at " + hex(header_end));
  const std::uint64_t kernel_bytes = header.syssize * paragraph_bytes;
  if (file.size() < setup_bytes || file.size() - setup_bytes < kernel_bytes)
    return wrong("is truncated: it has " + std::to_string(file.size()) + " of " +
                 std::to_string(setup_bytes + kernel_bytes) + " bytes");
  if (kernel_bytes <= entry_offset) return wrong("is damaged: its kernel has " + hex(kernel_bytes) + " bytes");
  if (!std::has_single_bit(std::uint32_t{header.kernel_alignment}) || header.kernel_alignment < page_bytes)
    return wrong("is damaged: its alignment is " + hex(header.kernel_alignment));
  if (header.pref_address < high_start || header.pref_address % page_bytes != 0 || header.pref_address >= 4 * gibi)
    return wrong("is damaged: its address is " + hex(header.pref_address));
  if (header.init_size < kernel_bytes)
    return wrong("is damaged: it works with " + hex(header.init_size) + " bytes and has " + hex(kernel_bytes));
  if (std::uint64_t{header.payload_offset} + header.payload_length > kernel_bytes)
    return wrong("is damaged: its payload ends outside");
  if (header.cmdline_size == 0) return wrong("is damaged: it takes no command line");
  return LinuxImage{.header = file.subspan(header_offset, header_end - header_offset),
                    .kernel = file.subspan(setup_bytes, kernel_bytes),
                    .preferred_address = header.pref_address,
                    .relocatable = header.relocatable_kernel != 0,
                    .alignment = header.kernel_alignment,
                    .working_bytes = header.init_size,
                    .initrd_last = header.initrd_addr_max,
                    .command_line_bytes = header.cmdline_size};
}

std::expected<LinuxPlan, std::string> plan_linux(const LinuxImage& image, std::span<const zeroing::Pages> ram,
                                                 std::uint64_t initrd_bytes, std::string_view command_line,
                                                 std::uint32_t cpus) {
  if (cpus > mp_table_max_cpus)
    return std::unexpected("--cpus is too many: a Linux guest has at most " + std::to_string(mp_table_max_cpus));
  const std::uint64_t longest = std::min(image.command_line_bytes, command_line_room - 1);
  if (command_line.size() > longest)
    return std::unexpected("--append is too long: " + std::to_string(command_line.size()) + " of at most " +
                           std::to_string(longest) + " bytes");

  const std::uint64_t low_ram = ram.front().count * page_bytes;
  const auto kernel = place_kernel(image, low_ram);
  if (!kernel)
    return std::unexpected(
        "--memory is too little: the kernel alone needs " +
        mebibytes((image.relocatable ? round_up(high_start, image.alignment) : image.preferred_address) +
                  image.working_bytes) +
        ", there are " + mebibytes(low_ram) + (ram.size() > 1 ? " below 4 GiB" : ""));
  LinuxPlan plan;
  plan.kernel = *kernel;
  plan.entry = *kernel + entry_offset;
  plan.zero_page = zero_page_address;
  plan.page_tables = page_table_address;
  plan.gdt = gdt_address;
  if (initrd_bytes != 0) {
    const std::uint64_t end = std::min({low_ram, image.initrd_last + 1, 4 * gibi});
    const std::uint64_t after_kernel = *kernel + image.working_bytes;
    if (end < after_kernel || end - after_kernel < round_up(initrd_bytes, page_bytes))
      return std::unexpected("--memory is too little: the initrd has " + mebibytes(initrd_bytes) + ", and beside the " +
                             "kernel there are " + mebibytes(end < after_kernel ? 0 : end - after_kernel));
    plan.initrd = (end - initrd_bytes) / page_bytes * page_bytes;
  }

  plan.blocks.push_back({plan.gdt, make_gdt()});
  plan.gdt_limit = static_cast<std::uint16_t>(plan.blocks.back().bytes.size() - 1);
  plan.blocks.push_back({plan.page_tables, make_page_tables()});
  plan.blocks.push_back({plan.zero_page, bytes_of(make_zero_page(image, ram, plan, initrd_bytes))});
  const auto text = std::as_bytes(std::span(command_line));
  std::vector<std::byte> terminated(text.begin(), text.end());
  terminated.push_back(std::byte{0});
  plan.blocks.push_back({command_line_address, std::move(terminated)});
  plan.blocks.push_back({mp_table_address, make_mp_table(mp_table_address, cpus)});
  return plan;
}

} // namespace cppvmm::boot
