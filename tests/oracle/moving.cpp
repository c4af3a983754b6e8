#include "support/descriptor.hpp"
#include "support/kernel_files.hpp"
#include "support/machine_facts.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <expected>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <sched.h>
#include <string>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "movers.hpp"

namespace cppvmm::oracle {
namespace {

constexpr std::size_t most_problems = 8;

/// What movers set in the lab (movers.cpp).
constexpr std::array settings = {"/sys/kernel/mm/ksm/sleep_millisecs", "/sys/kernel/mm/ksm/run",
                                 "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs",
                                 "/sys/kernel/mm/transparent_hugepage/khugepaged/alloc_sleep_millisecs",
                                 "/proc/sys/kernel/numa_balancing"};

/// Where the arena is just now, for the line that a SIGBUS leaves.
std::atomic<const std::byte*> arena_start = nullptr;

/// The kernel tells whoever has the page mapped that it is lost: no reason to end.
void note_lost_memory(int, siginfo_t* what, void*) {
  if (what->si_code == BUS_MCEERR_AO || is_losing_memory()) return;
  char line[128];
  const int length = std::snprintf(line, sizeof line, "SIGBUS, code %d, at %td bytes into the arena\n", what->si_code,
                                   static_cast<const std::byte*>(what->si_addr) - arena_start.load());
  static_cast<void>(!write(STDERR_FILENO, line, static_cast<std::size_t>(length)));
  std::signal(SIGBUS, SIG_DFL);
}

/// Those of a round.
std::vector<Mover> movers_of(const MovingHost& host, const MovingRound& round) {
  std::vector<Mover> fitting;
  for (unsigned i = 0; i < mover_kinds; ++i)
    if (host.fits(static_cast<Mover>(i), round.memory)) fitting.push_back(static_cast<Mover>(i));
  // A simulated memory error does not keep a look at content from being a SIGBUS.
  if (round.content_check) std::erase(fitting, Mover::memory_errors);
  if (!round.movers.empty()) {
    std::erase_if(fitting, [&](Mover mover) { return std::ranges::find(round.movers, mover) == round.movers.end(); });
    return fitting;
  }
  std::mt19937_64 random(round.seed);
  std::ranges::shuffle(fitting, random);
  fitting.resize(std::min<std::size_t>(fitting.size(), 1 + random() % 4));
  return fitting;
}

bool takes_memory(Mover mover) {
  return mover == Mover::write_protection || mover == Mover::poison_markers || mover == Mover::uffd_move;
}

/// The movers at work, until the end of this.
class Work {
public:
  Work(const Arena& arena, const std::vector<Mover>& movers) : arena_(arena), movers_(movers) {
    // First the processes, which then have none of the private memory.
    for (const Mover mover : movers)
      if (is_process(mover)) children_.emplace_back([this, mover] { take_turns(mover); });
    arena.fill();
    for (const Mover mover : movers)
      if (!is_process(mover)) threads_.emplace_back([this, mover] { take_turns(mover); });
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;
  ~Work() {
    arena_.shared().stop = true;
    // First the processes. Memory that goes offline waits for a page that a soft offline holds, which waits until no
    // memory goes offline: only a signal to the first ends that (mm/memory_hotplug.c, offline_pages;
    // mm/memory-failure.c, soft_offline_page).
    children_.clear();
    threads_.clear();
    for (const Mover mover : movers_)
      restore_after(mover);
  }

  /// Whether each had a turn.
  [[nodiscard]] bool is_everywhere() const {
    return std::ranges::all_of(movers_, [this](Mover mover) {
      return arena_.shared().turns[static_cast<unsigned>(mover)].load(std::memory_order_relaxed) > 0;
    });
  }

private:
  void take_turns(Mover mover) const {
    Arena::Shared& shared = arena_.shared();
    const auto number = static_cast<unsigned>(mover);
    for (std::uint64_t turn = 0; !shared.stop.load(std::memory_order_relaxed); ++turn) {
      const std::uint64_t moved = take_turn(mover, arena_, turn);
      shared.moved[number].fetch_add(moved, std::memory_order_relaxed);
      shared.turns[number].fetch_add(1, std::memory_order_relaxed);
      if (moved == 0) sched_yield();
    }
  }

  const Arena& arena_;
  const std::vector<Mover>& movers_;
  std::vector<Child> children_;
  std::vector<std::jthread> threads_;
};

std::string names_of(const std::vector<Mover>& movers) {
  std::string names;
  for (const Mover mover : movers)
    names += std::string(names.empty() ? "" : ", ") + to_string(mover);
  return names;
}

} // namespace

const char* to_string(MovingMemory memory) {
  switch (memory) {
  case MovingMemory::anonymous:
    return "anonymous";
  case MovingMemory::anonymous_huge:
    return "anonymous, huge pages wanted";
  case MovingMemory::memfd:
    return "memfd";
  case MovingMemory::shared_anonymous:
    return "shared anonymous";
  case MovingMemory::hugetlb:
    return "hugetlb";
  case MovingMemory::hugetlb_memfd:
    return "hugetlb memfd";
  case MovingMemory::private_file:
    return "private file";
  case MovingMemory::shared_file:
    return "shared file";
  case MovingMemory::private_disk_file:
    return "private file on a disk";
  case MovingMemory::shared_disk_file:
    return "shared file on a disk";
  case MovingMemory::private_overlay_file:
    return "private file on an overlay";
  case MovingMemory::shared_overlay_file:
    return "shared file on an overlay";
  }
  return "";
}

const char* to_string(Mover mover) {
  switch (mover) {
  case Mover::churn:
    return "written and discarded";
  case Mover::other_process:
    return "the same by another process";
  case Mover::nodes:
    return "moved between nodes";
  case Mover::compaction:
    return "compaction";
  case Mover::offlining:
    return "offlining";
  case Mover::soft_offlining:
    return "soft offlining";
  case Mover::memory_errors:
    return "memory errors";
  case Mover::copy_on_write:
    return "copied on write";
  case Mover::collapse:
    return "collapsed";
  case Mover::khugepaged:
    return "khugepaged";
  case Mover::swap:
    return "swapped";
  case Mover::ksm:
    return "KSM";
  case Mover::numa_balancing:
    return "NUMA balancing";
  case Mover::write_protection:
    return "write-protected";
  case Mover::poison_markers:
    return "poison markers";
  case Mover::uffd_move:
    return "UFFDIO_MOVE";
  case Mover::discards:
    return "neighbours discarded";
  case Mover::dropped_entries:
    return "entries dropped";
  }
  return "";
}

MovingHost::MovingHost() : disk_(test::Disk::make()) {
  const char* const lab = std::getenv("CPPVMM_LAB");
  is_lab_ = lab != nullptr && *lab != 0;
  has_two_nodes_ = std::filesystem::exists("/sys/devices/system/node/node1");
  if (!has_two_nodes_) lacking_.emplace_back("a second NUMA node (./dev lab --numa 2 has one)");
  if (auto pool = test::HugePagePool::take(48))
    pool_.emplace(std::move(*pool));
  else
    lacking_.push_back("huge pages: " + pool.error());
  if (auto swap = test::SwapSpace::take())
    swap_.emplace(std::move(*swap));
  else
    lacking_.push_back("swap: " + swap.error());
  if (!is_lab_) {
    lacking_.emplace_back("compaction, memory that goes offline or is lost, KSM and khugepaged (lab only)");
    return;
  }
  for (const char* const setting : settings)
    if (const long before = test::kernel_number(setting); before >= 0) settings_.emplace_back(setting, before);
  struct sigaction action{};
  struct sigaction before{};
  action.sa_sigaction = note_lost_memory;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  if (sigaction(SIGBUS, &action, &before) == 0) sigbus_ = before;
}

MovingHost::~MovingHost() {
  for (const auto& [setting, before] : settings_)
    if (test::kernel_number(setting) != before) static_cast<void>(test::tell_kernel(setting, std::to_string(before)));
  if (sigbus_) static_cast<void>(sigaction(SIGBUS, &*sigbus_, nullptr));
}

bool MovingHost::fits(Mover mover, MovingMemory memory) const {
  switch (mover) {
  case Mover::churn:
    return memory != MovingMemory::hugetlb || test::machine_facts().hugetlb_dontneed;
  case Mover::discards:
  case Mover::copy_on_write:
    return true;
  case Mover::other_process:
    return !is_private(memory);
  case Mover::nodes:
    return has_two_nodes_;
  case Mover::numa_balancing:
    return is_lab_ && has_two_nodes_ && !is_hugetlb(memory);
  case Mover::compaction:
  case Mover::offlining:
  case Mover::soft_offlining:
  case Mover::memory_errors:
    return is_lab_;
  case Mover::collapse:
    return memory == MovingMemory::anonymous_huge || memory == MovingMemory::memfd ||
           memory == MovingMemory::shared_anonymous;
  case Mover::khugepaged:
    return is_lab_ && memory == MovingMemory::anonymous_huge;
  case Mover::swap:
    return !is_hugetlb(memory) && (has_swap() || is_private_file(memory));
  case Mover::ksm:
    return is_lab_ && (is_anonymous(memory) || is_private_file(memory));
  case Mover::write_protection:
    return is_anonymous(memory) || is_hugetlb(memory) || memory == MovingMemory::memfd ||
           memory == MovingMemory::shared_anonymous;
  case Mover::poison_markers:
    return is_anonymous(memory) || is_hugetlb(memory) || memory == MovingMemory::memfd ||
           memory == MovingMemory::shared_anonymous;
  case Mover::uffd_move:
    return is_anonymous(memory);
  case Mover::dropped_entries:
    return !is_private(memory) || is_private_file(memory);
  }
  return false;
}

std::expected<test::Descriptor, std::string> MovingHost::disk_file() const {
  if (!disk_) return std::unexpected(disk_.error());
  return disk_->file();
}

void MovingFigures::add(const MovingFigures& other) {
  rounds += other.rounds;
  surveys += other.surveys;
  without_evidence += other.without_evidence;
  undisturbed += other.undisturbed;
  undisturbed_without += other.undisturbed_without;
  checked_pages += other.checked_pages;
  reported_pages += other.reported_pages;
  untouched_pages += other.untouched_pages;
  missed_pages += other.missed_pages;
  unsound += other.unsound;
  spoiled += other.spoiled;
  for (unsigned i = 0; i < mover_kinds; ++i) {
    turns[i] += other.turns[i];
    moved[i] += other.moved[i];
  }
}

MovingOutcome run_round(const MovingHost& host, const MovingRound& round, const MovingSurveyor& surveyor,
                        const std::function<bool()>& goes_on) {
  MovingOutcome outcome;
  auto made = Arena::make(host, round.memory);
  if (!made) {
    outcome.lacking = made.error();
    return outcome;
  }
  const Arena& arena = **made;
  auto map = MemoryMap::make({arena.region()});
  if (!map) {
    outcome.lacking = map.error().message();
    return outcome;
  }
  const GuestMemory memory(std::move(*map));
  SurveyOptions options;
  options.source = round.source;
  if (round.content_check) options.content_check.emplace();
  const std::vector<Mover> movers = movers_of(host, round);
  arena_start = arena.host(0);
  // For who looks for the movers that a machine hangs or dies of.
  if (std::getenv("CPPVMM_MOVING_TRACE") != nullptr)
    std::fprintf(stderr, "%s, %s%s: %s\n", to_string(round.memory),
                 round.source == EvidenceSource::automatic ? "automatic" : "legacy",
                 round.content_check ? ", content" : "", names_of(movers).c_str());
  const bool is_taken = std::ranges::any_of(movers, takes_memory);
  const PageRange untouched = *PageRange::make(PageNumber(arena.bytes() / page_size),
                                               arena.region().pages().count() - arena.bytes() / page_size);
  MovingFigures& figures = outcome.figures;
  figures.rounds = 1;
  {
    const Work work(arena, movers);
    // A mover that never gets its turn must not keep the round from ending.
    const std::uint64_t most = round.most_surveys > 0 ? round.most_surveys : std::uint64_t{round.surveys} * 10;
    for (unsigned i = 0; (i < round.surveys || !work.is_everywhere()) && i < most; ++i) {
      if (goes_on && !goes_on()) break;
      const auto before = arena.states();
      const Survey survey = surveyor ? surveyor(memory, options) : memory.survey(options);
      const auto after = arena.states();
      ++figures.surveys;
      arena.shared().surveys.fetch_add(1, std::memory_order_relaxed);
      const bool is_without = survey.regions[0].evidence == Evidence::none;
      if (is_without) ++figures.without_evidence;
      if (is_without && survey.regions[0].error) outcome.without = survey.regions[0].error->message();
      if (!is_taken) {
        ++figures.undisturbed;
        if (is_without) ++figures.undisturbed_without;
      }
      const PageSet zeroed = survey.zeroed();
      figures.reported_pages += zeroed.page_count();
      PageSet missed(untouched);
      missed.remove(zeroed);
      figures.untouched_pages += untouched.count();
      figures.missed_pages += missed.page_count();
      std::uint64_t wrong = 0;
      std::uint32_t first = 0;
      for (std::uint32_t block = 0; block < arena.blocks(); ++block) {
        if (!held_data(before[block], after[block])) continue;
        ++figures.checked_pages;
        if (!zeroed.contains(arena.data_page(block))) continue;
        if (wrong++ == 0) first = block;
      }
      if (wrong == 0) continue;
      ++figures.unsound;
      if (outcome.problems.size() >= most_problems) continue;
      char line[512];
      std::snprintf(line, sizeof line,
                    "%s, %s%s: survey %u reports %llu pages with data, the first in block %u (use %u, state %u); "
                    "evidence %s; movers: %s",
                    to_string(round.memory), round.source == EvidenceSource::automatic ? "automatic" : "legacy",
                    round.content_check ? ", content" : "", i, static_cast<unsigned long long>(wrong), first,
                    static_cast<unsigned>(arena.use(first)), before[first], to_string(survey.regions[0].evidence),
                    names_of(movers).c_str());
      outcome.problems.emplace_back(line);
    }
  }
  for (unsigned i = 0; i < mover_kinds; ++i) {
    figures.turns[i] = arena.shared().turns[i].load();
    figures.moved[i] = arena.shared().moved[i].load();
  }
  figures.spoiled = arena.spoiled();
  if (figures.spoiled > 0)
    outcome.problems.push_back(std::string(to_string(round.memory)) + ": " + std::to_string(figures.spoiled) +
                               " blocks do not hold what was written; movers: " + names_of(movers));
  return outcome;
}

std::string moves(const MovingFigures& figures) {
  std::string line;
  for (unsigned i = 0; i < mover_kinds; ++i) {
    if (figures.turns[i] == 0) continue;
    line += (line.empty() ? "" : ", ") + std::string(to_string(static_cast<Mover>(i))) + " " +
            std::to_string(figures.moved[i]);
  }
  return line;
}

} // namespace cppvmm::oracle
