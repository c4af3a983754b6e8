#include "examples/boot/mp_table.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace cppvmm::boot;

constexpr std::uint64_t address = 0xF'0000;

unsigned sum(std::span<const std::byte> bytes) {
  return std::accumulate(bytes.begin(), bytes.end(), 0U,
                         [](unsigned total, std::byte byte) { return total + std::to_integer<unsigned>(byte); }) &
         0xFF;
}

std::uint32_t number(std::span<const std::byte> bytes, std::size_t at, std::size_t size) {
  std::uint32_t value = 0;
  std::memcpy(&value, bytes.data() + at, size);
  return value;
}

std::string text(std::span<const std::byte> bytes, std::size_t at, std::size_t size) {
  return {reinterpret_cast<const char*>(bytes.data()) + at, size};
}

class MpTable : public testing::TestWithParam<std::uint32_t> {};

// By chapter 4 of the specification, as a guest reads it.
TEST_P(MpTable, TellsEveryProcessorAndInterrupt) {
  const auto bytes = make_mp_table(address, GetParam());
  ASSERT_GE(bytes.size(), 60U);
  ASSERT_LE(bytes.size(), 0x1'0000U) << "it stays below 1 MiB";
  const auto pointer = std::span(bytes).first(16);
  EXPECT_EQ(text(pointer, 0, 4), "_MP_");
  EXPECT_EQ(sum(pointer), 0U);
  ASSERT_EQ(number(pointer, 4, 4), address + 16);
  EXPECT_EQ(number(pointer, 8, 1), 1U) << "in paragraphs";
  EXPECT_EQ(number(pointer, 11, 1), 0U) << "there is a table";

  const auto table = std::span(bytes).subspan(16);
  EXPECT_EQ(text(table, 0, 4), "PCMP");
  ASSERT_EQ(number(table, 4, 2), table.size());
  EXPECT_EQ(sum(table), 0U);
  EXPECT_EQ(number(table, 36, 4), 0xFEE0'0000U);

  std::set<std::uint32_t> processors;
  std::set<std::uint32_t> interrupts;
  std::set<std::uint32_t> local;
  std::uint32_t io_apic = 0xFFFF;
  std::size_t entries = 0;
  std::size_t at = 44;
  for (; at < table.size(); ++entries) {
    switch (number(table, at, 1)) {
    case 0:
      EXPECT_EQ(number(table, at + 3, 1), processors.empty() ? 3U : 1U) << "enabled, and the first one boots";
      processors.insert(number(table, at + 1, 1));
      at += 20;
      continue;
    case 1:
      EXPECT_EQ(text(table, at + 2, 6), "ISA   ");
      break;
    case 2:
      io_apic = number(table, at + 1, 1);
      EXPECT_EQ(number(table, at + 3, 1), 1U);
      EXPECT_EQ(number(table, at + 4, 4), 0xFEC0'0000U);
      break;
    case 3:
      EXPECT_EQ(number(table, at + 6, 1), io_apic);
      EXPECT_EQ(number(table, at + 5, 1), number(table, at + 7, 1)) << "KVM routes them so";
      interrupts.insert(number(table, at + 5, 1));
      break;
    case 4:
      local.insert(number(table, at + 1, 1) << 8 | number(table, at + 7, 1));
      break;
    default:
      FAIL() << "entry of type " << number(table, at, 1);
    }
    at += 8;
  }
  EXPECT_EQ(at, table.size());
  EXPECT_EQ(number(table, 34, 2), entries);
  EXPECT_EQ(processors.size(), GetParam());
  EXPECT_EQ(*processors.rbegin(), GetParam() - 1);
  EXPECT_FALSE(processors.contains(io_apic));
  EXPECT_LT(io_apic, 0xFFU);
  EXPECT_EQ(interrupts, (std::set<std::uint32_t>{0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}));
  EXPECT_EQ(local, (std::set<std::uint32_t>{0x300, 0x101})) << "ExtINT at LINT0, NMI at LINT1";
}

INSTANTIATE_TEST_SUITE_P(Of, MpTable, testing::Values(1, 2, mp_table_max_cpus));

} // namespace
