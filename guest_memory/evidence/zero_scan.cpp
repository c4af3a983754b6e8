module;
#include <cstddef>

#include "../memory/fault_table.hpp"
module cppvmm.guest_memory:zero_scan.impl;
import :address;
import :zero_scan;

// Guests and other threads write while this reads. So loads stand in assembly: each happens once, where it stands, and
// nothing follows from what an earlier one saw. ThreadSanitizer, which would call it the race that it is, does not see
// them; and the fault table has them all.
//
// One pass can miss data that is always there: a writer that copies it to a word that was read already and then clears
// the word that was not read yet. A page that seemed zero is read again the other way, where the same movement runs
// into the reader. Only a writer that moves its data down during the first pass and up during the second is missed.

namespace cppvmm {

static constexpr std::size_t step = 256; // how often to look whether it can end

/// The way back finds its page in the cache, which leaves memory idle: the next page, which most often is the one
/// behind it, comes meanwhile. A prefetch is no access, and cannot fault.
[[gnu::always_inline]] static inline void prefetch_next(const std::byte* at) {
  for (std::size_t line = 0; line < step; line += 64)
    __builtin_prefetch(at + page_size + line);
}

// LOADS: the bytes of a step, joined by OR in register 0. JUMP: to label %l1 if any is not zero. Never inlined: END
// takes the upper halves of all registers, which no caller expects to keep across a call.
#define CPPVMM_SCAN_STEP(at, LOADS, JUMP)                                                                              \
  asm goto("1: " LOADS "2: " JUMP CPPVMM_ON_FAULT("%l2")                                                               \
           :                                                                                                           \
           : "r"(at)                                                                                                   \
           : "xmm0", "xmm1", "k1", "rax", "cc", "memory"                                                               \
           : data, fault)

#define CPPVMM_SCAN(NAME, UP, DOWN, JUMP, END)                                                                         \
  [[gnu::noinline]] static PageContent NAME(const void* page) {                                                        \
    const auto* const bytes = static_cast<const std::byte*>(page);                                                     \
    for (std::size_t at = 0; at < page_size; at += step)                                                               \
      CPPVMM_SCAN_STEP(bytes + at, UP, JUMP);                                                                          \
    for (std::size_t at = page_size; at > 0; at -= step) {                                                             \
      prefetch_next(bytes + page_size - at);                                                                           \
      CPPVMM_SCAN_STEP(bytes + at - step, DOWN, JUMP);                                                                 \
    }                                                                                                                  \
    asm volatile(END);                                                                                                 \
    return PageContent::zero;                                                                                          \
  data:                                                                                                                \
    asm volatile(END);                                                                                                 \
    return PageContent::data;                                                                                          \
  fault:                                                                                                               \
    asm volatile(END);                                                                                                 \
    return PageContent::inaccessible;                                                                                  \
  }

#define CPPVMM_OR(offset) "por " #offset "(%0), %%xmm0\n"
CPPVMM_SCAN(scan_portable,
            "movdqa (%0), %%xmm0\n" CPPVMM_OR(16) CPPVMM_OR(32) CPPVMM_OR(48) CPPVMM_OR(64) CPPVMM_OR(80) CPPVMM_OR(96)
                CPPVMM_OR(112) CPPVMM_OR(128) CPPVMM_OR(144) CPPVMM_OR(160) CPPVMM_OR(176) CPPVMM_OR(192) CPPVMM_OR(208)
                    CPPVMM_OR(224) CPPVMM_OR(240),
            "movdqa 240(%0), %%xmm0\n" CPPVMM_OR(224) CPPVMM_OR(208) CPPVMM_OR(192) CPPVMM_OR(176) CPPVMM_OR(160)
                CPPVMM_OR(144) CPPVMM_OR(128) CPPVMM_OR(112) CPPVMM_OR(96) CPPVMM_OR(80) CPPVMM_OR(64) CPPVMM_OR(48)
                    CPPVMM_OR(32) CPPVMM_OR(16) CPPVMM_OR(0),
            "pxor %%xmm1, %%xmm1\npcmpeqb %%xmm1, %%xmm0\npmovmskb %%xmm0, %%eax\ncmpl $0xffff, %%eax\njne %l1\n", "")
#undef CPPVMM_OR

#define CPPVMM_OR(offset) "vpor " #offset "(%0), %%ymm0, %%ymm0\n"
CPPVMM_SCAN(scan_avx2,
            "vmovdqa (%0), %%ymm0\n" CPPVMM_OR(32) CPPVMM_OR(64) CPPVMM_OR(96) CPPVMM_OR(128) CPPVMM_OR(160)
                CPPVMM_OR(192) CPPVMM_OR(224),
            "vmovdqa 224(%0), %%ymm0\n" CPPVMM_OR(192) CPPVMM_OR(160) CPPVMM_OR(128) CPPVMM_OR(96) CPPVMM_OR(64)
                CPPVMM_OR(32) CPPVMM_OR(0),
            "vptest %%ymm0, %%ymm0\njnz %l1\n", "vzeroupper")
#undef CPPVMM_OR

#define CPPVMM_OR(offset) "vporq " #offset "(%0), %%zmm0, %%zmm0\n"
CPPVMM_SCAN(scan_avx512, "vmovdqa64 (%0), %%zmm0\n" CPPVMM_OR(64) CPPVMM_OR(128) CPPVMM_OR(192),
            "vmovdqa64 192(%0), %%zmm0\n" CPPVMM_OR(128) CPPVMM_OR(64) CPPVMM_OR(0),
            "vptestmq %%zmm0, %%zmm0, %%k1\nkortestw %%k1, %%k1\njnz %l1\n", "vzeroupper")
#undef CPPVMM_OR

const char* to_string(ZeroScan scan) {
  switch (scan) {
  case ZeroScan::automatic:
    return "automatic";
  case ZeroScan::portable:
    return "portable";
  case ZeroScan::avx2:
    return "avx2";
  case ZeroScan::avx512:
    return "avx512";
  }
  return "unknown";
}

// These builtins look at XCR0 as well: whether the operating system keeps the registers.
bool is_supported(ZeroScan scan) {
  switch (scan) {
  case ZeroScan::automatic:
  case ZeroScan::portable:
    return true;
  case ZeroScan::avx2:
    return __builtin_cpu_supports("avx2") != 0;
  case ZeroScan::avx512:
    return __builtin_cpu_supports("avx512f") != 0;
  }
  return false;
}

ZeroScan resolve(ZeroScan scan) {
  if (scan != ZeroScan::automatic) return is_supported(scan) ? scan : ZeroScan::portable;
  // Memory is the limit (benches/guest_memory/content_check_bench.cpp): 512-bit instructions gain nothing, and older
  // CPUs lower a core's clock for them, guests' included.
  return is_supported(ZeroScan::avx2) ? ZeroScan::avx2 : ZeroScan::portable;
}

PageContent content_of_page(ZeroScan scan, const void* page) {
  switch (scan) {
  case ZeroScan::avx512:
    return scan_avx512(page);
  case ZeroScan::avx2:
    return scan_avx2(page);
  default:
    return scan_portable(page);
  }
}

} // namespace cppvmm
