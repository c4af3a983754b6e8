// Memory that moves while it is surveyed: an arena of one kind of memory, threads and processes that move its pages,
// share them, mark them, drop them and bring them back, and surveys meanwhile. What held data before a survey began,
// and was not discarded until after it, is never reported. Include it after all other headers: it imports
// cppvmm.guest_memory.
#pragma once

#include "support/descriptor.hpp"
#include "support/disk.hpp"
#include "support/huge_pages.hpp"
#include "support/swap.hpp"

#include <array>
#include <csignal>
#include <cstdint>
#include <expected>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

import cppvmm.guest_memory;

namespace cppvmm::oracle {

/// The memory that moves.
enum class MovingMemory : std::uint8_t {
  anonymous,      ///< Of 4 KiB pages.
  anonymous_huge, ///< That asks for transparent huge pages.
  memfd,
  shared_anonymous,
  hugetlb,
  hugetlb_memfd,
  private_file, ///< In the folder for temporary files.
  shared_file,
  private_disk_file, ///< On an ext4.
  shared_disk_file,
  private_overlay_file, ///< Of an overlayfs on a tmpfs.
  shared_overlay_file,
};
inline constexpr unsigned moving_kinds = 12;
[[nodiscard]] const char* to_string(MovingMemory memory);
[[nodiscard]] constexpr bool is_hugetlb(MovingMemory memory) {
  return memory == MovingMemory::hugetlb || memory == MovingMemory::hugetlb_memfd;
}
[[nodiscard]] constexpr bool is_anonymous(MovingMemory memory) {
  return memory == MovingMemory::anonymous || memory == MovingMemory::anonymous_huge;
}
[[nodiscard]] constexpr bool is_private_file(MovingMemory memory) {
  return memory == MovingMemory::private_file || memory == MovingMemory::private_disk_file ||
         memory == MovingMemory::private_overlay_file;
}
[[nodiscard]] constexpr bool is_private(MovingMemory memory) {
  return is_anonymous(memory) || memory == MovingMemory::hugetlb || is_private_file(memory);
}

/// Who moves it.
enum class Mover : std::uint8_t {
  churn,            ///< A thread writes and discards pages.
  other_process,    ///< Another process does, of shared memory.
  nodes,            ///< move_pages(2) to and fro between two nodes.
  compaction,       ///< /proc/sys/vm/compact_memory (lab only).
  offlining,        ///< Memory goes offline and online, block by block (lab only).
  soft_offlining,   ///< MADV_SOFT_OFFLINE: the pages are replaced (lab only, few: they are lost).
  memory_errors,    ///< MADV_HWPOISON (the same).
  copy_on_write,    ///< A child shares the memory, and the pages are written.
  collapse,         ///< MADV_COLLAPSE into huge pages.
  khugepaged,       ///< The same by the kernel's thread (lab only: for the whole machine).
  swap,             ///< Out by MADV_PAGEOUT, and in by reading.
  ksm,              ///< Pages of the same content are merged, and written (lab only).
  numa_balancing,   ///< The kernel takes entries away to see who uses pages (lab only).
  write_protection, ///< A userfaultfd write-protects pages, and leaves off.
  poison_markers,   ///< UFFDIO_POISON of untouched pages, and away with it.
  uffd_move,        ///< UFFDIO_MOVE of a page with data into the memory, and out.
  discards,         ///< Pages without data are discarded, which splits huge ones.
  dropped_entries,  ///< MADV_DONTNEED of memory that stays in the page cache, and back by reading.
};
inline constexpr unsigned mover_kinds = 18;
[[nodiscard]] const char* to_string(Mover mover);

/// What the machine has for that; taken for as long as this lives, and given back.
class MovingHost {
public:
  MovingHost();
  MovingHost(const MovingHost&) = delete;
  MovingHost& operator=(const MovingHost&) = delete;
  ~MovingHost();

  /// Nothing is lost with this machine.
  [[nodiscard]] bool is_lab() const { return is_lab_; }
  [[nodiscard]] bool has_two_nodes() const { return has_two_nodes_; }
  [[nodiscard]] bool has_huge_pages() const { return pool_.has_value(); }
  [[nodiscard]] bool has_swap() const { return swap_.has_value(); }
  /// What it lacks, a line each for a person.
  [[nodiscard]] const std::vector<std::string>& lacking() const { return lacking_; }
  /// Whether the mover can do anything to the memory here.
  [[nodiscard]] bool fits(Mover mover, MovingMemory memory) const;
  /// An empty file on a disk's file system, or why there is none.
  [[nodiscard]] std::expected<test::Descriptor, std::string> disk_file() const;

private:
  bool is_lab_ = false;
  bool has_two_nodes_ = false;
  std::vector<std::pair<std::string, long>> settings_; ///< Of the kernel's, and what they said before.
  std::optional<struct sigaction> sigbus_;             ///< What was done before.
  std::optional<test::HugePagePool> pool_;
  std::optional<test::SwapSpace> swap_;
  std::expected<test::Disk, std::string> disk_;
  std::vector<std::string> lacking_;
};

struct MovingRound {
  MovingMemory memory{};
  EvidenceSource source = EvidenceSource::automatic;
  bool content_check = false;
  unsigned surveys = 100;      ///< At least so many; more until each mover has had a turn.
  unsigned most_surveys = 0;   ///< At most so many; 0: ten times as many as at least.
  std::uint64_t seed = 0;      ///< Which movers, where none are named.
  std::vector<Mover> movers{}; ///< Those that do not fit are left out.
};

struct MovingFigures {
  std::uint64_t rounds = 0;
  std::uint64_t surveys = 0;
  std::uint64_t without_evidence = 0; ///< Of them, Evidence::none.
  std::uint64_t undisturbed = 0;      ///< Surveys of rounds in which no other userfaultfd takes the memory.
  std::uint64_t undisturbed_without = 0;
  std::uint64_t checked_pages = 0;   ///< Pages that held data throughout a survey, summed up over the surveys.
  std::uint64_t reported_pages = 0;  ///< Zeroed, in all surveys.
  std::uint64_t untouched_pages = 0; ///< That nobody ever comes near, in all surveys.
  std::uint64_t missed_pages = 0;    ///< Of them, not reported.
  std::uint64_t unsound = 0;         ///< Surveys that reported a page with data.
  std::uint64_t spoiled = 0;         ///< Pages that did not hold what was written to them: the arena itself is wrong.
  std::array<std::uint64_t, mover_kinds> turns{};
  std::array<std::uint64_t, mover_kinds> moved{}; ///< Pages, faults or what there is to count.

  void add(const MovingFigures& other);
};

struct MovingOutcome {
  MovingFigures figures;
  std::vector<std::string> problems; ///< The first few.
  std::string lacking;               ///< Why there was no round; empty if there was.
  std::string without;               ///< Why the last survey without evidence had none; empty if each had some.
};

/// What is asked in the place of GuestMemory::survey.
using MovingSurveyor = std::function<Survey(const GuestMemory&, const SurveyOptions&)>;

/// One arena, some of its movers, and surveys; `goes_on` is asked before each survey.
[[nodiscard]] MovingOutcome run_round(const MovingHost& host, const MovingRound& round,
                                      const MovingSurveyor& surveyor = {}, const std::function<bool()>& goes_on = {});

/// What was moved, in a line.
[[nodiscard]] std::string moves(const MovingFigures& figures);

} // namespace cppvmm::oracle
