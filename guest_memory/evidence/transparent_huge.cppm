module;
module cppvmm.guest_memory:transparent_huge;

namespace cppvmm {

/// Waits until whoever holds a spin lock now, of a page table for example, has let go of it: those are read-side
/// critical sections of RCU. 0, or errno. Some 10 ms.
[[nodiscard]] int wait_for_spin_locks();

} // namespace cppvmm
