// Draws cases, and makes failing ones smaller (rapidcheck).
#pragma once

#include "case.hpp"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>

namespace cppvmm::oracle {

/// What drawn cases may use; a case is the same for the same seed and profile.
struct Profile {
  bool vcpus = false;
  bool huge_pages = false;
  bool swap = false;
  bool files = true;  ///< Regions of temporary files, on a disk where that is what the folder is on.
  bool large = false; ///< Regions of up to 64 MiB, not 8 MiB.
  /// In place of what is drawn; nothing else of the case changes. dirty_log is drawn only with vcpus.
  std::optional<SurveyMode> mode = std::nullopt;
  std::optional<std::uint8_t> mode_options = std::nullopt;
};

[[nodiscard]] Case draw(std::uint64_t seed, const Profile& profile);

/// The smallest case that `fails` still, among those that the one of `seed` shrinks to step by step. At most
/// `most_tries` cases are tried, and none after `most_time`.
[[nodiscard]] Case shrink(std::uint64_t seed, const Profile& profile, const std::function<bool(const Case&)>& fails,
                          std::size_t most_tries = 5000, std::chrono::seconds most_time = std::chrono::seconds(20));

} // namespace cppvmm::oracle
