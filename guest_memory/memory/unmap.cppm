module;
#include <cstddef>
#include <sys/mman.h>
module cppvmm.guest_memory:unmap;

namespace cppvmm {

/// Unmaps. The kernel refuses where a mapping would have to be split, as one that it joined with a neighbour, and the
/// process has no mapping left to make (ENOMEM, Linux mm/vma.c do_vmi_munmap). The addresses stay taken then, but not
/// the memory: private pages are gone either way, and of others no entry is left.
inline void unmap(void* start, std::size_t bytes) {
  if (munmap(start, bytes) != 0) static_cast<void>(madvise(start, bytes, MADV_DONTNEED));
}

} // namespace cppvmm
