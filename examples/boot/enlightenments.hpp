// Hyper-V's enlightenments by the names that QEMU's users know.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cppvmm::boot {

/// Which of them the guest is shown.
enum class EnlightenmentSet : std::uint8_t { full, minimal, listed };
struct Enlightenments {
  EnlightenmentSet set = EnlightenmentSet::full; ///< Full: as far as KVM has them and the transport leaves them to it.
  std::vector<std::string> names{};              ///< Those that are listed.
};

/// All that can be listed, sorted.
[[nodiscard]] std::vector<std::string> enlightenment_names();

/// Whether it is among those that are chosen.
[[nodiscard]] bool has_enlightenment(const Enlightenments& chosen, std::string_view name);

/// Bits of CPUID 0x40000003 and of 0x40000004.EAX (TLFS "Hypervisor CPUID Leaves").
struct EnlightenmentBits {
  std::uint32_t eax = 0, ebx = 0, edx = 0;
  std::uint32_t hints = 0;
};

/// Those of what is listed, and of what no guest does without: the hypercall and VP_INDEX MSRs.
[[nodiscard]] EnlightenmentBits bits_of(const Enlightenments& listed);

/// The first that is listed and needs a bit that is not among those; empty if there is none.
[[nodiscard]] std::string first_missing(const Enlightenments& listed, const EnlightenmentBits& supported);

} // namespace cppvmm::boot
