// A case of the oracle: a memory map, what is done to it, and how the answer is asked for; plain data, so that it can
// be drawn, shrunk and printed. Every combination of values is a valid case: numbers are taken modulo what there is.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cppvmm::oracle {

/// How a region comes by its memory.
enum class Memory : std::uint8_t {
  anonymous,
  memfd,
  adopted_anonymous,
  adopted_memfd, ///< A slice of a larger memfd.
  shared_anonymous,
  private_file,         ///< A sparse snapshot with data in some pages.
  adopted_private_file, ///< A slice of one.
  shared_file,
  hugetlb,
  hugetlb_memfd,
  unknown, ///< Adopted without a statement of its kind.
};
inline constexpr unsigned memory_kinds = 11;
[[nodiscard]] const char* to_string(Memory memory);

[[nodiscard]] constexpr bool is_hugetlb(Memory memory) {
  return memory == Memory::hugetlb || memory == Memory::hugetlb_memfd;
}
/// Whether the memory has a file that another process can be given.
[[nodiscard]] constexpr bool is_shared_file(Memory memory) {
  return memory == Memory::memfd || memory == Memory::adopted_memfd || memory == Memory::shared_file ||
         memory == Memory::hugetlb_memfd;
}
[[nodiscard]] constexpr bool is_shared(Memory memory) {
  return is_shared_file(memory) || memory == Memory::shared_anonymous;
}
[[nodiscard]] constexpr bool is_private_file(Memory memory) {
  return memory == Memory::private_file || memory == Memory::adopted_private_file;
}

/// Transparent huge pages, by madvise.
enum class Thp : std::uint8_t { forbidden, wanted, unstated };
/// What happens to all of a region before anything else does.
enum class Before : std::uint8_t { nothing, populated, locked };

struct RegionSpec {
  Memory memory{};
  std::uint32_t pages = 1;       ///< Of 4 KiB; rounded up to 2 MiB for hugetlb.
  std::uint32_t hole_before = 0; ///< Pages of nothing before the region.
  bool rom = false;
  Thp thp{};
  Before before{};
  std::uint32_t file_seed = 0; ///< Where a snapshot has its data.
};

/// Whoever or whatever changes memory.
enum class Writer : std::uint8_t {
  typed_write,
  raw_pointer,
  scatter, ///< The same, on every second or third page of the region, for an answer with more ranges than fit.
  zero_write,
  data_then_zero,
  read_touch,
  read_from_pipe,
  process_vm_writev, ///< From another process.
  other_mapping,     ///< Another process's store through its own mapping of the file.
  other_pwrite,      ///< Another process's write(2) to the file.
  fork_child,        ///< A store by a child of this process; whose private memory is then its own.
  discard,           ///< MADV_DONTNEED, MADV_REMOVE or a hole, by kind.
  library_discard,   ///< GuestMemory::discard of a range, or of every second page.
  heat_hint,         ///< HvExtCallMemoryHeatHint: pages are given back, or are cold or hot.
  reset,             ///< GuestMemory::reset, which keeps a range of each region, or nothing.
  drop_entries,      ///< Page table entries go, the memory stays (MADV_DONTNEED of a shared mapping).
  allocate,          ///< fallocate(2): memory without a write.
  populate,          ///< MADV_POPULATE_WRITE, MADV_POPULATE_READ, or Region::populate.
  set_huge_pages,    ///< Region::set_huge_pages.
  remap,             ///< The region goes, another comes in its place.
  replace,           ///< The same regions in another map.
  page_out,          ///< MADV_PAGEOUT: to swap, or back to the file.
  cold,              ///< MADV_COLD.
  collapse,          ///< MADV_COLLAPSE into huge pages.
  compact,           ///< The kernel moves pages about.
  survey,            ///< An earlier look, whose answer is not used.
  mark,              ///< GuestMemory::mark_touched.
  vcpu_store,
  vcpu_read,
  vcpu_page_walk, ///< The guest's page tables lie in the region.
};
inline constexpr unsigned writer_kinds = 30;
[[nodiscard]] const char* to_string(Writer writer);

struct Step {
  Writer writer{};
  std::uint8_t region = 0;
  std::uint32_t page = 0;
  std::uint32_t count = 1; ///< Pages, cut at the region's end.
  std::uint8_t value = 1;  ///< What is written; 0 counts as 1 for those who write data.
  std::uint8_t variant = 0;
};

/// How the answer is asked for, and what the embedder does beforehand: each mode has other reasons to miss pages.
enum class SurveyMode : std::uint8_t {
  newest,
  legacy,
  content_check, ///< SurveyOptions::content_check.
  write_watch,   ///< GuestMemory::arm_write_watch of each region that can be watched; writers keep the promise.
  dirty_log,     ///< KVM's log, with a VM: complete, when writers keep that promise, or not.
};
inline constexpr unsigned survey_modes = 5;
[[nodiscard]] const char* to_string(SurveyMode mode);
/// Of a name like "content-check".
[[nodiscard]] std::optional<SurveyMode> mode_of(std::string_view name);

struct Case {
  std::vector<RegionSpec> regions;
  std::vector<Step> steps;
  SurveyMode mode{};
  /// Bits that each mode reads its own way. content_check: 0 and 1 the ZeroScan, 2 whether there is an executor, 3
  /// whether it drops every second task. write_watch and dirty_log: 0 whether the baseline is a promise (where nothing
  /// was done before), 1 whether they begin after half of the steps; dirty_log: 2 whether it is incomplete.
  std::uint8_t mode_options = 0;
  std::uint8_t output_region = 0;
  std::uint32_t output_page = 0;
  bool output_at_8 = false;          ///< The output starts 8 bytes into its page.
  std::uint32_t leave_out_page = 0;  ///< Counted through all RAM.
  std::uint32_t leave_out_count = 0; ///< Pages that the embedder wants left out.
};

/// The whole case as a script, one line a region and a step.
[[nodiscard]] std::string describe(const Case& what);

} // namespace cppvmm::oracle
