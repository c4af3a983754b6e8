// What the zeroing guest and the VMM that starts it agree on. Freestanding: included by both sides.
//
// The VMM puts the image at `image_address`, a BootInfo and a zeroed Report into guest memory that is identity-mapped
// below 4 GiB, and starts each vCPU in 64-bit mode at `image_address` with paging on (every page of RAM mapped to
// itself, writable), interrupts off, RDI = address of the BootInfo, RSI = the vCPU's number from 0, RSP = the top of
// a stack of its own (at least `stack_bytes`, 16-byte aligned). The guest ends by writing to `exit_port`; a vCPU that
// has no work left halts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cppvmm::zeroing {

/// Where the image is loaded and entered: a flat binary whose uninitialised data are part of the file.
inline constexpr std::uint64_t image_address = 0x10'0000;
inline constexpr std::uint64_t stack_bytes = 4096;
/// A 32-bit OUT to this port ends the run; the value is an ExitCode.
inline constexpr std::uint16_t exit_port = 0x0501;

/// A 32-bit OUT to this port is about two gates that are shut at first: GateAction says what. A vCPU that waits for
/// another one does it here rather than in a loop, so that its processor time is that of its work.
inline constexpr std::uint16_t gate_port = 0x0505;

enum class GateAction : std::uint32_t {
  wait = 0,        ///< Hold this vCPU until the gate is open, or for a moment: it looks again and comes back.
  open = 1,        ///< Open the gate for good.
  wait_zeroed = 2, ///< The same of the second gate.
  open_zeroed = 3,
};

inline constexpr std::uint64_t page_bytes = 4096;
/// Page numbers are below this: x86-64 has at most 52 physical address bits.
inline constexpr std::uint64_t page_number_end = std::uint64_t{1} << 40;

inline constexpr std::size_t max_cpus = 256;
inline constexpr std::size_t max_ram_ranges = 16;
inline constexpr std::size_t max_lives_in_ranges = 4;
/// HvExtCallGetBootZeroedMemory answers with at most this many.
inline constexpr std::size_t max_reported_ranges = 255;

enum class ExitCode : std::uint32_t {
  done = 1,          ///< The Report is complete.
  bad_boot_info = 2, ///< The BootInfo is not one, or has counts that are out of bounds.
  bad_hint = 3,      ///< A hint was told to be a success, and not all of it done; or more than all done.
};

/// BootInfo::balloon_target of a guest that keeps all its memory.
inline constexpr std::uint64_t no_balloon_target = ~std::uint64_t{0};

/// Pages [first, first + count).
struct Pages {
  std::uint64_t first;
  std::uint64_t count;
};

/// Written by the VMM before the guest starts. One page.
struct BootInfo {
  static constexpr std::uint64_t expected_magic = 0x316F'7265'5A6D'6D76; // "vmmZero1"

  std::uint64_t magic;
  std::uint32_t cpus;            ///< vCPUs that were started, 1 to max_cpus.
  std::uint32_t ram_ranges;      ///< Entries of `ram`.
  std::uint32_t lives_in_ranges; ///< Entries of `lives_in`.
  std::uint32_t reserved;
  std::uint64_t report; ///< Guest-physical address of the Report.
  /// Pages of RAM that the guest keeps beside what it lives in, the lowest, once all vCPUs have zeroed; it gives the
  /// others back to a host that takes them. Or no_balloon_target.
  std::uint64_t balloon_target;
  Pages ram[max_ram_ranges];           ///< All RAM, disjoint, ascending.
  Pages lives_in[max_lives_in_ranges]; ///< Image, BootInfo, Report, stacks, page tables: what must not be zeroed.
};
static_assert(sizeof(BootInfo) <= page_bytes);

/// Bits of Report::seen.
enum Seen : std::uint64_t {
  seen_hypervisor = 1 << 0,     ///< CPUID 1.ECX[31].
  seen_interface = 1 << 1,      ///< CPUID 0x40000001.EAX is "Hv#1".
  seen_hypercall_msrs = 1 << 2, ///< CPUID 0x40000003.EAX[5].
  seen_vp_index = 1 << 3,       ///< CPUID 0x40000003.EAX[6].
  seen_extended_calls = 1 << 4, ///< CPUID 0x40000003.EBX[20].
  seen_hypercall_page = 1 << 5, ///< The HYPERCALL MSR took the page.
  asked_capabilities = 1 << 6,  ///< HvExtCallQueryCapabilities was made.
  asked_zeroed_memory = 1 << 7, ///< HvExtCallGetBootZeroedMemory was made.
  gave_back = 1 << 8,           ///< HvExtCallMemoryHeatHint was made, with cold discard.
};

/// Written by the guest; complete once ExitCode::done was written to the exit port. `cursor` and `planned_pages` move
/// while it works, for a VMM that shows progress. One page.
struct Report {
  std::uint64_t seen;                ///< Seen bits.
  std::uint64_t capabilities_result; ///< The hypercall's result value, if it was made.
  std::uint64_t capabilities;        ///< The capability word, if the result was success.
  std::uint64_t zeroed_result;       ///< The hypercall's result value, if it was made.
  std::uint64_t reported_ranges;     ///< The range count as the host wrote it, if the result was success.
  std::uint64_t lives_in_overlaps;   ///< Reported ranges that overlap what the guest lives in; a sound host has none.
  std::uint64_t planned_ranges;      ///< Ranges that the guest sets out to zero.
  std::uint64_t planned_pages;       ///< Their pages.
  std::uint64_t cursor;              ///< Planned pages handed out to vCPUs so far; ends at planned_pages or beyond.
  std::uint64_t zeroed_pages;        ///< Pages zeroed, by all vCPUs that are done.
  std::uint64_t cpus_done;           ///< vCPUs that are done zeroing.
  std::uint64_t given_back_pages;    ///< Named in hints and done, as their results say.
  std::uint64_t give_back_calls;     ///< Hints that were sent.
  std::uint64_t give_back_failures;  ///< Of those, the ones that were no success; the next is sent all the same.
  std::uint64_t give_back_result;    ///< The result value of the last failure, else of the last hint.
  std::uint64_t given_back_cursor;   ///< Blocks of addresses handed out to vCPUs so far.
  std::uint64_t cpus_ended;
  std::uint64_t cpu_zeroed_pages[max_cpus]; ///< Pages zeroed, by vCPU.
};
static_assert(sizeof(Report) <= page_bytes);

} // namespace cppvmm::zeroing
