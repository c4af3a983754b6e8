// A Linux kernel as the guest. Include it after all other headers: it imports modules.
#pragma once

#include "guest.hpp"
#include "options.hpp"

#include <memory>

namespace cppvmm::boot {

/// Reads the kernel and the initrd that `options` name; they outlive it. Its console is standard input and output, or
/// standard error where the JSON goes to standard output.
[[nodiscard]] Result<std::unique_ptr<Guest>> make_linux_guest(const Options& options);

/// One that goes on from where it was saved.
[[nodiscard]] std::unique_ptr<Guest> make_restored_guest(const Options& options);

} // namespace cppvmm::boot
