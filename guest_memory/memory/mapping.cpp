module;
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <optional>
#include <sys/mman.h>
#include <sys/stat.h>
module cppvmm.guest_memory:mapping.impl;
import :address;
import :backing;
import :descriptor;
import :error;
import :guard_file;
import :mapping;
import :region;
import :unmap;

namespace cppvmm {

std::unexpected<MemoryError> refuse_region(MemoryErrc code, GuestAddress start, std::uint64_t bytes,
                                           const char* operation, int os_error) {
  return std::unexpected(MemoryError{
      .code = code, .address = start.value(), .length = bytes, .os_error = os_error, .operation = operation});
}

std::unexpected<MemoryError> refuse_huge(GuestAddress start, std::uint64_t bytes, int error) {
  if (error == ENOMEM || error == EINVAL || error == ENOENT || error == ENODEV)
    return refuse_region(MemoryErrc::unavailable, start, bytes, "mmap of hugetlb pages: the host's pool has too few",
                         error);
  return refuse_region(MemoryErrc::os, start, bytes, "mmap of hugetlb pages", error);
}

MemoryResult<PageRange> checked_pages(GuestAddress start, std::uint64_t bytes, std::uint64_t unit,
                                      const char* operation) {
  if (bytes == 0 || bytes % unit != 0 || !start.is_aligned(page_size))
    return refuse_region(MemoryErrc::invalid_argument, start, bytes, operation);
  return PageRange::covering(start, bytes);
}

std::optional<Region::FileId> file_id(int fd) {
  struct stat status{};
  if (fstat(fd, &status) != 0) return std::nullopt;
  return Region::FileId{.device = status.st_dev, .inode = status.st_ino};
}

bool ends_at_guard_file(const Region& region) { return region.mapping_->ends_at_guard_file; }

std::uint64_t small_pages_proof(const Region& region) { return region.mapping_->small_pages_proof; }

int Region::Mapping::map_guarded(const HostMemory& memory) {
  constexpr std::uint64_t most = std::uint64_t{1} << 56;
  if (memory.bytes > most) return ENOMEM;
  const std::size_t size = memory.bytes + 2 * memory.alignment;
  const Descriptor guard = guard_file();
  constexpr int attempts = 16;
  for (int attempt = 1;; ++attempt) {
    void* space = guard.is_open() ? mmap(nullptr, size, PROT_NONE, MAP_SHARED, guard.number(), 0) : MAP_FAILED;
    ends_at_guard_file = space != MAP_FAILED;
    if (!ends_at_guard_file) space = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return errno;
    const auto base = reinterpret_cast<std::uintptr_t>(space);
    const std::uintptr_t aligned = (base + memory.alignment) & ~(memory.alignment - 1); // at least one page above base
    void* at = reinterpret_cast<void*>(aligned);
    // Not mapped over what is there: of a call that fails then, nobody knows whether that is gone (kernels differ).
    if (munmap(at, memory.bytes) != 0) {
      const int error = errno;
      unmap(space, size);
      return error;
    }
    void* mapped = mmap(at, memory.bytes, PROT_READ | PROT_WRITE, memory.flags | MAP_FIXED_NOREPLACE, memory.fd,
                        static_cast<off_t>(memory.offset));
    if (mapped == at) {
      reserved = space;
      reserved_bytes = size;
      host = mapped;
      // A core would have pages of a file that is not there, at these addresses.
      if (ends_at_guard_file) {
        const std::uintptr_t behind = aligned + memory.bytes;
        static_cast<void>(madvise(space, aligned - base, MADV_DONTDUMP));
        static_cast<void>(madvise(reinterpret_cast<void*>(behind), base + size - behind, MADV_DONTDUMP));
      }
      return 0;
    }
    const int error = mapped == MAP_FAILED ? errno : EEXIST;
    if (mapped != MAP_FAILED) unmap(mapped, memory.bytes); // a kernel that takes the address for a hint
    unmap(space, aligned - base);
    unmap(reinterpret_cast<void*>(aligned + memory.bytes), base + size - aligned - memory.bytes);
    // Another thread has mapped the gap meanwhile.
    if (error != EEXIST || attempt == attempts) return error;
  }
}

int advise_huge_pages(void* host, std::uint64_t bytes, HugePages use) {
  while (madvise(host, bytes, use == HugePages::never ? MADV_NOHUGEPAGE : MADV_HUGEPAGE) != 0)
    if (errno != EINTR) return errno;
  return 0;
}

} // namespace cppvmm
