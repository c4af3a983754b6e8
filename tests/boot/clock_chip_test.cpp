#include "examples/boot/clock_chip.hpp"

#include <gtest/gtest.h>

namespace {

using cppvmm::boot::read_clock_chip;

TEST(ClockChip, TellsTheTimeInBcd) {
  constexpr std::time_t moment = 1'700'000'000; // Tuesday 2023-11-14 22:13:20 UTC
  EXPECT_EQ(read_clock_chip(0x00, moment), 0x20);
  EXPECT_EQ(read_clock_chip(0x02, moment), 0x13);
  EXPECT_EQ(read_clock_chip(0x04, moment), 0x22);
  EXPECT_EQ(read_clock_chip(0x06, moment), 3) << "Sunday is 1";
  EXPECT_EQ(read_clock_chip(0x07, moment), 0x14);
  EXPECT_EQ(read_clock_chip(0x08, moment), 0x11);
  EXPECT_EQ(read_clock_chip(0x09, moment), 0x23);
  EXPECT_EQ(read_clock_chip(0x32, moment), 0x20);
}

TEST(ClockChip, IsNeverInAnUpdateAndItsTimeIsValid) {
  EXPECT_EQ(read_clock_chip(0x0A, 0) & 0x80, 0);
  EXPECT_EQ(read_clock_chip(0x0B, 0), 0x02) << "24 hours, BCD, no interrupts";
  EXPECT_EQ(read_clock_chip(0x0D, 0), 0x80);
  EXPECT_EQ(read_clock_chip(0x7F, 0), 0);
}

} // namespace
