// An answer and its survey as figures. Include it after all other headers: it imports modules.
#pragma once

#include "memory_picture.hpp"
#include "report.hpp"

#include <vector>

import cppvmm.guest_memory;
import cppvmm.hv_ext;

namespace cppvmm::boot {

/// All but what only a look at the memory tells.
[[nodiscard]] AnswerFigures describe(const BootZeroedAnswer& answer);

/// All RAM, by what is known of it for the answer, and with those of its zeroed pages that the guest gave back.
[[nodiscard]] std::vector<PictureRange> picture_of(const BootZeroedAnswer& answer, const PageSet& given_back);

} // namespace cppvmm::boot
