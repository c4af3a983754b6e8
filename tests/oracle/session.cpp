#include "draw.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <utility>

#include "session.hpp"

namespace cppvmm::oracle {
namespace {

std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr || *text == 0 ? otherwise : std::strtoull(text, nullptr, 0);
}

std::string lines(const Outcome& outcome) {
  std::string all;
  for (const std::string& problem : outcome.problems)
    all += "  " + problem + "\n";
  return all;
}

Failure report(Oracle& oracle, std::uint64_t seed, const Profile& profile, const Surveyor& surveyor, Outcome outcome) {
  // A smaller case counts if it is as bad: one that is only incomplete does not stand for one that is unsound.
  const bool is_unsound = outcome.figures.unsound > 0;
  const Case smallest = shrink(seed, profile, [&](const Case& smaller) {
    const Outcome again = oracle.run(smaller, surveyor);
    return !again.holds() && (again.figures.unsound > 0) == is_unsound;
  });
  const std::string number = std::to_string(seed);
  Failure failure{.seed = seed, .outcome = std::move(outcome), .report = {}};
  failure.report = "case with seed " + number + " (CPPVMM_ORACLE_SEED=" + number + " CPPVMM_ORACLE_CASES=1):\n" +
                   lines(failure.outcome) + describe(draw(seed, profile)) + "the smallest that fails:\n" +
                   lines(oracle.run(smallest, surveyor)) + describe(smallest);
  return failure;
}

} // namespace

#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr std::uint64_t fewer = 8;
#else
constexpr std::uint64_t fewer = 1;
#endif

Plan plan(std::uint64_t cases) {
  std::random_device random;
  const std::uint64_t fresh = std::uint64_t{random()} << 16 | (random() & 0xFFFF);
  return {.seed = from_environment("CPPVMM_ORACLE_SEED", fresh),
          .cases = from_environment("CPPVMM_ORACLE_CASES", cases / fewer)};
}

std::uint64_t moving_rounds(std::uint64_t otherwise) { return from_environment("CPPVMM_MOVING_ROUNDS", otherwise); }

Session run_cases(Oracle& oracle, const Plan& what, const Profile& profile,
                  const std::function<bool(const Figures&)>& goes_on, const Surveyor& surveyor) {
  Session session;
  for (std::uint64_t i = 0; i < what.cases; ++i) {
    if (goes_on && !goes_on(session.figures)) break;
    Outcome outcome = oracle.run(draw(what.seed + i, profile), surveyor);
    session.figures.add(outcome.figures);
    if (outcome.holds()) continue;
    session.failure = report(oracle, what.seed + i, profile, surveyor, std::move(outcome));
    break;
  }
  return session;
}

std::string summary(const Figures& figures) {
  char line[256];
  std::snprintf(line, sizeof line,
                "%llu cases, %llu page checks: %llu unsound; %llu reported, %llu with data, %llu missed, of them %llu "
                "without a reason",
                static_cast<unsigned long long>(figures.cases), static_cast<unsigned long long>(figures.page_checks),
                static_cast<unsigned long long>(figures.unsound),
                static_cast<unsigned long long>(figures.reported_pages),
                static_cast<unsigned long long>(figures.data_pages), static_cast<unsigned long long>(figures.missed),
                static_cast<unsigned long long>(figures.unexplained()));
  std::string all = std::string(line) + "\n";
  for (unsigned i = 1; i < reason_kinds; ++i) {
    if (figures.missed_for[i] == 0) continue;
    std::snprintf(line, sizeof line, "  missed %llu: %s\n", static_cast<unsigned long long>(figures.missed_for[i]),
                  to_string(static_cast<Reason>(i)));
    all += line;
  }
  all += "  writers:";
  for (unsigned i = 0; i < writer_kinds; ++i) {
    if (figures.done[i] + figures.refused[i] == 0) continue;
    std::snprintf(line, sizeof line, " %s %llu (refused %llu);", to_string(static_cast<Writer>(i)),
                  static_cast<unsigned long long>(figures.done[i]),
                  static_cast<unsigned long long>(figures.refused[i]));
    all += line;
  }
  std::snprintf(line, sizeof line, "\n  %llu pages were in swap; %llu regions were of another kind than drawn\n",
                static_cast<unsigned long long>(figures.swapped_pages),
                static_cast<unsigned long long>(figures.substituted_regions));
  return all + line;
}

} // namespace cppvmm::oracle
