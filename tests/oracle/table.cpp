// cppvmm-evidence-table: for each kind of memory and each writer, one scenario on this kernel, and what the answer was
// worth: unsound/missed pages, as a Markdown table. Needs nothing but the kernel, /proc and a folder for temporary
// files.
#include "case.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <sys/utsname.h>
#include <utility>
#include <vector>

#include "moving.hpp"
#include "oracle.hpp"

using namespace cppvmm::oracle;

namespace {

/// Everything that is done to one region of 8 MiB.
struct Row {
  const char* name;
  RegionSpec spec;
};

struct Column {
  const char* name;
  Writer writer;
  std::vector<Step> before{}; ///< What the scenario needs to have been done.
};

constexpr std::uint32_t pages = 2048;

const std::vector<Row>& rows() {
  static const std::vector<Row> all = {
      {"anonymous", {.memory = Memory::anonymous}},
      {"anonymous, huge pages wanted", {.memory = Memory::anonymous, .thp = Thp::wanted}},
      {"anonymous, populated", {.memory = Memory::anonymous, .before = Before::populated}},
      {"anonymous, locked", {.memory = Memory::anonymous, .before = Before::locked}},
      {"memfd", {.memory = Memory::memfd}},
      {"memfd, populated", {.memory = Memory::memfd, .before = Before::populated}},
      {"adopted anonymous", {.memory = Memory::adopted_anonymous}},
      {"adopted memfd (slice)", {.memory = Memory::adopted_memfd, .file_seed = 3}},
      {"shared anonymous", {.memory = Memory::shared_anonymous}},
      {"private file", {.memory = Memory::private_file, .file_seed = 2}},
      {"shared file", {.memory = Memory::shared_file}},
      {"hugetlb", {.memory = Memory::hugetlb}},
      {"hugetlb memfd", {.memory = Memory::hugetlb_memfd}},
      {"unknown", {.memory = Memory::unknown}},
  };
  return all;
}

const std::vector<Column>& columns() {
  static const std::vector<Step> data = {{.writer = Writer::typed_write, .page = 100, .count = 8}};
  static const std::vector<Column> all = {
      {"nobody", Writer::replace},
      {"typed write", Writer::typed_write},
      {"raw pointer", Writer::raw_pointer},
      {"zeros", Writer::zero_write},
      {"data, then zeros", Writer::data_then_zero},
      {"read", Writer::read_touch},
      {"read(2)", Writer::read_from_pipe},
      {"process_vm_writev", Writer::process_vm_writev},
      {"other process, mapping", Writer::other_mapping},
      {"other process, pwrite", Writer::other_pwrite},
      {"forked child", Writer::fork_child},
      {"vCPU store", Writer::vcpu_store},
      {"vCPU page walk", Writer::vcpu_page_walk},
      {"discard", Writer::discard, data},
      {"GuestMemory::discard", Writer::library_discard, data},
      {"cold discard hint", Writer::heat_hint, data},
      {"GuestMemory::reset", Writer::reset, data},
      {"entries dropped", Writer::drop_entries, data},
      {"fallocate", Writer::allocate},
      {"remap", Writer::remap, data},
      {"paged out", Writer::page_out, data},
  };
  return all;
}

/// The column's writer three times, at different places; the answer goes where nothing else is.
Case scenario(const Row& row, const Column& column, SurveyMode mode) {
  Case what{.regions = {row.spec}, .steps = column.before, .mode = mode, .output_page = pages - 1};
  what.regions[0].pages = pages;
  if (row.spec.thp == Thp{}) what.regions[0].thp = Thp::forbidden;
  const auto value = column.writer == Writer::remap ? static_cast<std::uint8_t>(row.spec.memory) : std::uint8_t{7};
  // Zeros by the accessors, which keep every promise.
  const std::uint8_t variant = column.writer == Writer::zero_write ? 1 : 0;
  for (const std::uint32_t page : {100U, 104U, 700U}) {
    what.steps.push_back({.writer = column.writer, .page = page, .count = 4, .value = value, .variant = variant});
    // Once is all there is of these.
    if (column.writer == Writer::remap || column.writer == Writer::reset || column.writer == Writer::replace) break;
  }
  return what;
}

/// How each kind of memory comes through what moves it.
struct MovingReport {
  const MovingHost& host;
  std::uint64_t unsound = 0;
  std::vector<std::string> lacking{};
};

std::string cell(MovingReport& report, MovingMemory memory, Mover mover) {
  if (!report.host.fits(mover, memory)) return "–";
  const MovingOutcome outcome = run_round(report.host, {.memory = memory, .surveys = 40, .movers = {mover}});
  if (!outcome.lacking.empty()) {
    const std::string line = std::string(to_string(memory)) + ": " + outcome.lacking;
    if (std::ranges::find(report.lacking, line) == report.lacking.end()) report.lacking.push_back(line);
    return "–";
  }
  const MovingFigures& figures = outcome.figures;
  report.unsound += figures.unsound + figures.spoiled;
  for (const std::string& problem : outcome.problems)
    std::fprintf(stderr, "%s\n", problem.c_str());
  if (figures.moved[static_cast<unsigned>(mover)] == 0) return "–";
  char text[64];
  std::snprintf(text, sizeof text, "%llu/%.0f %%", static_cast<unsigned long long>(figures.unsound),
                100 * static_cast<double>(figures.missed_pages) / static_cast<double>(figures.untouched_pages));
  return text;
}

/// The number of unsound surveys.
std::uint64_t print_moving_table() {
  const MovingHost host;
  MovingReport report{.host = host};
  std::printf(
      "\n### moving\n\nThe kernel's books again, while the memory is moved, shared and marked all the time. Each "
      "cell: unsound surveys\nof 40 or more, and what they missed of the third of the memory that nobody comes "
      "near. A dash: nothing moved, or this\nmachine lacks it.\n\n| memory |");
  for (unsigned mover = 0; mover < mover_kinds; ++mover)
    std::printf(" %s |", to_string(static_cast<Mover>(mover)));
  std::printf("\n| --- |");
  for (unsigned mover = 0; mover < mover_kinds; ++mover)
    std::printf(" --- |");
  std::printf("\n");
  for (unsigned memory = 0; memory < moving_kinds; ++memory) {
    std::printf("| %s |", to_string(static_cast<MovingMemory>(memory)));
    for (unsigned mover = 0; mover < mover_kinds; ++mover)
      std::printf(" %s |", cell(report, static_cast<MovingMemory>(memory), static_cast<Mover>(mover)).c_str());
    std::printf("\n");
    std::fflush(stdout);
  }
  for (const std::string& line : host.lacking())
    std::printf("\nWithout %s.\n", line.c_str());
  for (const std::string& line : report.lacking)
    std::printf("\nWithout %s.\n", line.c_str());
  std::printf("\nmoving: unsound %llu\n", static_cast<unsigned long long>(report.unsound));
  return report.unsound;
}

std::uint64_t total(const std::array<std::uint64_t, writer_kinds>& counts) {
  std::uint64_t sum = 0;
  for (const std::uint64_t count : counts)
    sum += count;
  return sum;
}

/// Footnotes, each reason once, numbered as they come.
class Notes {
public:
  unsigned number_of(Reason reason) {
    for (std::size_t i = 0; i < reasons_.size(); ++i)
      if (reasons_[i] == reason) return static_cast<unsigned>(i + 1);
    reasons_.push_back(reason);
    return static_cast<unsigned>(reasons_.size());
  }
  void print() const {
    if (reasons_.empty()) return;
    std::printf("\nWhy pages are missed:\n\n");
    for (std::size_t i = 0; i < reasons_.size(); ++i)
      std::printf("%zu. %s\n", i + 1, to_string(reasons_[i]));
  }

private:
  std::vector<Reason> reasons_;
};

struct Verdict {
  std::uint64_t unsound = 0;
  std::uint64_t unexplained = 0;
  std::uint64_t broken = 0; ///< Scenarios that could not be carried out as they are meant.
  std::uint64_t missed = 0;

