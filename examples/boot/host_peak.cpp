#include "host_peak.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <ios>
#include <iterator>

namespace cppvmm::boot {
namespace {

std::optional<std::uint64_t> own_bytes(std::string_view field) {
  std::ifstream file("/proc/self/status");
  const std::string status{std::istreambuf_iterator<char>(file), {}};
  return status_bytes(status, field);
}

} // namespace

std::optional<std::uint64_t> status_bytes(std::string_view status, std::string_view field) {
  while (!status.empty()) {
    std::string_view line = status.substr(0, status.find('\n'));
    status.remove_prefix(line.size() == status.size() ? line.size() : line.size() + 1);
    if (!line.starts_with(field) || !line.substr(field.size()).starts_with(':')) continue;
    line.remove_prefix(field.size() + 1);
    line.remove_prefix(std::min(line.find_first_not_of(" \t"), line.size()));
    std::uint64_t kib = 0;
    const auto [rest, error] = std::from_chars(line.data(), line.data() + line.size(), kib);
    if (error != std::errc() || std::string_view(rest, line.data() + line.size()) != " kB" || kib >> 54 != 0)
      return std::nullopt;
    return kib << 10;
  }
  return std::nullopt;
}

std::optional<HostPeak> HostPeak::begin() {
  std::ofstream file("/proc/self/clear_refs", std::ios::binary);
  file << "5" << std::flush;
  if (file.fail()) return std::nullopt;
  const auto start = own_bytes("VmRSS");
  if (!start) return std::nullopt;
  return HostPeak(*start);
}

std::optional<std::uint64_t> HostPeak::growth() const {
  const auto peak = own_bytes("VmHWM");
  if (!peak) return std::nullopt;
  return *peak > start_ ? *peak - start_ : 0;
}

} // namespace cppvmm::boot
