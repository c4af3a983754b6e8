#include <cstddef>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <vector>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;

namespace {

// Bit positions as the TLFS has them ("Hypercall Inputs"), each field alone and all at once.
TEST(HvControl, SplitsIntoTheFieldsOfTheTlfs) {
  EXPECT_EQ(HvControl{0x8002}.call_code(), 0x8002);
  EXPECT_TRUE(HvControl{1ULL << 16}.is_fast());
  EXPECT_EQ(HvControl{0x3FFULL << 17}.variable_header_size(), 0x3FF);
  EXPECT_TRUE(HvControl{1ULL << 31}.is_nested());
  EXPECT_EQ(HvControl{0xFFFULL << 32}.rep_count(), 0xFFF);
  EXPECT_EQ(HvControl{0xFFFULL << 48}.rep_start(), 0xFFF);
  for (unsigned bit = 0; bit < 64; ++bit) {
    const HvControl control{1ULL << bit};
    const bool reserved = (bit >= 27 && bit <= 30) || (bit >= 44 && bit <= 47) || bit >= 60;
    EXPECT_EQ(control.has_reserved_bits(), reserved) << "bit " << bit;
    EXPECT_EQ(control.call_code() != 0, bit < 16) << "bit " << bit;
    EXPECT_EQ(control.is_fast(), bit == 16) << "bit " << bit;
    EXPECT_EQ(control.variable_header_size() != 0, bit >= 17 && bit <= 26) << "bit " << bit;
    EXPECT_EQ(control.rep_count() != 0, bit >= 32 && bit <= 43) << "bit " << bit;
    EXPECT_EQ(control.rep_start() != 0, bit >= 48 && bit <= 59) << "bit " << bit;
  }
}

TEST(HvResult, PutsStatusAndRepsWhereTheTlfsHasThem) {
  EXPECT_EQ(hv_result(HvStatus::success), 0U);
  EXPECT_EQ(hv_result(HvStatus::access_denied), 6U);
  EXPECT_EQ(hv_result(HvStatus::invalid_parameter, 3), 0x3'0000'0005U);
}

TEST(BootZeroedOutput, IsACountAndPairsOfPageNumberAndCount) {
  const std::vector ranges = {*PageRange::make(PageNumber(0x100), 0x20), *PageRange::make(PageNumber(0x80), 1)};
  const BootZeroedOutput output = encode_boot_zeroed(ranges);
  ASSERT_EQ(output.size(), 0xFF8U);
  const auto word = [&](std::size_t index) {
    std::uint64_t value = 0;
    std::memcpy(&value, output.data() + index * 8, 8);
    return value;
  };
  EXPECT_EQ(word(0), 2U);
  EXPECT_EQ(word(1), 0x100U);
  EXPECT_EQ(word(2), 0x20U);
  EXPECT_EQ(word(3), 0x80U);
  EXPECT_EQ(word(4), 1U);
  for (std::size_t i = 5; i < 511; ++i)
    EXPECT_EQ(word(i), 0U);
}

TEST(BootZeroedOutput, HoldsNoMoreThan255Ranges) {
  std::vector<PageRange> ranges;
  for (std::uint64_t i = 0; i < 300; ++i)
    ranges.push_back(*PageRange::make(PageNumber(2 * i), 1));
  const BootZeroedOutput output = encode_boot_zeroed(ranges);
  std::uint64_t count = 0;
  std::memcpy(&count, output.data(), 8);
  EXPECT_EQ(count, 255U);
  std::uint64_t last = 0;
  std::memcpy(&last, output.data() + 8 + 254 * 16, 8);
  EXPECT_EQ(last, 2U * 254);
}

} // namespace
