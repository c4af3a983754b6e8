// A file on a file system that is stacked on another one.
#pragma once

#include "descriptor.hpp"

#include <expected>
#include <string>

namespace cppvmm::test {

/// An empty file on an overlayfs whose upper layer is a tmpfs, as on a live system; or why there is none, for a person.
/// It is mounted where no other process, and nothing else of this one, sees it, and is gone with the descriptor.
[[nodiscard]] std::expected<Descriptor, std::string> overlay_file();

} // namespace cppvmm::test
