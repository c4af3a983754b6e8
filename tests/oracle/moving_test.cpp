#include <cstdint>
#include <gtest/gtest.h>
#include <iostream>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "support/kernel_files.hpp"
#include "support/machine_facts.hpp"

#include "moving.hpp"
#include "session.hpp"

// Memory that moves while it is surveyed: a page that held data before the survey began, and was not discarded until
// after it, is never reported.

using namespace cppvmm;
using namespace cppvmm::oracle;

namespace {

/// How the answer is asked for.
enum class Way : std::uint8_t { automatic, legacy, content };

/// Whether this machine proves anything of the memory, as long as nobody takes it for a userfaultfd of their own.
bool has_evidence(MovingMemory memory, Way way) {
  const test::MachineFacts& facts = test::machine_facts();
  switch (memory) {
  case MovingMemory::anonymous:
  case MovingMemory::memfd:
  case MovingMemory::private_file:
  case MovingMemory::private_disk_file:
  case MovingMemory::private_overlay_file:
    return true;
  case MovingMemory::anonymous_huge:
    return facts.membarrier;
  case MovingMemory::shared_anonymous:
    return facts.map_files;
  case MovingMemory::hugetlb:
  case MovingMemory::hugetlb_memfd:
    return facts.userfaultfd;
  case MovingMemory::shared_file:
    return facts.files.tell_the_truth() && (facts.files.in_memory || (facts.cachestat && way != Way::legacy));
  case MovingMemory::shared_disk_file:
    return facts.cachestat && way != Way::legacy;
  case MovingMemory::shared_overlay_file:
    return false;
  }
  return false;
}

/// Whether the kernel's count of this process's huge pages is what it should be while none is mapped. A page that is
/// given back while it migrates stays in it (docs/evidence.md), and then nothing is proved by it any more.
bool is_huge_page_count_right() {
  const std::string status = test::kernel_text("/proc/self/status");
  return status.find("HugetlbPages:\t       0 kB") != std::string::npos;
}

class MovingMemoryOf : public testing::TestWithParam<std::tuple<MovingMemory, Way>> {
protected:
  static void SetUpTestSuite() { host.emplace(); }
  static void TearDownTestSuite() { host.reset(); }
  static inline std::optional<MovingHost> host;
};

TEST_P(MovingMemoryOf, IsNeverReportedWithData) {
  const auto [memory, way] = GetParam();
  MovingRound round{.memory = memory,
                    .source = way == Way::legacy ? EvidenceSource::legacy : EvidenceSource::automatic,
                    .content_check = way == Way::content,
                    .surveys = host->is_lab() ? 20U : 40U,
                    .most_surveys = host->is_lab() ? 60U : 0U,
                    .seed = plan(1).seed};
  std::cout << "seed " << round.seed << std::endl;
  MovingFigures figures;
  const std::uint64_t rounds = moving_rounds(host->is_lab() ? 2 : 4);
  for (std::uint64_t i = 0; i < rounds && !HasFailure(); ++i, ++round.seed) {
    const MovingOutcome outcome = run_round(*host, round);
    if (!outcome.lacking.empty()) GTEST_SKIP() << outcome.lacking;
    figures.add(outcome.figures);
    for (const std::string& problem : outcome.problems)
      ADD_FAILURE() << problem << "; seed " << round.seed;
  }
  std::cout << figures.surveys << " surveys, " << figures.without_evidence << " without evidence, "
            << figures.checked_pages << " pages checked; " << moves(figures) << std::endl;
  EXPECT_EQ(figures.unsound, 0U);
  EXPECT_EQ(figures.spoiled, 0U);
  EXPECT_GT(figures.checked_pages, 0U);

  const bool is_counted =
      memory == MovingMemory::hugetlb && (way == Way::legacy || !test::machine_facts().async_write_protect);
  const bool is_count_right = is_huge_page_count_right();
  if (is_counted && !is_count_right) std::cout << "the kernel's count of huge pages is off: no evidence by it\n";

  // Nothing is ever wrong with an empty answer. So there has to be another, at least where no mover takes the memory,
  // nor discards huge pages without a pause while they are counted.
  round.surveys = 10;
  round.movers = {memory == MovingMemory::hugetlb ? Mover::copy_on_write : Mover::discards};
  const MovingOutcome quiet = run_round(*host, round);
  ASSERT_EQ(quiet.lacking, "");
  EXPECT_EQ(quiet.figures.unsound, 0U);
  if (!has_evidence(memory, way) || (is_counted && !is_count_right)) return;
  EXPECT_LT(quiet.figures.undisturbed_without, quiet.figures.undisturbed) << quiet.without;
  EXPECT_GT(quiet.figures.reported_pages, 0U);
}

std::string name_of(const testing::TestParamInfo<std::tuple<MovingMemory, Way>>& info) {
  std::string name = to_string(std::get<0>(info.param));
  std::erase(name, ',');
  for (char& letter : name)
    if (letter == ' ') letter = '_';
  constexpr const char* ways[] = {"_automatic", "_legacy", "_content"};
  return name + ways[static_cast<unsigned>(std::get<1>(info.param))];
}

/// Each kind in each way; content is looked at where nobody else can write.
std::vector<std::tuple<MovingMemory, Way>> all() {
  std::vector<std::tuple<MovingMemory, Way>> combinations;
  for (unsigned kind = 0; kind < moving_kinds; ++kind)
    for (const Way way : {Way::automatic, Way::legacy, Way::content})
      if (const auto memory = static_cast<MovingMemory>(kind); way != Way::content || is_private(memory))
        combinations.emplace_back(memory, way);
  return combinations;
}

INSTANTIATE_TEST_SUITE_P(Kinds, MovingMemoryOf, testing::ValuesIn(all()), name_of);

} // namespace
