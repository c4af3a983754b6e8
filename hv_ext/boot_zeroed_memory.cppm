module;
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
export module cppvmm.hv_ext:boot_zeroed_memory;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

/// The output of HvExtCallGetBootZeroedMemory, byte by byte (TLFS): a u64 count, then 255 pairs of u64 first page
/// number and u64 page count; little-endian, unused pairs zero.
export using BootZeroedOutput = std::array<std::byte, hv_boot_zeroed_output_bytes>;

/// Encodes the first hv_boot_zeroed_max_ranges of `ranges`, in their order.
export [[nodiscard]] BootZeroedOutput encode_boot_zeroed(std::span<const PageRange> ranges);

} // namespace cppvmm
