#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <system_error>
#include <utility>
#include <variant>

#include "guest.hpp"

namespace cppvmm::boot {

std::unexpected<Failure> failure(std::string text) {
  return std::unexpected(Failure{.status = 1, .text = std::move(text)});
}

std::string describe_exit(const Exit& exit) {
  std::string text = exit_name(exit);
  const auto number = [](std::uint64_t value) {
    char digits[24];
    std::snprintf(digits, sizeof digits, "0x%llx", static_cast<unsigned long long>(value));
    return std::string(digits);
  };
  if (const auto* unknown = std::get_if<UnknownExit>(&exit))
    text += " (reason " + std::to_string(unknown->reason) + ", hardware " + number(unknown->hardware_reason) + ")";
  else if (const auto* read_msr = std::get_if<ReadMsr>(&exit))
    text += " (MSR " + number(read_msr->index) + ")";
  else if (const auto* write_msr = std::get_if<WriteMsr>(&exit))
    text += " (MSR " + number(write_msr->index) + ")";
  else if (const auto* in = std::get_if<IoIn>(&exit))
    text += " (port " + number(in->port) + ")";
  else if (const auto* out = std::get_if<IoOut>(&exit))
    text += " (port " + number(out->port) + ")";
  else if (const auto* read = std::get_if<MmioRead>(&exit))
    text += " (address " + number(read->address) + ")";
  else if (const auto* write = std::get_if<MmioWrite>(&exit))
    text += " (address " + number(write->address) + ")";
  else if (const auto* entry = std::get_if<FailEntry>(&exit))
    text += " (hardware reason " + number(entry->hardware_reason) + ")";
  else if (const auto* internal = std::get_if<InternalError>(&exit)) {
    text += " (suberror " + std::to_string(internal->suberror);
    if (!internal->instruction.empty()) text += ", instruction";
    for (const std::byte byte : internal->instruction) {
      char digits[4];
      std::snprintf(digits, sizeof digits, " %02x", std::to_integer<unsigned>(byte));
      text += digits;
    }
    text += ")";
  } else if (const auto* event = std::get_if<SystemEvent>(&exit))
    text += " (type " + std::to_string(event->type) + ")";
  else if (const auto* fault = std::get_if<MemoryFault>(&exit))
    text += " (address " + (fault->address ? number(*fault->address) : "unknown") + ", " +
            std::generic_category().message(fault->os_error) + ")";
  return text;
}

} // namespace cppvmm::boot
