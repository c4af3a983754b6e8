module;
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>
module cppvmm.vcpu:cpuid.impl;
import :cpuid;

namespace cppvmm {

const CpuidEntry* find_cpuid(std::span<const CpuidEntry> entries, std::uint32_t function, std::uint32_t index) {
  const auto found = std::ranges::find_if(entries, [&](const CpuidEntry& entry) {
    return entry.function == function && (!entry.index_significant || entry.index == index);
  });
  return found == entries.end() ? nullptr : &*found;
}

void set_cpuid_entry(std::vector<CpuidEntry>& entries, const CpuidEntry& entry) {
  const auto found = std::ranges::find_if(entries, [&](const CpuidEntry& other) {
    return other.function == entry.function &&
           (!other.index_significant || !entry.index_significant || other.index == entry.index);
  });
  if (found != entries.end())
    *found = entry;
  else
    entries.push_back(entry);
}

} // namespace cppvmm
