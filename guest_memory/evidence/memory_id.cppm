module;
#include <cstdint>
module cppvmm.guest_memory:memory_id;

namespace cppvmm {

/// A number of this process's memory: threads and vfork, which share it, have the same, and a forked child has another,
/// however it was forked. (Its process ID may be its parent's, in another namespace.) 0 where it cannot be told.
[[nodiscard]] std::uint64_t memory_id();

} // namespace cppvmm
