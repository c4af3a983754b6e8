module;
#include <cstdint>
#include <span>
#include <vector>
export module cppvmm.vcpu:cpuid;

namespace cppvmm {

/// One CPUID leaf as a guest sees it (struct kvm_cpuid_entry2).
export struct CpuidEntry {
  std::uint32_t function = 0;     ///< EAX on input.
  std::uint32_t index = 0;        ///< ECX on input, where it counts.
  bool index_significant = false; ///< Whether ECX counts (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
  std::uint32_t eax = 0;
  std::uint32_t ebx = 0;
  std::uint32_t ecx = 0;
  std::uint32_t edx = 0;

  friend bool operator==(const CpuidEntry&, const CpuidEntry&) = default;
};

/// The entry for a leaf (and subleaf, where the index is significant); null when there is none.
export [[nodiscard]] const CpuidEntry* find_cpuid(std::span<const CpuidEntry> entries, std::uint32_t function,
                                                  std::uint32_t index = 0);

/// Puts `entry` in the place of the one for the same leaf (and subleaf), or adds it.
export void set_cpuid_entry(std::vector<CpuidEntry>& entries, const CpuidEntry& entry);

} // namespace cppvmm
