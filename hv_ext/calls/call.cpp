module;
#include <cstdint>
module cppvmm.hv_calls:call.impl;
import :call;
import cppvmm.guest_memory;

namespace cppvmm {

constexpr std::uint64_t low_half = 0xFFFF'FFFF;

static std::uint64_t pair(std::uint64_t high, std::uint64_t low) { return high << 32 | (low & low_half); }

HvCall hv_call(const HvCallRegisters& registers, bool long_mode, unsigned cpl) {
  const HvCallRegisters& r = registers;
  if (long_mode) return {.control = r.rcx, .input = GuestAddress(r.rdx), .output = GuestAddress(r.r8), .cpl = cpl};
  return {.control = pair(r.rdx, r.rax),
          .input = GuestAddress(pair(r.rbx, r.rcx)),
          .output = GuestAddress(pair(r.rdi, r.rsi)),
          .cpl = cpl};
}

void set_hv_control(HvCallRegisters& registers, bool long_mode, std::uint64_t control) {
  if (long_mode) {
    registers.rcx = control;
  } else {
    registers.rax = control & low_half;
    registers.rdx = control >> 32;
  }
}

void set_hv_result(HvCallRegisters& registers, bool long_mode, std::uint64_t result) {
  registers.rax = long_mode ? result : result & low_half;
  if (!long_mode) registers.rdx = result >> 32;
}

} // namespace cppvmm