  void add(const Verdict& other) {
    unsound += other.unsound;
    unexplained += other.unexplained;
    broken += other.broken;
    missed += other.missed;
  }
};

/// Of one table.
struct Report {
  Oracle& oracle;
  bool has_swap = false;
  Notes notes{};
  Verdict verdict{};
};

std::string cell(Report& report, const Row& row, const Column& column, SurveyMode mode) {
  const Case what = scenario(row, column, mode);
  const Outcome outcome = report.oracle.run(what);
  const Figures& figures = outcome.figures;
  report.verdict.unsound += figures.unsound;
  report.verdict.unexplained += figures.unexplained();
  if (figures.substituted_regions > 0) return "–";
  if (!outcome.holds() && figures.unsound == 0 && figures.unexplained() == 0) ++report.verdict.broken;
  for (const std::string& problem : outcome.problems)
    std::fprintf(stderr, "%s, %s: %s\n", row.name, column.name, problem.c_str());
  const auto writer = static_cast<unsigned>(column.writer);
  if (figures.done[writer] == 0 && total(figures.refused) > 0) return "–";
  report.verdict.missed += figures.missed;
  const bool is_disk_file = is_private_file(row.spec.memory) || row.spec.memory == Memory::shared_file;
  if (column.writer == Writer::page_out && !report.has_swap && !is_disk_file) return "–";
  std::string text = std::to_string(figures.unsound) + "/" + std::to_string(figures.missed);
  for (unsigned i = 0; i < reason_kinds; ++i) {
    if (figures.missed_for[i] == 0) continue;
    text += " (" + std::to_string(report.notes.number_of(static_cast<Reason>(i))) + ")";
  }
  return text;
}

void print_table(Report& report, SurveyMode mode) {
  std::printf("| memory |");
  for (const Column& column : columns())
    std::printf(" %s |", column.name);
  std::printf("\n| --- |");
  for (std::size_t i = 0; i < columns().size(); ++i)
    std::printf(" --- |");
  std::printf("\n");
  for (const Row& row : rows()) {
    std::printf("| %s |", row.name);
    for (const Column& column : columns())
      std::printf(" %s |", cell(report, row, column, mode).c_str());
    std::printf("\n");
    std::fflush(stdout);
  }
}

/// Why there is no table of the mode here; nothing when there is one.
std::string obstacle(SurveyMode mode, bool has_vcpus) {
  if (mode == SurveyMode::dirty_log && !has_vcpus) return "no usable KVM";
  if (mode == SurveyMode::write_watch && !cppvmm::test::machine_facts().async_write_protect)
    return "no asynchronous write protection";
  return {};
}

/// What the mode does, in a sentence.
const char* explanation(SurveyMode mode) {
  switch (mode) {
  case SurveyMode::newest:
    return "The kernel's books, by the newest interfaces that this kernel has.";
  case SurveyMode::legacy:
    return "The kernel's books, by what kernels before 6.5 have.";
  case SurveyMode::content_check:
    return "Touched pages are read, where that brings nothing in.";
  case SurveyMode::write_watch:
    return "Every region that can be watched is, from after it was populated; a dash also where the writer would break "
           "the promise that shared memory is written through this mapping alone.";
  case SurveyMode::dirty_log:
    return "KVM's dirty log and the record of the accessors are complete; a dash also where the writer would break "
           "that "
           "promise.";
  }
  return "";
}

/// "newest,dirty-log" and the like; nothing when a word is none.
std::optional<std::vector<SurveyMode>> modes_of(std::string_view list) {
  std::vector<SurveyMode> modes;
  for (;;) {
    const std::size_t comma = list.find(',');
    const auto mode = mode_of(list.substr(0, comma));
    if (!mode) return std::nullopt;
    modes.push_back(*mode);
    if (comma == std::string_view::npos) return modes;
    list.remove_prefix(comma + 1);
  }
}

} // namespace

