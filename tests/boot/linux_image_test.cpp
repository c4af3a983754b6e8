#include "examples/boot/layout.hpp"
#include "examples/boot/linux_image.hpp"

#include <algorithm>
#include <asm/bootparam.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <gtest/gtest.h>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace cppvmm;
using namespace cppvmm::boot;

constexpr std::uint64_t mebi = std::uint64_t{1} << 20;
constexpr std::uint64_t gibi = std::uint64_t{1} << 30;
constexpr std::size_t header_at = 0x1F1;
constexpr std::size_t setup_bytes = 3 * 512;
constexpr std::size_t kernel_bytes = 0x4000;
constexpr std::uint64_t working_bytes = 40 * mebi;

using Bytes = std::vector<std::byte>;

setup_header good_header() {
  setup_header header{};
  header.setup_sects = 2;
  header.syssize = kernel_bytes / 16;
  header.boot_flag = 0xAA55;
  header.jump = 0x6AEB; // over the header, to 0x202 + 0x6A
  header.header = 0x5372'6448;
  header.version = 0x020F;
  header.loadflags = LOADED_HIGH;
  header.initrd_addr_max = 0x7FFF'FFFF;
  header.kernel_alignment = 2 * mebi;
  header.relocatable_kernel = 1;
  header.xloadflags = XLF_KERNEL_64;
  header.cmdline_size = 2047;
  header.payload_offset = 0x300;
  header.payload_length = 0x3000;
  header.pref_address = 16 * mebi;
  header.init_size = working_bytes;
  return header;
}

/// A file with that header and a kernel of which every byte is 0xC3.
Bytes image_file(const setup_header& header) {
  Bytes file(setup_bytes + kernel_bytes, std::byte{0xC3});
  std::fill_n(file.begin(), setup_bytes, std::byte{0});
  std::memcpy(file.data() + header_at, &header, sizeof header);
  return file;
}

Bytes changed(const std::function<void(setup_header&)>& change) {
  setup_header header = good_header();
  change(header);
  return image_file(header);
}

std::string why_not(const Bytes& file) {
  const auto image = parse_linux_image(file);
  return image ? "nothing" : image.error();
}

