module;
#include <cstdint>
module cppvmm.guest_memory:zero_scan;
import :content_check;

namespace cppvmm {

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
