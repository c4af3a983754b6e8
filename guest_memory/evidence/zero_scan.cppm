module;
#include <cstdint>
export module cppvmm.guest_memory:zero_scan;

namespace cppvmm {

/// Which instructions read the content.
export enum class ZeroScan : std::uint8_t {
  automatic, ///< avx2 where this machine has it.
  portable,  ///< What every machine of this architecture has.
  avx2,
  avx512,
};

/// The word for it in reports, e.g. "avx2".
export [[nodiscard]] const char* to_string(ZeroScan scan);

/// Whether this machine, its operating system included, has the instructions.
export [[nodiscard]] bool is_supported(ZeroScan scan);

/// What to read with when asked for `scan`: what this machine has.
[[nodiscard]] ZeroScan resolve(ZeroScan scan);

/// What a page turned out to be.
enum class PageContent : std::uint8_t {
  zero,
  data,
  inaccessible, ///< The host has no memory there; only while a FaultGuard is installed, else that is a signal.
};

/// Of the 4 KiB at `page`, which is page-aligned: whether they read zero in two passes. Others may write there at the
/// same time. `scan` comes from resolve().
[[nodiscard]] PageContent content_of_page(ZeroScan scan, const void* page);

} // namespace cppvmm