TEST(LinuxImage, SaysWhereTheKernelIsAndWhatItNeeds) {
  const Bytes file = image_file(good_header());
  const auto image = parse_linux_image(file);
  ASSERT_TRUE(image) << image.error();
  EXPECT_EQ(image->header.data(), file.data() + header_at);
  EXPECT_EQ(image->header.size(), 0x202 + 0x6A - header_at);
  EXPECT_EQ(image->kernel.data(), file.data() + setup_bytes);
  EXPECT_EQ(image->kernel.size(), kernel_bytes);
  EXPECT_EQ(image->preferred_address, 16 * mebi);
  EXPECT_TRUE(image->relocatable);
  EXPECT_EQ(image->alignment, 2 * mebi);
  EXPECT_EQ(image->working_bytes, working_bytes);
  EXPECT_EQ(image->initrd_last, 0x7FFF'FFFFU);
  EXPECT_EQ(image->command_line_bytes, 2047U);
}

TEST(LinuxImage, MayHaveBytesAfterTheKernel) {
  Bytes file = image_file(good_header());
  file.resize(file.size() + 1000); // a signature
  const auto image = parse_linux_image(file);
  ASSERT_TRUE(image);
  EXPECT_EQ(image->kernel.size(), kernel_bytes);
}

TEST(LinuxImage, NoSetupSectorsMeansFour) {
  Bytes file = changed([](auto& header) { header.setup_sects = 0; });
  file.resize(5 * 512 + kernel_bytes);
  const auto image = parse_linux_image(file);
  ASSERT_TRUE(image) << image.error();
  EXPECT_EQ(image->kernel.data(), file.data() + 5 * 512);
}

TEST(LinuxImage, EveryKindOfDamageHasItsWords) {
  Bytes elf(10'000);
  std::memcpy(elf.data(),
              "\x7F"
              "ELF",
              4);
  Bytes cut = image_file(good_header());
  cut.pop_back();
  using Header = setup_header;
  const std::vector<std::pair<Bytes, const char*>> damages = {
      {{}, "too short"},
      {Bytes(100), "too short"},
      {Bytes(10'000), "is no bzImage"},
      {elf, "ELF"},
      {cut, "is truncated: it has 17919 of 17920 bytes"},
      {changed([](Header& header) { header.boot_flag = 0; }), "is no bzImage"},
      {changed([](Header& header) { header.header = 0; }), "is no bzImage"},
      {changed([](Header& header) { header.version = 0x020B; }), "protocol 2.11"},
      {changed([](Header& header) { header.loadflags = 0; }), "zImage"},
      {changed([](Header& header) { header.xloadflags = 0; }), "32-bit"},
      {changed([](Header& header) { header.jump = 0x10EB; }), "header ends at 0x212"},
      {changed([](Header& header) {
         header.setup_sects = 1;
         header.jump = 0xFFEB;
       }),
       "nothing"}, // the header may fill the setup
      {changed([](Header& header) { header.setup_sects = 200; }), "is truncated"},
      {changed([](Header& header) { header.syssize = 0xFFFF'FFFF; }), "is truncated"},
      {changed([](Header& header) { header.syssize = 0; }), "its kernel has 0x0 bytes"},
      {changed([](Header& header) { header.syssize = 0x20; }), "its kernel has 0x200 bytes"},
      {changed([](Header& header) { header.kernel_alignment = 0; }), "alignment is 0x0"},
      {changed([](Header& header) { header.kernel_alignment = 3 * mebi; }), "alignment is 0x300000"},
      {changed([](Header& header) { header.kernel_alignment = 512; }), "alignment is 0x200"},
      {changed([](Header& header) { header.pref_address = 0; }), "address is 0x0"},
      {changed([](Header& header) { header.pref_address = mebi + 1; }), "address is 0x100001"},
      {changed([](Header& header) { header.pref_address = 4 * gibi; }), "address is 0x100000000"},
      {changed([](Header& header) { header.init_size = kernel_bytes - 1; }), "works with 0x3fff bytes"},
      {changed([](Header& header) { header.payload_length = kernel_bytes; }), "payload"},
      {changed([](Header& header) { header.payload_offset = 0xFFFF'FFFF; }), "payload"},
      {changed([](Header& header) { header.cmdline_size = 0; }), "command line"},
  };
  for (const auto& [file, words] : damages) {
    const std::string why = why_not(file);
    EXPECT_NE(why.find(words), std::string::npos) << words << ": " << why;
    EXPECT_EQ(why.find('\n'), std::string::npos) << why;
  }
}

TEST(LinuxImage, IsRefusedHoweverShortItIsCut) {
  const Bytes file = image_file(good_header());
  for (std::size_t size = 0; size < file.size(); ++size)
    ASSERT_FALSE(parse_linux_image(std::span(file).first(size))) << size;
}

TEST(LinuxPlan, OfAnyHeaderIsARefusalOrStaysInside) {
  std::mt19937 random(1);
  const auto ram = ram_ranges(128 * mebi);
  std::size_t plans = 0;
  for (int round = 0; round < 20'000; ++round) {
    Bytes file = image_file(good_header());
    for (unsigned i = random() % 4; i != 0; --i)
      file[header_at + random() % sizeof(setup_header)] = static_cast<std::byte>(random());
    const auto image = parse_linux_image(file);
    if (!image) continue;
    ASSERT_GE(image->kernel.data(), file.data());
    ASSERT_LE(image->kernel.data() + image->kernel.size(), file.data() + file.size());
    ASSERT_LE(image->header.data() + image->header.size(), image->kernel.data());
    const auto plan = plan_linux(*image, ram, 5000, "quiet", 1);
    if (!plan) continue;
    ++plans;
    ASSERT_GE(plan->kernel, mebi);
    ASSERT_LE(plan->kernel + image->kernel.size(), 128 * mebi);
    ASSERT_GE(plan->initrd, plan->kernel + image->kernel.size());
    ASSERT_LE(plan->initrd + 5000, 128 * mebi);
  }
  EXPECT_GT(plans, 1000U);
}

class Planned : public testing::Test {
protected:
  /// Plans for an image with that header; what is planned is in `memory` then, by page.
  void plan(std::uint64_t memory_bytes, std::uint64_t initrd_bytes = 0, const std::string& command_line = "",
            std::uint32_t cpus = 1) {
    ram = ram_ranges(memory_bytes);
    file = image_file(header);
    const auto image = parse_linux_image(file);
    ASSERT_TRUE(image) << image.error();
    auto made = plan_linux(*image, ram, initrd_bytes, command_line, cpus);
    error = made ? "" : made.error();
    if (made) planned = std::move(*made);
    if (made) std::memcpy(&zero_page, at(planned.zero_page, sizeof zero_page).data(), sizeof zero_page);
  }

  /// Bytes of a block; an empty one, and a failed test, when no block has them.
  [[nodiscard]] Bytes at(std::uint64_t address, std::size_t bytes) const {
    for (const auto& block : planned.blocks)
      if (address >= block.address && address - block.address + bytes <= block.bytes.size()) {
        const auto first = block.bytes.begin() + static_cast<std::ptrdiff_t>(address - block.address);
        return {first, first + static_cast<std::ptrdiff_t>(bytes)};
      }
    ADD_FAILURE() << "nothing is loaded at " << address;
    return Bytes(bytes);
  }
  [[nodiscard]] std::uint64_t word(std::uint64_t address) const {
    std::uint64_t value;
    std::memcpy(&value, at(address, sizeof value).data(), sizeof value);
    return value;
  }

  /// Type by [start, end).
  [[nodiscard]] std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint32_t> memory_map() const {
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint32_t> map;
    for (std::size_t i = 0; i < zero_page.e820_entries; ++i) {
      const boot_e820_entry entry = zero_page.e820_table[i];
      map[{+entry.addr, entry.addr + entry.size}] = +entry.type;
    }
    return map;
  }

  setup_header header = good_header();
  std::vector<zeroing::Pages> ram;
  Bytes file;
  LinuxPlan planned;
  std::string error;
  boot_params zero_page{}; // packed: its members are compared by value, for no reference may point at them
};

TEST_F(Planned, TheKernelIsWhereItWantsToBe) {
  plan(128 * mebi);
  EXPECT_EQ(planned.kernel, 16 * mebi);
  EXPECT_EQ(planned.entry, 16 * mebi + 0x200);
}

TEST_F(Planned, TheKernelIsLowerWhereItDoesNotFitElse) {
  plan(50 * mebi);
  EXPECT_EQ(error, "");
  EXPECT_EQ(planned.kernel, 2 * mebi);
}

TEST_F(Planned, AKernelThatCannotBeElsewhereIsNot) {
  header.relocatable_kernel = 0;
  plan(50 * mebi);
  EXPECT_EQ(error, "--memory is too little: the kernel alone needs 56 MiB, there are 50 MiB");
}

TEST_F(Planned, TooLittleMemoryIsRefused) {
  plan(41 * mebi);
  EXPECT_EQ(error, "--memory is too little: the kernel alone needs 42 MiB, there are 41 MiB");
  plan(42 * mebi);
  EXPECT_EQ(error, "");
}

TEST_F(Planned, NoBlockIsOverAnotherOrTheKernel) {
  plan(60 * mebi, 3 * mebi + 5, std::string(2047, 'x'), 254);
  ASSERT_EQ(error, "");
  std::vector<std::pair<std::uint64_t, std::uint64_t>> taken{{planned.kernel, planned.kernel + working_bytes},
                                                             {planned.initrd, planned.initrd + 3 * mebi + 5}};
  for (const auto& block : planned.blocks)
    taken.emplace_back(block.address, block.address + block.bytes.size());
  std::ranges::sort(taken);
  EXPECT_GE(taken.front().first, 0x500U) << "real mode's interrupt table and BIOS data";
  for (std::size_t i = 1; i < taken.size(); ++i)
    EXPECT_GE(taken[i].first, taken[i - 1].second);
  EXPECT_LE(taken.back().second, 60 * mebi);
}

TEST_F(Planned, TheInitrdIsHighAndTheKernelKnowsIt) {
  plan(128 * mebi, 5000);
  EXPECT_EQ(planned.initrd % 4096, 0U);
  EXPECT_GT(planned.initrd + 5000, 128 * mebi - 4096);
  EXPECT_LE(planned.initrd + 5000, 128 * mebi);
  EXPECT_EQ(+zero_page.hdr.ramdisk_image, planned.initrd);
  EXPECT_EQ(+zero_page.hdr.ramdisk_size, 5000U);
}

TEST_F(Planned, TheInitrdIsWhereTheKernelReachesIt) {
  header.initrd_addr_max = 0x37FF'FFFF;
  plan(8 * gibi, 5000);
  EXPECT_EQ(error, "");
  EXPECT_LE(planned.initrd + 5000, 0x3800'0000U);
  EXPECT_GT(planned.initrd, 0x37FF'0000U);
}

TEST_F(Planned, AnInitrdThatDoesNotFitIsRefused) {
  plan(64 * mebi, 20 * mebi);
  EXPECT_EQ(error, "--memory is too little: the initrd has 20 MiB, and beside the kernel there are 8 MiB");
  header.initrd_addr_max = 8 * mebi;
  plan(64 * mebi, 1);
  EXPECT_EQ(error, "--memory is too little: the initrd has 1 MiB, and beside the kernel there are 0 MiB");
}

TEST_F(Planned, WithoutAnInitrdThereIsNone) {
  plan(128 * mebi);
  EXPECT_EQ(+zero_page.hdr.ramdisk_image, 0U);
  EXPECT_EQ(+zero_page.hdr.ramdisk_size, 0U);
}

TEST_F(Planned, TheCommandLineEnds) {
  plan(128 * mebi, 0, "console=ttyS0");
  const std::string text = "console=ttyS0";
  Bytes expected(text.size() + 1);
  std::memcpy(expected.data(), text.data(), text.size());
  EXPECT_EQ(at(zero_page.hdr.cmd_line_ptr, expected.size()), expected);
}

TEST_F(Planned, ACommandLineThatIsTooLongIsRefused) {
  plan(128 * mebi, 0, std::string(2047, 'x'));
  EXPECT_EQ(error, "");
  plan(128 * mebi, 0, std::string(2048, 'x'));
  EXPECT_EQ(error, "--append is too long: 2048 of at most 2047 bytes");
  header.cmdline_size = 0xFFFF'FFFF;
  plan(128 * mebi, 0, std::string(100'000, 'x'));
  EXPECT_EQ(error, "--append is too long: 100000 of at most 65535 bytes");
}

TEST_F(Planned, MoreCpusThanAnMpTableHasRoomForAreRefused) {
  plan(128 * mebi, 0, "", 254);
  EXPECT_EQ(error, "");
  plan(128 * mebi, 0, "", 255);
  EXPECT_EQ(error, "--cpus is too many: a Linux guest has at most 254");
}

TEST_F(Planned, TheZeroPageHasTheHeaderAndNothingElseOfTheFile) {
  plan(128 * mebi);
  EXPECT_EQ(+zero_page.hdr.header, +header.header);
  EXPECT_EQ(+zero_page.hdr.version, +header.version);
  EXPECT_EQ(+zero_page.hdr.init_size, +header.init_size);
  EXPECT_EQ(+zero_page.hdr.type_of_loader, 0xFF);
  EXPECT_EQ(zero_page.sentinel, 0);
}

TEST_F(Planned, TheMemoryMapHasTheHolesOfAPc) {
  plan(128 * mebi);
  const decltype(memory_map()) small = {
      {{0, 0x9'FC00}, 1}, {{0x9'FC00, 0xA'0000}, 2}, {{0xF'0000, 0x10'0000}, 2}, {{0x10'0000, 128 * mebi}, 1}};
  EXPECT_EQ(memory_map(), small);
  plan(5 * gibi);
  auto large = small;
  large.erase({0x10'0000, 128 * mebi});
  large[{0x10'0000, low_ram_end}] = 1;
  large[{high_ram_start, high_ram_start + 2 * gibi}] = 1;
  EXPECT_EQ(memory_map(), large);
}

TEST_F(Planned, ThePageTablesMapTheFirstFourGibToThemselves) {
  plan(128 * mebi);
  for (std::uint64_t linear = 0; linear < 5 * gibi; linear += 2 * mebi) {
    std::optional<std::uint64_t> physical;
    std::uint64_t table = planned.page_tables;
    for (const unsigned shift : {39U, 30U, 21U}) {
      const std::uint64_t entry = word(table + (linear >> shift & 511) * 8);
      if ((entry & 3) != 3) break;
      table = entry & 0x000F'FFFF'FFFF'F000;
      if (shift == 21 && (entry & 0x80) != 0) physical = table;
    }
    ASSERT_EQ(physical, linear < 4 * gibi ? std::optional(linear) : std::nullopt);
  }
}

TEST_F(Planned, TheGdtHasFlatSegments) {
  plan(128 * mebi);
  EXPECT_EQ(planned.gdt_limit, linux_data_selector + 7);
  EXPECT_EQ(word(planned.gdt), 0U);
  const std::uint64_t code = word(planned.gdt + linux_code_selector);
  const std::uint64_t data = word(planned.gdt + linux_data_selector);
  for (const auto segment : {code, data}) {
    EXPECT_EQ(segment & 0xFF00'00FF'FFFF'0000, 0U) << "base 0";
    EXPECT_EQ(segment & 0x000F'0000'0000'FFFF, 0x000F'0000'0000'FFFFU) << "limit 4 GiB";
    EXPECT_EQ(segment >> 44 & 0xF, 0x9U) << "present, ring 0, no system segment";
  }
  EXPECT_EQ(code >> 40 & 0xE, 0xAU) << "code that can be read";
  EXPECT_EQ(code >> 53 & 3, 1U) << "64-bit";
  EXPECT_EQ(data >> 40 & 0xE, 0x2U) << "data that can be written";
}

} // namespace
