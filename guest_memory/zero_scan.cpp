module;
#include <cstddef>
#include <cstdint>
module cppvmm.guest_memory:zero_scan.impl;
import :address;
import :content_check;
import :zero_scan;

// Guests and other threads write while this reads. So every load is volatile: it happens once, where it stands, and
// nothing follows from what an earlier one saw. ThreadSanitizer would call it a race, which it is.
//
// One pass can miss data that is always there: a writer that copies it to a word that was read already and then clears
// the word that was not read yet. A page that seemed zero is read again the other way, where the same movement runs
// into the reader. Only a writer that moves its data down during the first pass and up during the second is missed.

namespace cppvmm {

struct PortableWidth {
  using Block [[gnu::vector_size(16), gnu::may_alias]] = std::uint64_t;
};
struct Avx2Width {
  using Block [[gnu::vector_size(32), gnu::may_alias]] = std::uint64_t;
};
struct Avx512Width {
  using Block [[gnu::vector_size(64), gnu::may_alias]] = std::uint64_t;
};

template <class Width>
[[gnu::always_inline, clang::no_sanitize("thread")]] static inline bool reads_zero_twice(const void* page) {
  using Block = typename Width::Block;
  constexpr std::size_t step = 256 / sizeof(Block); // how often to look whether it can end
  constexpr std::size_t blocks = page_size / sizeof(Block);
  const auto* const at = static_cast<const volatile Block*>(page);
  for (std::size_t first = 0; first < blocks; first += step) {
    Block seen = at[first];
#pragma clang loop unroll(full)
    for (std::size_t i = 1; i < step; ++i)
      seen |= at[first + i];
    if (__builtin_reduce_or(seen) != 0) return false;
  }
  for (std::size_t end = blocks; end > 0; end -= step) {
    Block seen = at[end - 1];
#pragma clang loop unroll(full)
    for (std::size_t i = 2; i <= step; ++i)
      seen |= at[end - i];
    if (__builtin_reduce_or(seen) != 0) return false;
  }
  return true;
}

[[clang::no_sanitize("thread")]] static bool is_zero_portable(const void* page) {
  return reads_zero_twice<PortableWidth>(page);
}
[[gnu::target("avx2"), clang::no_sanitize("thread")]] static bool is_zero_avx2(const void* page) {
  return reads_zero_twice<Avx2Width>(page);
}
[[gnu::target("avx512f"), clang::no_sanitize("thread")]] static bool is_zero_avx512(const void* page) {
  return reads_zero_twice<Avx512Width>(page);
}

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

bool is_zero_page(ZeroScan scan, const void* page) {
  switch (scan) {
  case ZeroScan::avx512:
    return is_zero_avx512(page);
  case ZeroScan::avx2:
    return is_zero_avx2(page);
  default:
    return is_zero_portable(page);
  }
}

} // namespace cppvmm
