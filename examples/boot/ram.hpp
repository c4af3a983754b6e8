// The guest's RAM, of the kind that the command line asks for. Include it after all other headers: it imports modules.
#pragma once

#include "audit.hpp"
#include "options.hpp"
#include "tests/guests/zeroing/abi.hpp"

#include <expected>
#include <memory>
#include <span>
#include <string>
#include <vector>

import cppvmm.guest_memory;

namespace cppvmm::boot {

/// A mapping of this program's own, unmapped with the object.
class OwnMapping;

/// Regions of RAM, and what of them is this program's own.
struct Ram {
  MemoryMap map;
  /// Outlive the map's regions, which adopted them.
  std::vector<std::shared_ptr<OwnMapping>> mappings;
};

/// Makes a region of RAM for each of `ranges`, of the kind that `options` say. Files are made in $TMPDIR, else
/// /var/tmp, else /tmp, and have no name. An error is one line for a person.
[[nodiscard]] std::expected<Ram, std::string> make_ram(const Options& options, std::span<const zeroing::Pages> ranges);

/// Has RAM, of which nothing is present, as a guest starts with it: populated, and with huge pages or without, as
/// `options` say. An error is one line for a person.
[[nodiscard]] std::expected<void, std::string> prepare_ram(const Options& options, const MemoryMap& map);

/// RAM as the audit reads it, with descriptors that it needs and the map does not have.
struct AuditedRam {
  std::vector<AuditedRegion> regions;
  std::vector<std::shared_ptr<int>> descriptors; ///< Closed with the last copy.
};
[[nodiscard]] std::expected<AuditedRam, std::string> audited_ram(const MemoryMap& map);

} // namespace cppvmm::boot
