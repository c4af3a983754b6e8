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
  double survey_us = 0;
  std::vector<RegionFigures> regions;
  /// Guest RAM in transparent huge pages at that moment: one touched byte makes 512 pages of these present, and those
  /// of them that hold no data are missed. Taken with the audit only, since it walks page tables.
  std::optional<std::uint64_t> transparent_huge_bytes;
  std::optional<AuditFigures> audit;
  double audit_ms = 0;
  std::vector<PictureRange> picture; ///< All RAM at that moment; with --map only.
};

/// How often each hypercall arrived, by call code.
struct CallFigures {
  std::uint64_t query_capabilities = 0;     ///< 0x8001
  std::uint64_t get_boot_zeroed_memory = 0; ///< 0x8002
  std::uint64_t other = 0;
};

/// Processor time of a vCPU's thread.
struct TickFigures {
  std::uint64_t user = 0;
  std::uint64_t system = 0;
};

struct RunFigures {
  Options options;
  Hypercalls transport = Hypercalls::off; ///< Never automatic.
  CallFigures calls;
  std::uint64_t ram_pages = 0;
  std::optional<AnswerFigures> answer;  ///< The last one, if the guest asked.
  std::optional<zeroing::Report> guest; ///< Of the zeroing guest.
  /// At the end, pages with data outside what the guest lives in, where it was to find or make all zero: there must be
  /// none. With the audit only.
  std::optional<std::uint64_t> nonzero_pages_at_end;
  std::uint64_t host_resident_bytes = 0;              ///< At the end.
  std::vector<std::optional<TickFigures>> vcpu_ticks; ///< Nothing where the host did not tell.
  std::uint64_t ticks_per_second = 0;
  double wall_ms = 0; ///< From before the vCPUs start until they are joined, the audit included.
  std::string kernel_release;
};

/// One JSON object, a line for each of its fields.
[[nodiscard]] std::string to_json(const RunFigures& figures);

/// A few lines for a person.
[[nodiscard]] std::string to_text(const RunFigures& figures);

/// Guest memory as the last answer found it; nothing when the guest never asked.
[[nodiscard]] std::optional<Picture> to_picture(const RunFigures& figures);

} // namespace cppvmm::boot
