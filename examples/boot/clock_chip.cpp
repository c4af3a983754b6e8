#include "clock_chip.hpp"

namespace cppvmm::boot {

std::uint8_t read_clock_chip(std::uint8_t index, std::time_t now) {
  std::tm time{};
  if (gmtime_r(&now, &time) == nullptr) return 0;
  const auto bcd = [](int value) { return static_cast<std::uint8_t>(value / 10 % 10 * 16 + value % 10); };
  // Motorola's MC146818 data sheet; the century is where PCs have it.
  switch (index) {
  case 0x00:
    return bcd(time.tm_sec);
  case 0x02:
    return bcd(time.tm_min);
  case 0x04:
    return bcd(time.tm_hour);
  case 0x06:
    return bcd(time.tm_wday + 1);
  case 0x07:
    return bcd(time.tm_mday);
  case 0x08:
    return bcd(time.tm_mon + 1);
  case 0x09:
    return bcd(time.tm_year % 100);
  case 0x32:
    return bcd((time.tm_year + 1900) / 100);
  case 0x0A:
    return 0x26; // the usual time base and rate; no update in progress
  case 0x0B:
    return 0x02; // 24 hours, BCD
  case 0x0D:
    return 0x80; // the battery is good
  default:
    return 0;
  }
}

} // namespace cppvmm::boot
