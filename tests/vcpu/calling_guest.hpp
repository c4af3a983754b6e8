// A bare guest that calls a hypercall page. Include it after all other headers: it imports cppvmm.vcpu.
#pragma once

#include <cstddef>
#include <cstdint>

#include "support/bare_guest.hpp"

namespace cppvmm::test {

inline bool is_bad_state(const auto& result) { return !result && result.error().code == KvmErrc::bad_state; }

inline constexpr std::uint64_t page = layout::free; // the hypercall page

// call page; hlt; jmp to the call. 64-bit and 32-bit code.
inline Code call_page() {
  return Code{0xE8}.value(static_cast<std::int32_t>(page - (layout::code + 5))).hlt().raw({0xEB, 0xF8});
}
inline constexpr std::uint64_t after_hlt = layout::code + 6;

// Every register has a value of its own.
inline Registers distinct() {
  return {.rax = 0xA0A0'0000'0000'0001,
          .rbx = 0xA0A0'0000'0000'0002,
          .rcx = 0xA0A0'0000'0000'8001,
          .rdx = 0xA0A0'0000'0000'0004,
          .rsi = 0xA0A0'0000'0000'0005,
          .rdi = 0xA0A0'0000'0000'0006,
          .rsp = layout::stack,
          .rbp = 0xA0A0'0000'0000'0008,
          .r8 = 0xA0A0'0000'0000'0009,
          .r9 = 0xA0A0'0000'0000'000A,
          .r10 = 0xA0A0'0000'0000'000B,
          .r11 = 0xA0A0'0000'0000'000C,
          .r12 = 0xA0A0'0000'0000'000D,
          .r13 = 0xA0A0'0000'0000'000E,
          .r14 = 0xA0A0'0000'0000'000F,
          .r15 = 0xA0A0'0000'0000'0010,
          .rip = layout::code,
          .rflags = 0x8D7}; // OF, SF, ZF, AF, PF, CF
}

// The same where the upper halves do not exist.
inline Registers distinct32() {
  Registers registers = distinct();
  for (std::uint64_t* each :
       {&registers.rax, &registers.rbx, &registers.rcx, &registers.rdx, &registers.rsi, &registers.rdi, &registers.rbp})
    *each = (*each & 0xFFFF) | 0x5050'0000;
  for (std::uint64_t* each : {&registers.r8, &registers.r9, &registers.r10, &registers.r11, &registers.r12,
                              &registers.r13, &registers.r14, &registers.r15})
    *each = 0;
  return registers;
}

} // namespace cppvmm::test
