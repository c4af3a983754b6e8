// The most memory that this process had since a moment, by the kernel's account.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace cppvmm::boot {

/// A field of /proc/PID/status that is a size in kB ("VmHWM:	  123 kB"), in bytes; nothing if `status` has none.
[[nodiscard]] std::optional<std::uint64_t> status_bytes(std::string_view status, std::string_view field);

/// How much more memory this process has at its peak than when begin was called. All of it counts: guest memory and
/// what the program itself takes. Memory of hugetlb pools does not, nor what the kernel keeps for the process (page
/// tables, KVM's own). By VmHWM and VmRSS of /proc/self/status, which the kernel counts per processor and sums up late:
/// right to some hundred KiB (Linux include/linux/mm.h, get_mm_counter).
class HostPeak {
public:
  /// Begins anew for the whole process. Nothing where /proc does not let it: it writes "5" to /proc/self/clear_refs
  /// (Linux fs/proc/task_mmu.c, CLEAR_REFS_MM_HIWATER_RSS).
  [[nodiscard]] static std::optional<HostPeak> begin();

  /// In bytes; nothing where /proc cannot be read any more.
  [[nodiscard]] std::optional<std::uint64_t> growth() const;

private:
  explicit HostPeak(std::uint64_t start) : start_(start) {}
  std::uint64_t start_; ///< VmRSS.
};

} // namespace cppvmm::boot
