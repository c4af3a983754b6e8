// Files whose file system does not show where they hold data.
#pragma once

#include "descriptor.hpp"

#include <cstdint>
#include <expected>
#include <string>
#include <vector>

namespace cppvmm::test {

/// Where a snapshot lies.
enum class SnapshotPlace : std::uint8_t { ramfs, squashfs, erofs, btrfs, btrfs_subvolume, overlay, block_device };

[[nodiscard]] const char* to_string(SnapshotPlace place);

/// Two files of the same content; in btrfs_subvolume, of the same inode number and path below their subvolumes.
struct SnapshotFiles {
  Descriptor file; ///< Open for reading alone, as is the other.
  Descriptor other;
};

/// Files of `pages` pages of 4 KiB that are zero, but for those that are given, of which one byte is 1; or why there
/// are none, for a person. What they are mounted on no other process sees, and it is gone with the descriptors.
[[nodiscard]] std::expected<SnapshotFiles, std::string> snapshot_files(SnapshotPlace place, std::uint64_t pages,
                                                                       const std::vector<std::uint64_t>& with_data);

} // namespace cppvmm::test
