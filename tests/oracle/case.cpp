#include "case.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>

namespace cppvmm::oracle {

const char* to_string(Memory memory) {
  constexpr const char* names[memory_kinds] = {"anonymous",
                                               "memfd",
                                               "adopted anonymous",
                                               "adopted memfd (slice)",
                                               "shared anonymous",
                                               "private file",
                                               "adopted private file (slice)",
                                               "shared file",
                                               "hugetlb",
                                               "hugetlb memfd",
                                               "unknown"};
  return names[static_cast<unsigned>(memory) % memory_kinds];
}

const char* to_string(Writer writer) {
  constexpr const char* names[writer_kinds] = {"typed write",
                                               "raw pointer",
                                               "raw pointer, scattered",
                                               "write of zeros",
                                               "data, then zeros",
                                               "read",
                                               "read(2) from a pipe",
                                               "process_vm_writev from another process",
                                               "another process's mapping",
                                               "another process's pwrite",
                                               "forked child",
                                               "discard",
                                               "GuestMemory::discard",
                                               "memory heat hint",
                                               "GuestMemory::reset",
                                               "drop of page table entries",
                                               "fallocate",
                                               "populate",
                                               "set_huge_pages",
                                               "remap",
                                               "replacement of the map",
                                               "page-out",
                                               "cold",
                                               "collapse",
                                               "compaction",
                                               "survey",
                                               "mark",
                                               "vCPU store",
                                               "vCPU read",
                                               "vCPU page walk"};
  return names[static_cast<unsigned>(writer) % writer_kinds];
}

const char* to_string(SurveyMode mode) {
  constexpr const char* names[survey_modes] = {"newest", "legacy", "content check", "write watch", "dirty log"};
  return names[static_cast<unsigned>(mode) % survey_modes];
}

std::optional<SurveyMode> mode_of(std::string_view name) {
  constexpr std::string_view names[survey_modes] = {"newest", "legacy", "content-check", "write-watch", "dirty-log"};
  for (unsigned mode = 0; mode < survey_modes; ++mode)
    if (names[mode] == name) return static_cast<SurveyMode>(mode);
  return std::nullopt;
}

std::string describe(const Case& what) {
  constexpr const char* thp[] = {"no huge pages", "huge pages wanted", "huge pages unstated"};
  constexpr const char* before[] = {"", ", populated", ", locked"};
  std::string text;
  char line[256];
  for (std::size_t i = 0; i < what.regions.size(); ++i) {
    const RegionSpec& region = what.regions[i];
    std::snprintf(line, sizeof line, "  region %zu: %u pages after a hole of %u: %s%s, %s%s, file seed %u\n", i,
                  region.pages, region.hole_before, to_string(region.memory), region.rom ? " (ROM)" : "",
                  thp[static_cast<unsigned>(region.thp) % 3], before[static_cast<unsigned>(region.before) % 3],
                  region.file_seed);
    text += line;
  }
  for (std::size_t i = 0; i < what.steps.size(); ++i) {
    const Step& step = what.steps[i];
    std::snprintf(line, sizeof line, "  step %zu: %s, region %u, page %u, count %u, value %u, variant %u\n", i,
                  to_string(step.writer), unsigned{step.region}, step.page, step.count, unsigned{step.value},
                  unsigned{step.variant});
    text += line;
  }
  std::snprintf(line, sizeof line,
                "  answer: %s (options %u), output at region %u page %u + %d, %u pages left out from %u\n",
                to_string(what.mode), unsigned{what.mode_options}, unsigned{what.output_region}, what.output_page,
                what.output_at_8 ? 8 : 0, what.leave_out_count, what.leave_out_page);
  return text + line;
}

} // namespace cppvmm::oracle
