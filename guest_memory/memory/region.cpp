module;
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <fcntl.h>
#include <linux/memfd.h>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
module cppvmm.guest_memory:region.impl;
import :address;
import :backing;
import :descriptor;
import :error;
import :mapping;
import :region;
import :region_use;

namespace cppvmm {

Region::Region(std::shared_ptr<const Mapping> mapping) : mapping_(std::move(mapping)) {}

MemoryResult<Region> Region::anonymous(GuestAddress start, std::uint64_t bytes, RegionKind kind) {
  const auto pages = checked_pages(start, bytes, page_size, "Region::anonymous");
  if (!pages) return std::unexpected(pages.error());
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = Backing::anonymous;
  // NORESERVE: most of a large guest is never touched; what is counts as any process's memory does.
  if (const int error = mapping->map_guarded(
          {.bytes = bytes, .alignment = huge_alignment, .flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE}))
    return refuse_region(MemoryErrc::os, start, bytes, "mmap of anonymous memory", error);
  return Region(std::move(mapping));
}

MemoryResult<Region> Region::memfd(GuestAddress start, std::uint64_t bytes, RegionKind kind) {
  const auto pages = checked_pages(start, bytes, page_size, "Region::memfd");
  if (!pages) return std::unexpected(pages.error());
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = Backing::memfd;
  mapping->fd = Descriptor(memfd_create("cppvmm-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!mapping->fd.is_open()) return refuse_region(MemoryErrc::os, start, bytes, "memfd_create", errno);
  if (ftruncate(mapping->fd.number(), static_cast<off_t>(bytes)) != 0)
    return refuse_region(MemoryErrc::os, start, bytes, "ftruncate of a memfd", errno);
  if (fcntl(mapping->fd.number(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return refuse_region(MemoryErrc::os, start, bytes, "F_ADD_SEALS on a memfd", errno);
  mapping->shared_file = file_id(mapping->fd.number());
  if (!mapping->shared_file) return refuse_region(MemoryErrc::os, start, bytes, "fstat of a memfd", errno);
  if (const int error = mapping->map_guarded({.bytes = bytes,
                                              .alignment = huge_alignment,
                                              .flags = MAP_SHARED | MAP_NORESERVE,
                                              .fd = mapping->fd.number()}))
    return refuse_region(MemoryErrc::os, start, bytes, "mmap of a memfd", error);
  return Region(std::move(mapping));
}

static unsigned huge_flag(HugePageSize page) { return page == HugePageSize::one_gib ? MFD_HUGE_1GB : MFD_HUGE_2MB; }

MemoryResult<Region> Region::hugetlb(GuestAddress start, std::uint64_t bytes, HugePageSize page, RegionKind kind) {
  const auto unit = static_cast<std::uint64_t>(page);
  const auto pages = checked_pages(start, bytes, unit, "Region::hugetlb");
  if (!pages) return std::unexpected(pages.error());
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = Backing::hugetlb;
  mapping->huge_page = unit;
  // mmap encodes the page size as memfd_create does. Reserved, for a fault without a page left would be a SIGBUS.
  if (const int error = mapping->map_guarded(
          {.bytes = bytes,
           .alignment = unit,
           .flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | static_cast<int>(huge_flag(page))}))
    return refuse_huge(start, bytes, error);
  return Region(std::move(mapping));
}

MemoryResult<Region> Region::hugetlb_memfd(GuestAddress start, std::uint64_t bytes, HugePageSize page,
                                           RegionKind kind) {
  const auto unit = static_cast<std::uint64_t>(page);
  const auto pages = checked_pages(start, bytes, unit, "Region::hugetlb_memfd");
  if (!pages) return std::unexpected(pages.error());
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = Backing::hugetlb_memfd;
  mapping->huge_page = unit;
  mapping->fd =
      Descriptor(memfd_create("cppvmm-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB | huge_flag(page)));
  if (!mapping->fd.is_open()) return refuse_huge(start, bytes, errno);
  if (ftruncate(mapping->fd.number(), static_cast<off_t>(bytes)) != 0)
    return refuse_region(MemoryErrc::os, start, bytes, "ftruncate of a hugetlb memfd", errno);
  if (fcntl(mapping->fd.number(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return refuse_region(MemoryErrc::os, start, bytes, "F_ADD_SEALS on a hugetlb memfd", errno);
  mapping->shared_file = file_id(mapping->fd.number());
  if (!mapping->shared_file) return refuse_region(MemoryErrc::os, start, bytes, "fstat of a hugetlb memfd", errno);
  if (const int error =
          mapping->map_guarded({.bytes = bytes, .alignment = unit, .flags = MAP_SHARED, .fd = mapping->fd.number()}))
    return refuse_huge(start, bytes, error);
  return Region(std::move(mapping));
}

PageRange Region::pages() const { return mapping_->pages; }
RegionUse Region::use() const { return mapping_->end.use(); }
RegionKind Region::kind() const { return mapping_->kind; }
Backing Region::backing() const { return mapping_->backing; }
std::uint64_t Region::page_bytes() const { return std::max<std::uint64_t>(mapping_->huge_page, page_size); }
bool Region::is_adopted() const { return mapping_->is_adopted; }
void* Region::host_address() const { return mapping_->host; }
int Region::file_descriptor() const { return mapping_->fd.number(); }
std::uint64_t Region::file_offset() const { return mapping_->fd_offset; }

std::optional<Region::FileId> Region::shared_file_id() const { return mapping_->shared_file; }

// include/uapi/asm-generic/mman-common.h (Linux 5.14), which the headers of older distributions may lack.
constexpr int advice_populate_write = 23;

static int advice_for(PageUse use) {
  switch (use) {
  case PageUse::cold:
    return MADV_COLD;
  case PageUse::page_out:
    return MADV_PAGEOUT;
  case PageUse::will_need:
    return MADV_WILLNEED;
  case PageUse::populate:
    break;
  }
  return advice_populate_write;
}

MemoryResult<void> Region::advise(PageRange range, PageUse use) const {
  const auto refuse = [&](MemoryErrc code, int os_error) {
    return refuse_region(code, range.start_address(), range.bytes(), "Region::advise", os_error);
  };
  if (range.empty()) return {};
  if (range.first() < pages().first() || pages().end() < range.end()) return refuse(MemoryErrc::not_backed, 0);
  auto* const host = static_cast<std::byte*>(host_address()) + (range.start_address().value() - start().value());
  while (madvise(host, range.bytes(), advice_for(use)) != 0)
    // EBADF: MADV_WILLNEED of a kernel without swap (mm/madvise.c, madvise_willneed).
    if (errno != EINTR)
      return refuse(errno == EINVAL || errno == EBADF ? MemoryErrc::unavailable : MemoryErrc::os, errno);
  return {};
}

MemoryResult<void> Region::start_recording() const {
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
  // Two would take each other's bits away.
  if (mapping_->has_recorder.exchange(true))
    return refuse_region(MemoryErrc::invalid_argument, start(), bytes(), "begin a write log where one is kept already");
  const auto failed = [&](const char* operation) {
    const int error = errno;
    mapping_->has_recorder.store(false);
    return refuse_region(MemoryErrc::os, start(), bytes(), operation, error);
  };
  const std::size_t size = mapping_->recorded_bytes();
  void* bits = mapping_->recorded.load(std::memory_order_acquire);
  if (bits == nullptr) {
    // Not from the heap: most of it is never written, and so takes no memory.
    bits = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bits == MAP_FAILED) return failed("mmap of a record of writes");
    mapping_->recorded.store(static_cast<std::atomic<std::uint64_t>*>(bits), std::memory_order_release);
  } else if (madvise(bits, size, MADV_DONTNEED) != 0) {
    return failed("madvise of a record of writes");
  }
  mapping_->is_recording.store(true, std::memory_order_seq_cst);
  return {};
}

void Region::stop_recording() const {
  mapping_->is_recording.store(false, std::memory_order_seq_cst);
  mapping_->has_recorder.store(false);
}

void Region::record_write(std::uint64_t offset, std::uint64_t bytes) const {
  if (!mapping_->is_recording.load(std::memory_order_acquire) || bytes == 0) return;
  std::atomic<std::uint64_t>* const bits = mapping_->recorded.load(std::memory_order_relaxed);
  const std::uint64_t last = (offset + bytes - 1) / page_size;
  for (std::uint64_t page = offset / page_size; page <= last; ++page) {
    std::atomic<std::uint64_t>& word = bits[page / 64];
    const std::uint64_t bit = std::uint64_t{1} << (page % 64);
    // Most writes are to pages that were written before.
    if ((word.load(std::memory_order_relaxed) & bit) == 0) word.fetch_or(bit, std::memory_order_seq_cst);
  }
}

std::span<const std::atomic<std::uint64_t>> Region::recorded_writes() const {
  const std::atomic<std::uint64_t>* bits = mapping_->recorded.load(std::memory_order_acquire);
  return {bits, bits == nullptr ? 0 : mapping_->recorded_words()};
}

MemoryResult<void> Region::populate() const {
  // In parts: the kernel holds the address space's lock for each.
  constexpr std::uint64_t at_a_time = std::uint64_t{64} << 20;
  for (std::uint64_t done = 0; done < bytes();) {
    const std::uint64_t part = std::min(at_a_time, bytes() - done);
    if (madvise(static_cast<std::byte*>(host_address()) + done, part, advice_populate_write) == 0) {
      done += part;
      continue;
    }
    if (errno == EINTR || errno == EAGAIN) continue;
    const MemoryErrc code = errno == EINVAL ? MemoryErrc::unavailable : MemoryErrc::os;
    auto refused = refuse_region(code, start(), bytes(), "MADV_POPULATE_WRITE", errno);
    refused.error().completed = done;
    return refused;
  }
  return {};
}

} // namespace cppvmm
