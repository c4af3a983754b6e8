module cppvmm.guest_memory:zero_scan;
import :content_check;

namespace cppvmm {

/// What to read with when asked for `scan`: what this machine has.
[[nodiscard]] ZeroScan resolve(ZeroScan scan);

/// Whether the 4 KiB at `page`, which is page-aligned, read zero in two passes. Others may write there at the same
/// time. `scan` comes from resolve().
[[nodiscard]] bool is_zero_page(ZeroScan scan, const void* page);

} // namespace cppvmm
