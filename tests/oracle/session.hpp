// Runs many drawn cases, and tells what a failing one was. Include it after all other headers: it imports
// cppvmm.guest_memory.
#pragma once

#include "draw.hpp"

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "oracle.hpp"

namespace cppvmm::oracle {

/// The seed of the first case, and how many: case i has seed + i. CPPVMM_ORACLE_SEED and CPPVMM_ORACLE_CASES in the
/// environment set them, so that a case with seed S is replayed by CPPVMM_ORACLE_SEED=S CPPVMM_ORACLE_CASES=1, with the
/// same test (or `cppvmm-soak --seed S --cases 1`). Without them, the seed is a new one each time.
struct Plan {
  std::uint64_t seed = 0;
  std::uint64_t cases = 0;
};
/// A sanitizer makes forks and page table walks several times as expensive: an eighth of the cases then.
[[nodiscard]] Plan plan(std::uint64_t cases);

/// How many rounds of memory that moves: CPPVMM_MOVING_ROUNDS in the environment sets it.
[[nodiscard]] std::uint64_t moving_rounds(std::uint64_t otherwise);

struct Failure {
  std::uint64_t seed = 0;
  Outcome outcome;
  std::string report; ///< Seed, what was wrong, the case, and the smallest that fails the same way.
};

struct Session {
  Figures figures;
  std::optional<Failure> failure;
};

/// Runs cases until one fails, all were run, or `goes_on` says no (it is asked before each case).
[[nodiscard]] Session run_cases(Oracle& oracle, const Plan& what, const Profile& profile,
                                const std::function<bool(const Figures&)>& goes_on = {},
                                const Surveyor& surveyor = real_surveyor);

/// What the figures say, in a few lines.
[[nodiscard]] std::string summary(const Figures& figures);

} // namespace cppvmm::oracle
