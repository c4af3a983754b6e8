// The machine that every guest runs on: memory, a VM, Hyper-V's interface, the vCPUs and what answers their exits.
#pragma once

#include "options.hpp"
#include "report.hpp"

#include <expected>
#include <string>

namespace cppvmm::boot {

struct Failure {
  int status = 1;   ///< For exit(3): 128 + signal when a signal ended the run.
  std::string text; ///< One line for a person.
};

/// Builds the machine, runs the guest to its end and collects the figures; SIGINT and SIGTERM end the run (between a
/// reset and the boot after it: the process, as main would). Starts the guest anew as often as Options::resets says. Of
/// the zeroing guest, shows the progress on standard error when that is a terminal or the run is long.
[[nodiscard]] std::expected<RunFigures, Failure> run_guest(const Options& options);

} // namespace cppvmm::boot
