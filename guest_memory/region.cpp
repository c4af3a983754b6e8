module;
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <linux/magic.h>
#include <linux/memfd.h>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <utility>
module cppvmm.guest_memory:region.impl;
import :address;
import :book_files;
import :descriptor;
import :discard;
import :error;
import :evidence;
import :extents;
import :file_data;
import :guest_copy;
import :proc_maps;
import :region;
import :region_use;
import :survey;
import :unmap;

namespace cppvmm {

struct Region::Mapping {
  RegionEnd end; // first, for it is over last
  PageRange pages;
  RegionKind kind = RegionKind::ram;
  Backing backing = Backing::anonymous;
  bool is_adopted = false;
  void* host = nullptr;
  // What to unmap: more than the memory itself, for it has guard pages around it. Null for adopted memory.
  void* reserved = nullptr;
  std::size_t reserved_bytes = 0;
  Descriptor fd;
  std::uint64_t fd_offset = 0;
  std::optional<FileId> shared_file;
  // Pages that the accessors wrote while recording was on, one bit each. The bits stay until the mapping goes, so that
  // an accessor never meets freed memory.
  mutable std::atomic<std::atomic<std::uint64_t>*> recorded = nullptr;
  mutable std::atomic<bool> is_recording = false;
  mutable std::atomic<bool> has_recorder = false;
  std::uint64_t huge_page = 0; // of hugetlb kinds, in bytes; 0 where it is not known
  mutable ReplacedPages replaced;
  std::optional<FileData> file_data; // of a private file that was read

  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (reserved != nullptr) unmap(reserved, reserved_bytes);
    if (void* bits = recorded.load(std::memory_order_relaxed); bits != nullptr) unmap(bits, recorded_bytes());
  }
  [[nodiscard]] std::size_t recorded_words() const { return (pages.count() + 63) / 64; }
  [[nodiscard]] std::size_t recorded_bytes() const { return recorded_words() * sizeof(std::uint64_t); }
};

static std::unexpected<MemoryError> refuse(MemoryErrc code, GuestAddress start, std::uint64_t bytes,
                                           const char* operation, int os_error = 0) {
  return std::unexpected(MemoryError{
      .code = code, .address = start.value(), .length = bytes, .os_error = os_error, .operation = operation});
}

static bool is_hugetlb(Backing backing) {
  return backing == Backing::hugetlb || backing == Backing::hugetlb_memfd || backing == Backing::hugetlb_private_file;
}

/// Nothing, and errno, where it cannot be told: two regions of the same file would not be noticed.
static std::optional<Region::FileId> file_id(int fd) {
  struct stat status{};
  if (fstat(fd, &status) != 0) return std::nullopt;
  return Region::FileId{.device = status.st_dev, .inode = status.st_ino};
}

static MemoryResult<PageRange> checked_pages(GuestAddress start, std::uint64_t bytes, std::uint64_t unit,
                                             const char* operation) {
  if (bytes == 0 || bytes % unit != 0 || !start.is_aligned(page_size))
    return refuse(MemoryErrc::invalid_argument, start, bytes, operation);
  return PageRange::covering(start, bytes);
}

