#include <cstdint>
#include <gtest/gtest.h>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;

namespace {

constexpr HvCallRegisters all_different = {.rax = 0x1111'2222'3333'4444,
                                           .rbx = 0x2111'2222'3333'4444,
                                           .rcx = 0x3111'2222'3333'4444,
                                           .rdx = 0x4111'2222'3333'4445,
                                           .rsi = 0x5111'2222'3333'4444,
                                           .rdi = 0x6111'2222'3333'4446,
                                           .r8 = 0x7111'2222'3333'4444};

TEST(CallRegisters, OfA64BitCallerAreRcxRdxAndR8) {
  EXPECT_EQ(hv_call(all_different, true, 1), (HvCall{.control = 0x3111'2222'3333'4444,
                                                     .input = GuestAddress(0x4111'2222'3333'4445),
                                                     .output = GuestAddress(0x7111'2222'3333'4444),
                                                     .cpl = 1}));
}

TEST(CallRegisters, OfA32BitCallerArePairsOfLowHalves) {
  EXPECT_EQ(hv_call(all_different, false, 3), (HvCall{.control = 0x3333'4445'3333'4444,
                                                      .input = GuestAddress(0x3333'4444'3333'4444),
                                                      .output = GuestAddress(0x3333'4446'3333'4444),
                                                      .cpl = 3}));
}

TEST(CallRegisters, GetTheResultAndChangeInNothingElse) {
  constexpr std::uint64_t result = 0x8000'0001'0000'0005;
  HvCallRegisters registers = all_different;
  set_hv_result(registers, true, result);
  HvCallRegisters expected = all_different;
  expected.rax = result;
  EXPECT_EQ(registers, expected);

  registers = all_different;
  set_hv_result(registers, false, result);
  expected = all_different;
  expected.rax = 5;
  expected.rdx = 0x8000'0001;
  EXPECT_EQ(registers, expected);
}

} // namespace