int main(int count, char** words) {
  std::optional<std::vector<SurveyMode>> modes = modes_of("newest,legacy,content-check,write-watch,dirty-log");
  bool moving = true;
  if (count == 3 && std::string_view(words[1]) == "--modes") {
    modes = modes_of(words[2]);
    moving = false;
  } else if (count == 2 && std::string_view(words[1]) == "--moving")
    modes->clear();
  else if (count > 2 || (count == 2 && *words[1] != 0))
    modes.reset();
  if (!modes) {
    std::fputs(
        "cppvmm-evidence-table [--modes MODE,... | --moving]: Markdown tables of kinds of memory and writers, on this\n"
        "kernel, one for each mode: newest, legacy, content-check, write-watch, dirty-log; or the one of\n"
        "memory that moves. Default: all.\n"
        "Exit status: 0 when nothing was unsound, nothing missed without a reason, and every scenario ran.\n",
        stderr);
    return 2;
  }
  utsname name{};
  if (uname(&name) != 0) return 1;
  auto oracle = Oracle::start();
  if (!oracle) {
    std::fprintf(stderr, "%s\n", oracle.error().c_str());
    return 1;
  }
  std::vector<std::string> lacking;
  const auto vcpu = oracle->add_vcpu();
  if (!vcpu) lacking.push_back("vCPUs: " + vcpu.error());
  std::optional<cppvmm::test::HugePagePool> pool;
  if (auto taken = cppvmm::test::HugePagePool::take(24))
    pool.emplace(std::move(*taken));
  else
    lacking.push_back("huge pages: " + taken.error());
  std::optional<cppvmm::test::SwapSpace> swap;
  if (auto taken = cppvmm::test::SwapSpace::take())
    swap.emplace(std::move(*taken));
  else
    lacking.push_back("swap: " + taken.error());

  std::printf("## Linux %s\n\n", name.release);
  std::printf(
      "Each cell: unsound/missed pages of %u (8 MiB). A dash: the writer does not apply, or this machine lacks it.\n",
      pages);
  for (const std::string& line : lacking)
    std::printf("Without %s.\n", line.c_str());
  Verdict verdict;
  for (const SurveyMode mode : *modes) {
    std::printf("\n### %s\n\n", to_string(mode));
    if (const std::string why = obstacle(mode, vcpu.has_value()); !why.empty()) {
      std::printf("Not here: %s.\n", why.c_str());
      continue;
    }
    std::printf("%s\n\n", explanation(mode));
    Report report{.oracle = *oracle, .has_swap = swap.has_value()};
    print_table(report, mode);
    report.notes.print();
    std::printf("\n%s: unsound %llu, missed %llu, of them without a reason %llu\n", to_string(mode),
                static_cast<unsigned long long>(report.verdict.unsound),
                static_cast<unsigned long long>(report.verdict.missed),
                static_cast<unsigned long long>(report.verdict.unexplained));
    verdict.add(report.verdict);
  }
  // What the scenarios hold of the host is the movers' to take.
  pool.reset();
  swap.reset();
  if (moving) verdict.unsound += print_moving_table();
  std::printf("\nunsound %llu, missed without a reason %llu\n\n", static_cast<unsigned long long>(verdict.unsound),
              static_cast<unsigned long long>(verdict.unexplained));
  return verdict.unsound + verdict.unexplained + verdict.broken == 0 ? 0 : 1;
}