// Maps `bytes` at an address that is a multiple of `alignment`, with an inaccessible page on either side: guard pages
// catch overruns, and keep the kernel from joining the mapping with a neighbour, which smaps could not tell apart.
static int map_guarded(void*& reserved, std::size_t& reserved_bytes, void*& host, std::uint64_t bytes,
                       std::uint64_t alignment, int flags, int fd, std::uint64_t offset = 0) {
  constexpr std::uint64_t most = std::uint64_t{1} << 56;
  if (bytes > most) return ENOMEM;
  const std::size_t size = bytes + 2 * alignment;
  constexpr int attempts = 16;
  for (int attempt = 1;; ++attempt) {
    void* space = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return errno;
    const auto base = reinterpret_cast<std::uintptr_t>(space);
    const std::uintptr_t aligned = (base + alignment) & ~(alignment - 1); // at least one page above base
    void* at = reinterpret_cast<void*>(aligned);
    // Not mapped over what is there: of a call that fails then, nobody knows whether that is gone (kernels differ).
    if (munmap(at, bytes) != 0) {
      const int error = errno;
      unmap(space, size);
      return error;
    }
    void* mapped = mmap(at, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED_NOREPLACE, fd, static_cast<off_t>(offset));
    if (mapped == at) {
      reserved = space;
      reserved_bytes = size;
      host = mapped;
      return 0;
    }
    const int error = mapped == MAP_FAILED ? errno : EEXIST;
    if (mapped != MAP_FAILED) unmap(mapped, bytes); // a kernel that takes the address for a hint
    unmap(space, aligned - base);
    unmap(reinterpret_cast<void*>(aligned + bytes), base + size - aligned - bytes);
    // Another thread has mapped the gap meanwhile.
    if (error != EEXIST || attempt == attempts) return error;
  }
}

// Guest-physical and host address agree below 2 MiB, so that KVM can map huge pages whole.
constexpr std::uint64_t huge_alignment = std::uint64_t{2} << 20;

Region::Region(std::shared_ptr<const Mapping> mapping) : mapping_(std::move(mapping)) {}

