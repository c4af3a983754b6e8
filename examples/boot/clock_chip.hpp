// The battery-backed clock of a PC (MC146818) at ports 0x70 and 0x71, read-only: it tells the time and has no alarms.
#pragma once

#include <cstdint>
#include <ctime>

namespace cppvmm::boot {

/// Register `index` at the time `now`, in UTC, BCD and 24-hour form; 0 for registers that are not the clock's.
[[nodiscard]] std::uint8_t read_clock_chip(std::uint8_t index, std::time_t now);

} // namespace cppvmm::boot
