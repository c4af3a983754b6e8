#pragma once

#include "report.hpp"

#include <cstdint>
#include <span>

namespace cppvmm::boot {

/// How many pages of RAM an answer would report that knows only, by a bit for each block of 2 MiB, whether anything in
/// it was touched: those in other blocks, of the 255 largest ranges. Both spans ascend.
[[nodiscard]] std::uint64_t pages_in_untouched_blocks(std::span<const ReportedRange> ram,
                                                      std::span<const ReportedRange> touched);

} // namespace cppvmm::boot
