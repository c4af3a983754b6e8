// KVM's dirty log of a Guest's memory. Include it after all other headers: it imports cppvmm.hv_ext.
#pragma once

#include "guest.hpp"

#include <expected>
#include <string>

import cppvmm.guest_memory;
import cppvmm.hv_ext;

namespace cppvmm::oracle {

/// Of the slots that the guest has now; to be stopped before they change.
[[nodiscard]] std::expected<DirtyLog, std::string> start_dirty_log(Guest& guest, GuestMemory& memory,
                                                                   const WriteLogOptions& options);

} // namespace cppvmm::oracle
