// Re-reads every page of RAM, by a way that has nothing in common with the survey's, and compares what is there with
// what was reported as zeroed. An oracle: for cppvmm-boot's --audit and for tests.
#pragma once

#include <cstdint>
#include <expected>
#include <optional>
#include <span>
#include <stop_token>
#include <string>

namespace cppvmm::boot {

/// RAM to audit, as this process has it mapped.
struct AuditedRegion {
  /// How the region is read so that no page of it becomes resident that was not:
  enum class Memory : std::uint8_t {
    /// In a forked child, through process_vm_readv. The child has a copy-on-write snapshot of this address space and
    /// only waits; a read of an absent page puts the zero page into the child's page tables, and those go with it.
    /// Guest stores during the audit are not seen. The kernel must allow this process to trace its own child
    /// (/proc/sys/kernel/yama/ptrace_scope 0 or 1, or CAP_SYS_PTRACE), and the mapping must not be MADV_DONTFORK.
    private_anonymous,
    /// With pread on the file: a hole reads as zero and stays a hole.
    shared_file,
    /// A private mapping of hugetlb pages, where even a read in a child would take a huge page from the pool: mincore
    /// tells which pages exist, and only these are read, here. One that never was instantiated has no bytes to hold
    /// data in: its next reader gets a page that the kernel clears first.
    private_hugetlb,
  };

  std::uint64_t first_page = 0; ///< Guest page number (4 KiB).
  std::uint64_t page_count = 0;
  const void* host = nullptr;
  Memory memory{};
  int fd = -1; ///< For shared_file: open for reading.
  std::uint64_t fd_offset = 0;
};

/// Guest pages [first, first + count) that were reported; ranges may overlap, wrap or lie outside RAM.
struct ReportedRange {
  std::uint64_t first = 0;
  std::uint64_t count = 0;
};

struct AuditFigures {
  std::uint64_t ram_pages = 0;
  std::uint64_t data_pages = 0;        ///< RAM pages with a byte that is not zero.
  std::uint64_t reported_pages = 0;    ///< RAM pages that were reported, each counted once.
  std::uint64_t unsound_pages = 0;     ///< Reported, and with data: there must be none.
  std::uint64_t missed_zero_pages = 0; ///< All zero, and not reported.
  std::optional<std::uint64_t> first_unsound_page;
};

/// Audits disjoint regions. Every page is read: when one cannot be, the audit fails with one line for a person. A stop
/// request is honoured within milliseconds and is such a failure. Uses 1 MiB of memory, plus the page tables of the
/// child.
[[nodiscard]] std::expected<AuditFigures, std::string> audit(std::span<const AuditedRegion> regions,
                                                             std::span<const ReportedRange> reported,
                                                             const std::stop_token& stop = {});

} // namespace cppvmm::boot
