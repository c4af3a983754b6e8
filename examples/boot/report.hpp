// What a run found out, and its two forms: JSON for programs, lines for a person.
#pragma once

#include "audit.hpp"
#include "memory_picture.hpp"
#include "options.hpp"
#include "tests/guests/zeroing/abi.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace cppvmm::boot {

/// What a write watch or the dirty log added; see cppvmm.guest_memory's WatchReport.
struct WatchFigures {
  std::uint64_t written_pages = 0;
  std::uint64_t zero_pages = 0;
  double us = 0;
  std::optional<std::string> error;
};

/// What the look at content added; see ContentCheckReport.
struct ContentFigures {
  std::uint64_t checked_pages = 0;
  std::uint64_t zero_pages = 0;
  std::uint64_t absent_pages = 0;
  std::uint64_t unchecked_pages = 0;
  double us = 0;
  std::optional<std::string> error;
};

/// What the survey went by in one region; see RegionSurvey.
struct RegionFigures {
  std::uint64_t first_page = 0;
  std::uint64_t page_count = 0;
  std::string kind;
  std::string backing;
  std::string evidence;
  std::optional<WatchFigures> watch;
  std::optional<WatchFigures> log;
  std::optional<ContentFigures> content;
  std::uint64_t touched_pages = 0;
  std::uint64_t zeroed_pages = 0;
  std::uint64_t given_up_pages = 0;
  std::uint64_t unaccounted_pages = 0;
  double survey_us = 0;
  std::optional<std::string> error;
};

/// One answer to HvExtCallGetBootZeroedMemory.
struct AnswerFigures {
  std::vector<ReportedRange> ranges; ///< In the answer's order.
  std::uint64_t touched_pages = 0;
  std::uint64_t reported_pages = 0;
  std::uint64_t reported_pages_by_2_mib = 0; ///< Had it been known only which blocks of 2 MiB are untouched.
  double survey_us = 0;
  std::vector<RegionFigures> regions;
  /// Guest RAM in transparent huge pages at that moment: one touched byte makes 512 pages of these present, and those
  /// of them that hold no data are missed. Taken with the audit only, since it walks page tables.
  std::optional<std::uint64_t> transparent_huge_bytes;
  std::optional<AuditFigures> audit;
  double audit_ms = 0;
  std::vector<PictureRange> picture; ///< All RAM at that moment; with --map only.
};

/// What is kept of a boot: of the last answer in it.
struct BootAnswer {
  std::uint32_t boot = 0; ///< 1 is the first.
  std::uint64_t reported_pages = 0;
  std::uint64_t touched_pages = 0;
  std::uint64_t ranges = 0;
  std::optional<std::uint64_t> unsound_pages;     ///< With the audit.
  std::optional<std::uint64_t> missed_zero_pages; ///< With the audit.
  double survey_us = 0;
};

/// An answer that reported pages with data in them.
struct UnsoundAnswer {
  std::uint64_t answer = 0; ///< 1 is the run's first.
  std::uint32_t boot = 0;
  std::uint64_t pages = 0;
  std::uint64_t first_page = 0;
};

/// All answers of a run, in a space that grows with its boots and not with the answers.
struct AnswerLog {
  std::uint64_t given = 0;
  std::optional<AnswerFigures> last;
  std::vector<BootAnswer> boots; ///< Of those in which the guest asked, ascending.
  std::uint64_t audited = 0;
  std::uint64_t unsound = 0; ///< Of those that were audited.
  std::optional<UnsoundAnswer> first_unsound;

  /// `boot` is the one of the answer before, or a later one.
  void add(std::uint32_t boot, AnswerFigures answer);
};

/// How often each hypercall arrived, by call code.
struct CallFigures {
  std::uint64_t query_capabilities = 0;     ///< 0x8001
  std::uint64_t get_boot_zeroed_memory = 0; ///< 0x8002
  std::uint64_t memory_heat_hint = 0;       ///< 0x8003
  std::uint64_t other = 0;
};

/// What guests said of their pages by HvExtCallMemoryHeatHint, and what was done; a page counts each time.
struct HeatFigures {
  std::uint64_t cold_pages = 0;
  std::uint64_t hot_pages = 0;
  std::uint64_t discard_pages = 0;
  std::uint64_t freed_pages = 0;
  std::uint64_t cleared_pages = 0;
  std::uint64_t advised_pages = 0;
  std::uint64_t kept_pages = 0;
  std::uint64_t failed_pages = 0;
};

/// Processor time of a vCPU's thread.
struct TickFigures {
  std::uint64_t user = 0;
  std::uint64_t system = 0;
};

struct RunFigures {
  Options options;
  Hypercalls transport = Hypercalls::off; ///< Never automatic.
  std::uint32_t resets = 0;               ///< After which the guest was started anew.
  CallFigures calls;                      ///< Of all boots.
  HeatFigures heat;                       ///< Of all boots.
  std::uint64_t ram_pages = 0;
  AnswerLog answers;
  std::optional<zeroing::Report> guest; ///< Of the zeroing guest, in the last boot.
  /// At the end of each boot, added up: pages with data outside what the guest lives in, where it was to find or make
  /// all zero. There must be none. With the audit only.
  std::optional<std::uint64_t> nonzero_pages_at_end;
  std::uint64_t host_resident_bytes = 0; ///< At the end.
  /// The most host memory at any moment of the run, over all boots: what of guest memory was resident when the vCPUs
  /// first started, and the most that the process had beyond what it had then (HostPeak). What this program itself
  /// takes meanwhile is in it (threads, surveys, audits: a few MiB); page tables, what KVM keeps for the guest and file
  /// pages that are not mapped are not. Never less than host_resident_bytes. Nothing for hugetlb memory, which is in no
  /// resident set, and where /proc does not tell.
  std::optional<std::uint64_t> host_peak_bytes;
  /// By vCPU, of all boots; nothing where the host did not tell.
  std::vector<std::optional<TickFigures>> vcpu_ticks;
  std::uint64_t ticks_per_second = 0;
  std::vector<double> vcpu_us; ///< Processor time by vCPU, of all boots, finer than ticks.
  double wall_ms = 0; ///< From before the vCPUs start until they end for the last time, audits and resets included.
  std::string kernel_release;
};

/// One JSON object, a line for each of its fields.
[[nodiscard]] std::string to_json(const RunFigures& figures);

/// A few lines for a person.
[[nodiscard]] std::string to_text(const RunFigures& figures);

/// That an answer reported pages with data in them, if one did: one line for a person.
[[nodiscard]] std::optional<std::string> find_unsound(const AnswerLog& answers);

/// Why the run is a failure for all that: one line for a person. Nothing when all audits are good, or there were none.
[[nodiscard]] std::optional<std::string> find_fault(const RunFigures& figures);

/// Guest memory as the last answer found it; nothing when the guest never asked.
[[nodiscard]] std::optional<Picture> to_picture(const RunFigures& figures);

} // namespace cppvmm::boot
