// The guest that zeroes its memory. Include it after all other headers: it imports modules.
#pragma once

#include "guest.hpp"
#include "options.hpp"

#include <memory>

namespace cppvmm::boot {

/// `options` outlive it.
[[nodiscard]] Result<std::unique_ptr<Guest>> make_zeroing_guest(const Options& options);

} // namespace cppvmm::boot
