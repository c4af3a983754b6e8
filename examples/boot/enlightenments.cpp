#include "enlightenments.hpp"

#include <algorithm>
#include <array>
#include <cstddef>

namespace cppvmm::boot {
namespace {

struct Known {
  std::string_view name;
  EnlightenmentBits bits;
};

constexpr std::uint32_t bit(unsigned number) { return std::uint32_t{1} << number; }

constexpr std::array known = {
    Known{"hv-avic", {.hints = bit(9)}},           Known{"hv-frequencies", {.eax = bit(11), .edx = bit(8)}},
    Known{"hv-ipi", {.hints = bit(10) | bit(11)}}, Known{"hv-no-nonarch-coresharing", {.hints = bit(18)}},
    Known{"hv-reenlightenment", {.eax = bit(13)}}, Known{"hv-relaxed", {.hints = bit(5)}},
    Known{"hv-runtime", {.eax = bit(0)}},          Known{"hv-stimer", {.eax = bit(3)}},
    Known{"hv-stimer-direct", {.edx = bit(19)}},   Known{"hv-synic", {.eax = bit(2), .ebx = bit(4) | bit(5)}},
    Known{"hv-time", {.eax = bit(1) | bit(9)}},    Known{"hv-tlbflush", {.hints = bit(2) | bit(11)}},
    Known{"hv-tlbflush-ext", {.edx = bit(14)}},    Known{"hv-vapic", {.eax = bit(4), .hints = bit(3)}},
    Known{"hv-vpindex", {.eax = bit(6)}},          Known{"hv-xmm-input", {.edx = bit(4)}},
};

// Ours, which have no bits of KVM's. The first are those of the minimal set.
constexpr std::size_t minimal_ours = 2;
constexpr std::array<std::string_view, 3> ours = {"hv-boot-zeroed-mem", "hv-ext-query-caps", "hv-memory-hint"};

} // namespace

std::vector<std::string> enlightenment_names() {
  std::vector<std::string> names(ours.begin(), ours.end());
  for (const Known& each : known)
    names.emplace_back(each.name);
  std::ranges::sort(names);
  return names;
}

bool has_enlightenment(const Enlightenments& chosen, std::string_view name) {
  if (chosen.set == EnlightenmentSet::listed) return std::ranges::find(chosen.names, name) != chosen.names.end();
  if (chosen.set == EnlightenmentSet::full) return true;
  return std::find(ours.begin(), ours.begin() + minimal_ours, name) != ours.begin() + minimal_ours;
}

EnlightenmentBits bits_of(const Enlightenments& listed) {
  EnlightenmentBits bits{.eax = bit(5) | bit(6)};
  for (const Known& each : known) {
    if (!has_enlightenment(listed, each.name)) continue;
    bits.eax |= each.bits.eax;
    bits.ebx |= each.bits.ebx;
    bits.edx |= each.bits.edx;
    bits.hints |= each.bits.hints;
  }
  return bits;
}

std::string first_missing(const Enlightenments& listed, const EnlightenmentBits& supported) {
  for (const Known& each : known)
    if (has_enlightenment(listed, each.name) &&
        ((each.bits.eax & ~supported.eax) | (each.bits.ebx & ~supported.ebx) | (each.bits.edx & ~supported.edx) |
         (each.bits.hints & ~supported.hints)) != 0)
      return std::string(each.name);
  return {};
}

} // namespace cppvmm::boot
