module;
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <linux/magic.h>
#include <memory>
#include <optional>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <utility>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:adopt.impl;
import :address;
import :backing;
import :book_files;
import :descriptor;
import :error;
import :file_data;
import :mapping;
import :page_evidence;
import :proc_maps;
import :region;

// Regions of what is there already, a snapshot's file or an embedder's mapping: what it is has to be looked at, and
// some files are read.

namespace cppvmm {

/// The size of a hugetlbfs file's pages, in bytes; 0 of other files.
static std::uint64_t huge_page_of_file(int fd) {
  struct statfs system{};
  return fstatfs(fd, &system) == 0 && system.f_type == HUGETLBFS_MAGIC ? static_cast<std::uint64_t>(system.f_bsize) : 0;
}

/// Brings a file that nobody changes any more to where its data is looked for: 0, or errno.
static int sync_file(int fd) {
  if (fdatasync(fd) == 0) return 0;
  const int error = errno;
  // File systems that are only read (squashfs, erofs) have nothing to sync. Where the file's extents are the evidence,
  // what is only in the page cache could be missing among them.
  return (error == EINVAL || error == EROFS) && !shows_holes(fd) ? 0 : error;
}

/// What there is to know once of a file that nobody changes.
static std::shared_ptr<const FileData> read_once(const FilePart& part, std::uint64_t huge_page, RegionKind kind,
                                                 FileContent content) {
  if (kind != RegionKind::ram) return nullptr;
  if (huge_page != 0)
    return std::make_shared<const FileData>(read_hugetlb_file_data(part, huge_page, content.max_bytes));
  if (content.max_bytes == 0 || shows_holes(part.fd)) return nullptr;
  return std::make_shared<const FileData>(read_file_data(part, content.max_bytes));
}

MemoryResult<Region> Region::private_file(GuestAddress start, std::uint64_t bytes, int fd, std::uint64_t offset,
                                          RegionKind kind, FileContent content) {
  const auto pages = checked_pages(start, bytes, page_size, "Region::private_file");
  if (!pages) return std::unexpected(pages.error());
  const auto size = file_bytes(fd);
  if (!size) return refuse_region(MemoryErrc::os, start, bytes, "size of a snapshot", size.error());
  const std::uint64_t huge_page = huge_page_of_file(fd);
  if (huge_page != 0 && (offset % huge_page != 0 || bytes % huge_page != 0))
    return refuse_region(MemoryErrc::invalid_argument, start, bytes, "Region::private_file: not of whole huge pages");
  if (offset % page_size != 0 || offset > *size || bytes > *size - offset)
    return refuse_region(MemoryErrc::invalid_argument, start, bytes,
                         "Region::private_file: the file ends before the region");
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = huge_page != 0 ? Backing::hugetlb_private_file : Backing::private_file;
  mapping->huge_page = huge_page;
  mapping->fd_offset = offset;
  mapping->fd = Descriptor(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!mapping->fd.is_open())
    return refuse_region(MemoryErrc::os, start, bytes, "duplicate the snapshot's descriptor", errno);
  if (const int error = sync_file(mapping->fd.number()))
    return refuse_region(MemoryErrc::os, start, bytes, "fdatasync of a snapshot", error);
  // Huge pages are reserved, for a fault without a page left would be a SIGBUS.
  if (const int error = mapping->map_guarded({.bytes = bytes,
                                              .alignment = std::max(huge_alignment, huge_page),
                                              .flags = huge_page != 0 ? MAP_PRIVATE : MAP_PRIVATE | MAP_NORESERVE,
                                              .fd = mapping->fd.number(),
                                              .offset = offset})) {
    if (huge_page != 0) return refuse_huge(start, bytes, error);
    return refuse_region(MemoryErrc::os, start, bytes, "mmap of a snapshot", error);
  }
  mapping->file_data =
      read_once({.fd = mapping->fd.number(), .offset = offset, .bytes = bytes}, huge_page, kind, content);
  return Region(std::move(mapping));
}

/// The size of the huge pages behind adopted memory, in bytes; 0 when it cannot be told.
static std::uint64_t huge_page_of(const AdoptedMemory& memory) {
  std::uint64_t bytes = 0;
  const auto walked = for_each_mapping(reinterpret_cast<std::uintptr_t>(memory.host_address), memory.bytes,
                                       [&](const ProcMapping& mapping) {
                                         bytes = std::max(bytes, mapping.page_bytes);
                                         return true;
                                       });
  return walked && (bytes & (bytes - 1)) == 0 ? bytes : 0;
}

MemoryResult<Region> Region::adopt(GuestAddress start, const AdoptedMemory& memory, RegionKind kind) {
  const auto pages = checked_pages(start, memory.bytes, page_size, "Region::adopt");
  if (!pages) return std::unexpected(pages.error());
  const auto host = reinterpret_cast<std::uintptr_t>(memory.host_address);
  const std::uint64_t huge_page = memory.fd >= 0 ? huge_page_of_file(memory.fd) : 0;
  const Backing backing =
      memory.backing == Backing::private_file && huge_page != 0 ? Backing::hugetlb_private_file : memory.backing;
  const BackingTraits traits = traits_of(backing);
  if (host == 0 || host % page_size != 0 || host + memory.bytes < host || memory.fd_offset % page_size != 0 ||
      traits.has_file != (memory.fd >= 0))
    return refuse_region(MemoryErrc::invalid_argument, start, memory.bytes, "Region::adopt");
  if (auto fits = check_backing(
          {.memory = {.fd = memory.fd, .offset = memory.fd_offset, .host = memory.host_address, .bytes = memory.bytes},
           .backing = backing,
           .kind = kind});
      !fits)
    return std::unexpected(fits.error());
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = backing;
  mapping->is_adopted = true;
  mapping->host = memory.host_address;
  mapping->fd_offset = memory.fd_offset;
  if (traits.is_hugetlb) mapping->huge_page = huge_page_of(memory);
  if (memory.fd >= 0) {
    // A descriptor of its own: seeking in the embedder's would move the file offset that the embedder may use.
    // A guest_memfd cannot be opened anew, and has no file offset.
    mapping->fd = backing == Backing::guest_memfd ? Descriptor(fcntl(memory.fd, F_DUPFD_CLOEXEC, 0))
                                                  : open_again(memory.fd, O_RDONLY | O_CLOEXEC);
    if (!mapping->fd.is_open())
      return refuse_region(MemoryErrc::os, start, memory.bytes, "open of the adopted file through /proc/self/fd",
                           errno);
    if (!traits.is_private) {
      mapping->shared_file = file_id(mapping->fd.number());
      if (!mapping->shared_file)
        return refuse_region(MemoryErrc::os, start, memory.bytes, "fstat of the adopted file", errno);
      return Region(std::move(mapping));
    }
    if (const int error = sync_file(mapping->fd.number()))
      return refuse_region(MemoryErrc::os, start, memory.bytes, "fdatasync of a snapshot", error);
    mapping->file_data = read_once({.fd = mapping->fd.number(), .offset = memory.fd_offset, .bytes = memory.bytes},
                                   huge_page, kind, memory.content);
  }
  return Region(std::move(mapping));
}

} // namespace cppvmm
