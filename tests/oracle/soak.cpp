// cppvmm-soak: runs the oracle's cases for as long as it is told to.
#include "draw.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <unistd.h>
#include <vector>

#include "moving.hpp"
#include "session.hpp"

using namespace cppvmm::oracle;

namespace {

constexpr const char* usage =
    "cppvmm-soak [--hours H | --minutes M | --pages N | --cases N] [--seed S] [--small] [--mode MODE]\n"
    "cppvmm-soak --moving [--hours H | --minutes M | TIME] [--seed S]\n"
    "Draws memory maps and writers, asks for the answer, and reads every page, until the bound (default: 10 million\n"
    "page checks). Case i has seed S + i. --small: regions of at most 8 MiB, as in the tests.\n"
    "--mode: newest, legacy, content-check, write-watch or dirty-log in all cases; else each case draws one.\n"
    "--moving: instead, memory of each kind in turn is moved, shared, marked and dropped while it is surveyed, for H "
    "hours\n"
    "or M minutes (default: 1); CPPVMM_LAB in the environment: also by what this machine loses memory by.\n"
    "Exit status: 0 when every answer was sound and missed nothing without a reason, else 1.\n";

struct Bounds {
  std::optional<std::chrono::duration<double>> time;
  std::uint64_t pages = UINT64_MAX;
  std::uint64_t cases = UINT64_MAX;
  std::optional<std::uint64_t> seed;
  bool small = false;
  bool moving = false;
  std::optional<SurveyMode> mode;
};

/// 90s, 60m, 2h.
std::optional<std::chrono::duration<double>> time_of(const char* text) {
  char* end = nullptr;
  const double number = std::strtod(text, &end);
  if (end == text || number < 0 ||
      (std::string_view(end) != "s" && std::string_view(end) != "m" && std::string_view(end) != "h"))
    return std::nullopt;
  return std::chrono::duration<double>(number * (*end == 'h' ? 3600 : *end == 'm' ? 60 : 1));
}

std::optional<Bounds> parse(int count, char** words) {
  Bounds bounds;
  bool is_bounded = false;
  for (int i = 1; i < count; ++i) {
    const std::string_view word = words[i];
    if (word == "--small") {
      bounds.small = true;
      continue;
    }
    if (word == "--moving") {
      bounds.moving = true;
      // It may be followed by a time: 60m, 2h.
      if (i + 1 < count)
        if (const auto time = time_of(words[i + 1])) {
          bounds.time = time;
          is_bounded = true;
          ++i;
        }
      continue;
    }
    if (i + 1 >= count) return std::nullopt;
    if (word == "--mode") {
      bounds.mode = mode_of(words[++i]);
      if (!bounds.mode) return std::nullopt;
      continue;
    }
    char* end = nullptr;
    const char* const text = words[++i];
    const double number = std::strtod(text, &end);
    if (end == text || *end != 0 || number < 0) return std::nullopt;
    if (word == "--hours" || word == "--minutes")
      bounds.time = std::chrono::duration<double>(number * (word == "--hours" ? 3600 : 60));
    else if (word == "--pages")
      bounds.pages = static_cast<std::uint64_t>(number);
    else if (word == "--cases")
      bounds.cases = static_cast<std::uint64_t>(number);
    else if (word == "--seed")
      bounds.seed = std::strtoull(text, nullptr, 0);
    else
      return std::nullopt;
    is_bounded = is_bounded || word != "--seed";
  }
  if (!is_bounded) bounds.pages = 10'000'000;
  return bounds;
}

/// Ctrl-C ends the run in order: what was taken of the host is given back, and the figures are printed.
volatile std::sig_atomic_t was_interrupted = 0;
void interrupt(int) { was_interrupted = 1; }

unsigned long long wide(std::uint64_t value) { return value; }

struct Kind {
  MovingRound round;
  MovingFigures figures{};
  std::string lacking{};
};

/// Every kind of memory, asked in each of the ways that it can be.
std::vector<Kind> moving_kinds_to_run() {
  std::vector<Kind> kinds;
  for (unsigned i = 0; i < moving_kinds; ++i)
    for (const auto source : {cppvmm::EvidenceSource::automatic, cppvmm::EvidenceSource::legacy})
      for (const bool content_check : {false, true}) {
        const auto memory = static_cast<MovingMemory>(i);
        if (content_check && !is_private(memory)) continue;
        kinds.push_back({.round = {.memory = memory, .source = source, .content_check = content_check}});
      }
  return kinds;
}

std::string name_of(const MovingRound& round) {
  return std::string(to_string(round.memory)) +
         (round.source == cppvmm::EvidenceSource::automatic ? ", automatic" : ", legacy") +
         (round.content_check ? ", content" : "");
}

double share(std::uint64_t part, std::uint64_t whole) {
  return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

int soak_moving(const Bounds& bounds) {
  const MovingHost host;
  for (const std::string& line : host.lacking())
    std::printf("without %s\n", line.c_str());
  std::uint64_t seed = bounds.seed.value_or(plan(1).seed);
  std::printf("seed %llu\n", wide(seed));
  std::fflush(stdout);
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const auto time = bounds.time.value_or(std::chrono::minutes(1));
  auto next_line = begin;
  std::vector<Kind> kinds = moving_kinds_to_run();
  MovingFigures all;
  const auto goes_on = [&] { return was_interrupted == 0 && Clock::now() - begin < time; };
  for (std::size_t i = 0; goes_on(); i = (i + 1) % kinds.size()) {
    Kind& kind = kinds[i];
    if (!kind.lacking.empty()) {
      if (std::ranges::all_of(kinds, [](const Kind& one) { return !one.lacking.empty(); })) break;
      continue;
    }
    kind.round.seed = seed++;
    const MovingOutcome outcome = run_round(host, kind.round, {}, goes_on);
    kind.lacking = outcome.lacking;
    kind.figures.add(outcome.figures);
    all.add(outcome.figures);
    for (const std::string& problem : outcome.problems)
      std::printf("%s; seed %llu\n", problem.c_str(), wide(kind.round.seed));
    std::fflush(stdout);
    if (Clock::now() < next_line) continue;
    next_line = Clock::now() + std::chrono::seconds(30);
    std::fprintf(stderr, "%llu rounds, %llu surveys, %llu unsound, %.0f s\n", wide(all.rounds), wide(all.surveys),
                 wide(all.unsound), std::chrono::duration<double>(Clock::now() - begin).count());
  }
  std::printf(
      "| memory | rounds | surveys | unsound | pages checked | without evidence | where no other userfaultfd took "
      "it |\n| --- | --- | --- | --- | --- | --- | --- |\n");
  for (const Kind& kind : kinds) {
    if (!kind.lacking.empty()) {
      std::printf("| %s | – %s | | | | | |\n", name_of(kind.round).c_str(), kind.lacking.c_str());
      continue;
    }
    const MovingFigures& figures = kind.figures;
    std::printf("| %s | %llu | %llu | %llu | %llu | %.1f %% | %.1f %% |\n", name_of(kind.round).c_str(),
                wide(figures.rounds), wide(figures.surveys), wide(figures.unsound), wide(figures.checked_pages),
                share(figures.without_evidence, figures.surveys),
                share(figures.undisturbed_without, figures.undisturbed));
  }
  std::printf("\nmoved: %s\n", moves(all).c_str());
  std::printf("rounds %llu, surveys %llu, page checks %llu, reported pages %llu, unsound %llu, spoiled %llu, %.0f s\n",
              wide(all.rounds), wide(all.surveys), wide(all.checked_pages), wide(all.reported_pages), wide(all.unsound),
              wide(all.spoiled), std::chrono::duration<double>(Clock::now() - begin).count());
  return all.unsound + all.spoiled == 0 ? 0 : 1;
}

} // namespace

int main(int count, char** words) {
  const std::optional<Bounds> bounds = parse(count, words);
  if (!bounds) {
    std::fputs(usage, stderr);
    return 2;
  }
  struct sigaction action{};
  action.sa_handler = interrupt;
  action.sa_flags = SA_RESTART;
  for (const int signal : {SIGINT, SIGTERM, SIGHUP})
    if (sigaction(signal, &action, nullptr) != 0) return 1;

  if (bounds->moving) return soak_moving(*bounds);

  Profile profile{.large = !bounds->small, .mode = bounds->mode};
  auto oracle = Oracle::start();
  if (!oracle) {
    std::printf("%s\n", oracle.error().c_str());
    return 1;
  }
  const auto vcpu = oracle->add_vcpu();
  profile.vcpus = vcpu.has_value();
  if (!vcpu) std::printf("without vCPUs: %s\n", vcpu.error().c_str());
  const auto pool = cppvmm::test::HugePagePool::take(64);
  profile.huge_pages = pool.has_value();
  if (!pool) std::printf("without huge pages: %s\n", pool.error().c_str());
  const auto swap = cppvmm::test::SwapSpace::take();
  profile.swap = swap.has_value();
  if (!swap) std::printf("without swap: %s\n", swap.error().c_str());
  profile.files = cppvmm::test::machine_facts().files.tell_the_truth();
  if (!profile.files) std::printf("without files: the folder for temporary files does not tell the truth about them\n");

  Plan what = plan(bounds->cases);
  what.cases = bounds->cases;
  what.seed = bounds->seed.value_or(what.seed);
  std::printf("seed %llu\n", wide(what.seed));
  std::fflush(stdout);

  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const bool is_terminal = isatty(STDERR_FILENO) != 0;
  auto next_line = begin;
  const auto goes_on = [&](const Figures& figures) {
    const auto now = Clock::now();
    if (now >= next_line) {
      std::fprintf(stderr, "%s%llu cases, %llu page checks, %llu unsound, %.0f s%s", is_terminal ? "\r\033[K" : "",
                   wide(figures.cases), wide(figures.page_checks), wide(figures.unsound),
                   std::chrono::duration<double>(now - begin).count(), is_terminal ? "" : "\n");
      next_line = now + std::chrono::seconds(is_terminal ? 1 : 30);
    }
    return was_interrupted == 0 && figures.page_checks < bounds->pages &&
           (!bounds->time || now - begin < *bounds->time);
  };
  const Session session = run_cases(*oracle, what, profile, goes_on);
  if (is_terminal) std::fputs("\r\033[K", stderr);

  const Figures& figures = session.figures;
  std::printf("%s", summary(figures).c_str());
  std::printf("cases %llu, page checks %llu, unsound %llu, missed without a reason %llu, seed %llu, %.0f s\n",
              wide(figures.cases), wide(figures.page_checks), wide(figures.unsound), wide(figures.unexplained()),
              wide(what.seed), std::chrono::duration<double>(Clock::now() - begin).count());
  if (!session.failure) return 0;
  std::printf("%s", session.failure->report.c_str());
  return 1;
}