MemoryResult<Region> Region::anonymous(GuestAddress start, std::uint64_t bytes, RegionKind kind) {
  const auto pages = checked_pages(start, bytes, page_size, "Region::anonymous");
  if (!pages) return std::unexpected(pages.error());
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = Backing::anonymous;
  // NORESERVE: most of a large guest is never touched; what is counts as any process's memory does.
  if (const int error = map_guarded(mapping->reserved, mapping->reserved_bytes, mapping->host, bytes, huge_alignment,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1))
    return refuse(MemoryErrc::os, start, bytes, "mmap of anonymous memory", error);
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
  if (!mapping->fd.is_open()) return refuse(MemoryErrc::os, start, bytes, "memfd_create", errno);
  if (ftruncate(mapping->fd.number(), static_cast<off_t>(bytes)) != 0)
    return refuse(MemoryErrc::os, start, bytes, "ftruncate of a memfd", errno);
  if (fcntl(mapping->fd.number(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return refuse(MemoryErrc::os, start, bytes, "F_ADD_SEALS on a memfd", errno);
  mapping->shared_file = file_id(mapping->fd.number());
  if (!mapping->shared_file) return refuse(MemoryErrc::os, start, bytes, "fstat of a memfd", errno);
  if (const int error = map_guarded(mapping->reserved, mapping->reserved_bytes, mapping->host, bytes, huge_alignment,
                                    MAP_SHARED | MAP_NORESERVE, mapping->fd.number()))
    return refuse(MemoryErrc::os, start, bytes, "mmap of a memfd", error);
  return Region(std::move(mapping));
}

static unsigned huge_flag(HugePageSize page) { return page == HugePageSize::one_gib ? MFD_HUGE_1GB : MFD_HUGE_2MB; }

/// Without guard pages: each hugetlb mapping has a file of its own, and so is never joined with a neighbour.
template <class Mapping>
static int map_huge(Mapping& mapping, std::uint64_t bytes, int flags, int fd) {
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (mapped == MAP_FAILED) return errno;
  mapping.host = mapping.reserved = mapped;
  mapping.reserved_bytes = bytes;
  return 0;
}

static std::unexpected<MemoryError> refuse_huge(GuestAddress start, std::uint64_t bytes, int error) {
  if (error == ENOMEM || error == EINVAL || error == ENOENT || error == ENODEV)
    return refuse(MemoryErrc::unavailable, start, bytes, "mmap of hugetlb pages: the host's pool has too few", error);
  return refuse(MemoryErrc::os, start, bytes, "mmap of hugetlb pages", error);
}

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
  if (const int error =
          map_huge(*mapping, bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | static_cast<int>(huge_flag(page)), -1))
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
    return refuse(MemoryErrc::os, start, bytes, "ftruncate of a hugetlb memfd", errno);
  if (fcntl(mapping->fd.number(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return refuse(MemoryErrc::os, start, bytes, "F_ADD_SEALS on a hugetlb memfd", errno);
  mapping->shared_file = file_id(mapping->fd.number());
  if (!mapping->shared_file) return refuse(MemoryErrc::os, start, bytes, "fstat of a hugetlb memfd", errno);
  if (const int error = map_guarded(mapping->reserved, mapping->reserved_bytes, mapping->host, bytes, unit, MAP_SHARED,
                                    mapping->fd.number()))
    return refuse_huge(start, bytes, error);
  return Region(std::move(mapping));
}

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
static std::optional<FileData> read_once(const FilePart& part, std::uint64_t huge_page, RegionKind kind,
                                         FileContent content) {
  if (kind != RegionKind::ram) return std::nullopt;
  if (huge_page != 0) return read_hugetlb_file_data(part, huge_page, content.max_bytes);
  if (content.max_bytes == 0 || shows_holes(part.fd)) return std::nullopt;
  return read_file_data(part, content.max_bytes);
}

MemoryResult<Region> Region::private_file(GuestAddress start, std::uint64_t bytes, int fd, std::uint64_t offset,
                                          RegionKind kind, FileContent content) {
  const auto pages = checked_pages(start, bytes, page_size, "Region::private_file");
  if (!pages) return std::unexpected(pages.error());
  const auto size = file_bytes(fd);
  if (!size) return refuse(MemoryErrc::os, start, bytes, "size of a snapshot", size.error());
  const std::uint64_t huge_page = huge_page_of_file(fd);
  if (huge_page != 0 && (offset % huge_page != 0 || bytes % huge_page != 0))
    return refuse(MemoryErrc::invalid_argument, start, bytes, "Region::private_file: not of whole huge pages");
  if (offset % page_size != 0 || offset > *size || bytes > *size - offset)
    return refuse(MemoryErrc::invalid_argument, start, bytes, "Region::private_file: the file ends before the region");
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = huge_page != 0 ? Backing::hugetlb_private_file : Backing::private_file;
  mapping->huge_page = huge_page;
  mapping->fd_offset = offset;
  mapping->fd = Descriptor(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!mapping->fd.is_open()) return refuse(MemoryErrc::os, start, bytes, "duplicate the snapshot's descriptor", errno);
  if (const int error = sync_file(mapping->fd.number()))
    return refuse(MemoryErrc::os, start, bytes, "fdatasync of a snapshot", error);
  // Huge pages are reserved, for a fault without a page left would be a SIGBUS.
  if (const int error = map_guarded(
          mapping->reserved, mapping->reserved_bytes, mapping->host, bytes, std::max(huge_alignment, huge_page),
          huge_page != 0 ? MAP_PRIVATE : MAP_PRIVATE | MAP_NORESERVE, mapping->fd.number(), offset)) {
    if (huge_page != 0) return refuse_huge(start, bytes, error);
    return refuse(MemoryErrc::os, start, bytes, "mmap of a snapshot", error);
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
  const bool is_private_file = backing == Backing::private_file || backing == Backing::hugetlb_private_file;
  const bool wants_file = backing == Backing::memfd || backing == Backing::hugetlb_memfd || is_private_file ||
                          backing == Backing::shared_file || backing == Backing::guest_memfd;
  if (host == 0 || host % page_size != 0 || host + memory.bytes < host || memory.fd_offset % page_size != 0 ||
      wants_file != (memory.fd >= 0))
    return refuse(MemoryErrc::invalid_argument, start, memory.bytes, "Region::adopt");
  if (auto fits = check_backing(
          {.fd = memory.fd, .offset = memory.fd_offset, .host = memory.host_address, .bytes = memory.bytes}, backing,
          kind);
      !fits)
    return std::unexpected(fits.error());
  auto mapping = std::make_shared<Mapping>();
  mapping->pages = *pages;
  mapping->kind = kind;
  mapping->backing = backing;
  mapping->is_adopted = true;
  mapping->host = memory.host_address;
  mapping->fd_offset = memory.fd_offset;
  if (is_hugetlb(backing)) mapping->huge_page = huge_page_of(memory);
  if (memory.fd >= 0) {
    // A descriptor of its own: seeking in the embedder's would move the file offset that the embedder may use.
    // A guest_memfd cannot be opened anew, and has no file offset.
    mapping->fd = backing == Backing::guest_memfd ? Descriptor(fcntl(memory.fd, F_DUPFD_CLOEXEC, 0))
                                                  : open_again(memory.fd, O_RDONLY | O_CLOEXEC);
    if (!mapping->fd.is_open())
      return refuse(MemoryErrc::os, start, memory.bytes, "open of the adopted file through /proc/self/fd", errno);
    if (!is_private_file) {
      mapping->shared_file = file_id(mapping->fd.number());
      if (!mapping->shared_file) return refuse(MemoryErrc::os, start, memory.bytes, "fstat of the adopted file", errno);
      return Region(std::move(mapping));
    }
    if (const int error = sync_file(mapping->fd.number()))
      return refuse(MemoryErrc::os, start, memory.bytes, "fdatasync of a snapshot", error);
    mapping->file_data = read_once({.fd = mapping->fd.number(), .offset = memory.fd_offset, .bytes = memory.bytes},
                                   huge_page, kind, memory.content);
  }
  return Region(std::move(mapping));
}

const char* to_string(Backing backing) {
  switch (backing) {
  case Backing::anonymous:
    return "anonymous";
  case Backing::memfd:
    return "memfd";
  case Backing::shared_anonymous:
    return "shared_anonymous";
  case Backing::hugetlb:
    return "hugetlb";
  case Backing::hugetlb_memfd:
    return "hugetlb_memfd";
  case Backing::private_file:
    return "private_file";
  case Backing::hugetlb_private_file:
    return "hugetlb_private_file";
  case Backing::shared_file:
    return "shared_file";
  case Backing::guest_memfd:
    return "guest_memfd";
  case Backing::unknown:
    return "unknown";
  }
  return "unknown";
}

const FileData* FileData::of(const Region& region) {
  const auto& data = region.mapping_->file_data;
  return data ? &*data : nullptr;
}

PageRange Region::pages() const { return mapping_->pages; }
RegionUse Region::use() const { return mapping_->end.use(); }
RegionKind Region::kind() const { return mapping_->kind; }
Backing Region::backing() const { return mapping_->backing; }
bool Region::is_adopted() const { return mapping_->is_adopted; }
void* Region::host_address() const { return mapping_->host; }
int Region::file_descriptor() const { return mapping_->fd.number(); }
std::uint64_t Region::file_offset() const { return mapping_->fd_offset; }

std::optional<Region::FileId> Region::shared_file_id() const { return mapping_->shared_file; }

MemoryResult<void> Region::start_recording() const {
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
  // Two would take each other's bits away.
  if (mapping_->has_recorder.exchange(true))
    return refuse(MemoryErrc::invalid_argument, start(), bytes(), "begin a write log where one is kept already");
  const auto failed = [&](const char* operation) {
    const int error = errno;
    mapping_->has_recorder.store(false);
    return refuse(MemoryErrc::os, start(), bytes(), operation, error);
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

MemoryResult<std::uint64_t> Region::resident_bytes() const {
  if (is_adopted()) {
    if (is_hugetlb(backing())) {
      const auto resident = hugetlb_resident(host_address(), bytes());
      if (!resident) return std::unexpected(resident.error());
      return resident->page_count() * page_size;
    }
    const auto pages = page_table_evidence(host_address(), bytes(), PageEntries::all, EvidenceSource::automatic);
    if (pages.error) return std::unexpected(*pages.error);
    std::uint64_t count = 0;
    for (const ExtentList& list : pages.touched)
      count += list.page_count();
    return count * page_size;
  }
  if (!is_adopted() && (backing() == Backing::memfd || backing() == Backing::hugetlb_memfd)) {
    struct stat status{};
    if (fstat(file_descriptor(), &status) != 0)
      return refuse(MemoryErrc::os, start(), bytes(), "fstat of a memfd", errno);
    return static_cast<std::uint64_t>(status.st_blocks) * 512;
  }
  return sum_smaps(reinterpret_cast<std::uintptr_t>(host_address()), bytes(), [](std::string_view field) {
    return field == "Rss" || field == "Private_Hugetlb" || field == "Shared_Hugetlb";
  });
}

MemoryResult<std::uint64_t> Region::huge_page_bytes() const {
  return sum_smaps(reinterpret_cast<std::uintptr_t>(host_address()), bytes(),
                   [](std::string_view field) { return field == "AnonHugePages" || field == "ShmemPmdMapped"; });
}

MemoryResult<Discarded> Region::discard(PageRange range) const {
  const auto refuse_range = [&](MemoryErrc code) {
    return refuse(code, range.start_address(), range.bytes(), "Region::discard");
  };
  if (range.empty()) return Discarded{};
  if (range.first() < pages().first() || pages().end() < range.end()) return refuse_range(MemoryErrc::not_backed);
  if (kind() == RegionKind::rom) return refuse_range(MemoryErrc::read_only);
  if (backing() == Backing::unknown) return refuse_range(MemoryErrc::unavailable);
  const std::uint64_t offset = range.start_address().value() - start().value();
  const DiscardTarget target{
      .memory = {.fd = mapping_->fd.number(),
                 .offset = mapping_->fd_offset + offset,
                 .host = static_cast<std::byte*>(mapping_->host) + offset,
                 .bytes = range.bytes()},
      .region = {.fd = mapping_->fd.number(), .offset = mapping_->fd_offset, .host = mapping_->host, .bytes = bytes()},
      .backing = backing(),
      .is_fd_writable = !is_adopted(),
      .huge_page = mapping_->huge_page,
      .reach = reach_of(is_adopted())};
  auto done = [&] {
    if (backing() == Backing::private_file) return discard_private_file(target, range, mapping_->replaced);
    if (backing() == Backing::hugetlb_private_file)
      return discard_hugetlb_private_file(target, FileData::of(*this)->pages);
    return discard_memory(target);
  }();
  if (!done) {
    // It knows host addresses alone.
    const auto host = reinterpret_cast<std::uintptr_t>(mapping_->host);
    done.error().address = start().value() + (done.error().address - host);
  }
  return done;
}

// include/uapi/asm-generic/mman-common.h (Linux 5.14), which the headers of older distributions may lack.
constexpr int advice_populate_write = 23;

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
    auto refused = refuse(code, start(), bytes(), "MADV_POPULATE_WRITE", errno);
    refused.error().completed = done;
    return refused;
  }
  return {};
}

MemoryResult<void> Region::set_huge_pages(HugePages use) const {
  const auto fail = [&](MemoryErrc code, int os_error) {
    return refuse(code, start(), bytes(), "Region::set_huge_pages", os_error);
  };
  switch (backing()) {
  case Backing::anonymous:
  case Backing::memfd:
  case Backing::shared_anonymous:
  case Backing::private_file:
    break;
  default:
    return fail(MemoryErrc::unavailable, 0);
  }
  const std::lock_guard lock(mapping_->replaced.mutex);
  if (const int error = advise_huge_pages(host_address(), bytes(), use))
    return fail(error == EINVAL ? MemoryErrc::unavailable : MemoryErrc::os, error);
  mapping_->replaced.huge_pages = use;
  return {};
}

} // namespace cppvmm
