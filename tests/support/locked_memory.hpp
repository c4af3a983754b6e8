// Memory that stays in place.
#pragma once

#include <cstddef>
#include <sys/mman.h>

namespace cppvmm::test {

/// mlock(2) does this too, but under sanitizers it does nothing and says that it did. False: errno says why.
[[nodiscard]] inline bool lock_memory(const void* start, std::size_t bytes) { return mlock2(start, bytes, 0) == 0; }

} // namespace cppvmm::test
