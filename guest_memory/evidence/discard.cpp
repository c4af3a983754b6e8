module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <mutex>
#include <optional>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:discard.impl;
import :address;
import :backing;
import :book_files;
import :descriptor;
import :discard;
import :error;
import :evidence;
import :file_data;
import :guest_copy;
import :mapping;
import :page_evidence;
import :page_set;
import :proc_maps;
import :region;

namespace cppvmm {

// include/uapi/asm-generic/mman-common.h (Linux 5.18), which the headers of older distributions lack.
constexpr int advice_dontneed_locked = 24;
static constexpr int advice_populate = 23; // MADV_POPULATE_WRITE, Linux 5.14

static std::unexpected<MemoryError> refuse(const FileMapping& part, const char* operation, int os_error,
                                           MemoryErrc code = MemoryErrc::os) {
  return std::unexpected(MemoryError{.code = code,
                                     .address = reinterpret_cast<std::uintptr_t>(part.host),
                                     .length = part.bytes,
                                     .os_error = os_error,
                                     .operation = operation});
}

static std::byte* host_of(const FileMapping& part) { return static_cast<std::byte*>(const_cast<void*>(part.host)); }

/// `bytes` of it, from `offset` on.
static FileMapping part_of(const FileMapping& memory, std::uint64_t offset, std::uint64_t bytes) {
  return {.fd = memory.fd, .offset = memory.offset + offset, .host = host_of(memory) + offset, .bytes = bytes};
}

static DiscardTarget part_of(const DiscardTarget& target, std::uint64_t offset, std::uint64_t bytes) {
  DiscardTarget part = target;
  part.memory = part_of(target.memory, offset, bytes);
  return part;
}

static Discarded sum(Discarded left, Discarded right) {
  return {.freed_pages = left.freed_pages + right.freed_pages,
          .cleared_pages = left.cleared_pages + right.cleared_pages,
          .kept_pages = left.kept_pages + right.kept_pages};
}

static int advise(const FileMapping& part, int advice) {
  while (madvise(host_of(part), part.bytes, advice) != 0)
    if (errno != EINTR) return errno;
  return 0;
}

/// Stores zeros, unless a page of it was lost to a memory error, for which a plain store would be a SIGBUS.
static MemoryResult<void> clear_pages(const FileMapping& part, GuestReach reach) {
  // Whatever else it refuses, and kernels that do not know it, leave the store as it would have been.
  if (reach == GuestReach::plain && advise(part, advice_populate) == EHWPOISON)
    return refuse(part, "clear memory that was lost to a memory error", EHWPOISON, MemoryErrc::inaccessible);
  if (const GuestAccess cleared = clear_guest(reach, host_of(part), part.bytes); cleared.error != 0)
    return refuse(part_of(part, cleared.done, part.bytes - cleared.done), "clear memory", cleared.error,
                  cleared.code());
  return {};
}

/// Clears the pages for which the file has other bytes than zeros, and touches no others.
static MemoryResult<Discarded> clear_by_file(const FileMapping& part, GuestReach reach) {
  alignas(8) std::array<std::uint64_t, 65536 / sizeof(std::uint64_t)> buffer;
  constexpr std::uint64_t words_per_page = page_size / sizeof(std::uint64_t);
  Discarded done;
  for (std::uint64_t at = 0; at < part.bytes;) {
    const std::uint64_t wanted = std::min<std::uint64_t>(sizeof buffer, part.bytes - at);
    const ssize_t got = pread(part.fd, buffer.data(), wanted, static_cast<off_t>(part.offset + at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return refuse(part, "pread of memory to clear", errno);
    const std::uint64_t pages = static_cast<std::uint64_t>(got) / page_size;
    if (pages == 0) return refuse(part, "clear memory: its file ends before it", 0, MemoryErrc::wrong_nature);
    for (std::uint64_t page = 0; page < pages; ++page) {
      const auto* const first = buffer.data() + page * words_per_page;
      if (std::all_of(first, first + words_per_page, [](std::uint64_t word) { return word == 0; })) {
        ++done.freed_pages;
      } else {
        if (auto cleared = clear_pages(part_of(part, at + page * page_size, page_size), reach); !cleared)
          return std::unexpected(cleared.error());
        ++done.cleared_pages;
      }
    }
    at += pages * page_size;
  }
  return done;
}

/// Who may have part of it in hand.
struct Holders {
  bool any = false;   ///< A userfaultfd, in whatever mode.
  bool fills = false; ///< One whose handler fills pages that are missing.
};

/// All that cannot be ruled out.
static Holders holders_of(const FileMapping& part) {
  Holders holders;
  const auto walked =
      for_each_mapping(reinterpret_cast<std::uintptr_t>(part.host), part.bytes, [&](const ProcMapping& mapping) {
        holders.any = holders.any || mapping.is_held;
        holders.fills = holders.fills || mapping.is_filled_on_demand;
        return true;
      });
  return walked ? holders : Holders{.any = true, .fills = true};
}

static MemoryResult<Discarded> clear_all(const FileMapping& part, GuestReach reach) {
  if (auto cleared = clear_pages(part, reach); !cleared) return std::unexpected(cleared.error());
  return Discarded{.cleared_pages = part.bytes / page_size};
}

/// What has no entry in this process's page tables, and so must be found otherwise.
static MemoryResult<Discarded> clear_unmapped(const DiscardTarget& target, bool is_filled_on_demand) {
  const FileMapping& part = target.memory;
  // What is missing would read what a handler brings. And of shared anonymous memory and a guest_memfd, which others
  // may have written, there is no file to look into.
  const BackingTraits traits = traits_of(target.backing);
  if (is_filled_on_demand || (!traits.is_private && !traits.has_readable_file)) return clear_all(part, target.reach);
  if (part.fd >= 0) return clear_by_file(part, target.reach);
  return Discarded{.freed_pages = part.bytes / page_size};
}

/// What is there, by own page tables.
static std::optional<ExtentList> occupied(const DiscardTarget& target) {
  const FileMapping& memory = target.memory;
  if (traits_of(target.backing).is_hugetlb) {
    auto found = hugetlb_occupied(target.region, memory.host, memory.bytes);
    return found ? std::optional(std::move(*found)) : std::nullopt;
  }
  RegionEvidence mapped = page_table_evidence(memory.host, memory.bytes, PageEntries::all, EvidenceSource::automatic);
  if (mapped.kind == Evidence::none || mapped.touched.size() != 1) return std::nullopt;
  return std::move(mapped.touched.front());
}

/// Overwrites what is there with zeros, if it may. What is not there stays so, as far as that can be told: a store
/// would have the host allocate it.
static MemoryResult<Discarded> clear(const DiscardTarget& target) {
  const FileMapping& memory = target.memory;
  if (target.mode == DiscardMode::free_only) return Discarded{.kept_pages = memory.bytes / page_size};
  const auto mapped = occupied(target);
  if (!mapped) return clear_all(memory, target.reach);
  Discarded done;
  std::uint64_t at = 0;
  std::optional<bool> is_filled; // found out once for all gaps: a guest decides how many there are
  const auto clear_gap = [&](std::uint64_t end) -> MemoryResult<void> {
    if (end <= at) return {};
    // No handler fills files on disks.
    if (!is_filled) is_filled = !traits_of(target.backing).is_on_disk && holders_of(memory).fills;
    const auto gap = clear_unmapped(part_of(target, at * page_size, (end - at) * page_size), *is_filled);
    if (!gap) return std::unexpected(gap.error());
    done = sum(done, *gap);
    return {};
  };
  for (const Extent extent : *mapped) {
    if (auto gap = clear_gap(extent.first); !gap) return std::unexpected(gap.error());
    const auto cleared = clear_all(part_of(memory, extent.first * page_size, extent.count * page_size), target.reach);
    if (!cleared) return cleared;
    done = sum(done, *cleared);
    at = extent.end();
  }
  if (auto gap = clear_gap(memory.bytes / page_size); !gap) return std::unexpected(gap.error());
  return done;
}

static int punch_hole(int fd, const FileMapping& part) {
  while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(part.offset),
                   static_cast<off_t>(part.bytes)) != 0)
    if (errno != EINTR) return errno;
  return 0;
}

/// MADV_REMOVE tells a userfaultfd that holds the memory, whose handler would bring back what it was before; and it
/// refuses locked memory. A hole that is punched through a descriptor does neither.
static int remove_from_file(const DiscardTarget& target) {
  const FileMapping& part = target.memory;
  const int refused = advise(part, MADV_REMOVE);
  // Who holds it takes a look at all that is mapped, for each range of a list that a guest makes.
  if (refused == 0 || part.fd < 0 || target.mode == DiscardMode::free_only || holders_of(part).any) return refused;
  if (target.is_fd_writable) return punch_hole(part.fd, part);
  const Descriptor writable = open_again(part.fd, O_RDWR | O_CLOEXEC);
  return writable.is_open() ? punch_hole(writable.number(), part) : refused;
}

/// Of this process: private memory is gone then, shared memory stays where it is.
static int drop_mapped(const FileMapping& part) {
  const int error = advise(part, MADV_DONTNEED);
  return error == EINVAL ? advise(part, advice_dontneed_locked) : error;
}

/// A hole takes the pages out of the file, and their entries out of the page tables, but for the entries of pages that
/// were lost to a memory error: an access there is a SIGBUS for as long as they stay. What has an entry all the same
/// loses it, and is looked up in the file at the next access.
static int drop_entries(const FileMapping& part) {
  const RegionEvidence left = page_table_evidence(part.host, part.bytes, PageEntries::all, EvidenceSource::automatic);
  const bool is_empty = left.kind != Evidence::none &&
                        std::ranges::all_of(left.touched, [](const ExtentList& list) { return list.empty(); });
  return is_empty ? 0 : drop_mapped(part);
}

/// Whether the call does not do this here, so that clearing is left; not that there is no memory at all.
static bool is_refusal(int error) {
  return error == EINVAL || error == EPERM || error == EACCES || error == EBADF || error == EOPNOTSUPP ||
         error == ENODEV || error == ENOSYS || error == EROFS || error == ETXTBSY;
}

static MemoryResult<Discarded> discard_whole(const DiscardTarget& target) {
  const bool is_private = traits_of(target.backing).is_private;
  int error = is_private ? drop_mapped(target.memory) : remove_from_file(target);
  if (error == 0 && !is_private) error = drop_entries(target.memory);
  if (error == 0) return Discarded{.freed_pages = target.memory.bytes / page_size};
  if (is_refusal(error)) return clear(target);
  return refuse(target.memory, is_private ? "MADV_DONTNEED" : "MADV_REMOVE", error);
}

MemoryResult<Discarded> discard_memory(const DiscardTarget& target) {
  const FileMapping& memory = target.memory;
  if (memory.bytes == 0) return Discarded{};
  if (!traits_of(target.backing).is_hugetlb) return discard_whole(target);
  if (target.huge_page == 0) return clear(target);
  // MADV_DONTNEED says that it has discarded a part of a huge page, and does nothing (measured on Linux 6.18); a hole
  // that is punched in one clears it, but not before Linux 6.0.
  const auto start = reinterpret_cast<std::uintptr_t>(memory.host);
  const std::uint64_t mask = target.huge_page - 1;
  const std::uint64_t head = std::min(memory.bytes, (target.huge_page - (start & mask)) & mask);
  const std::uint64_t whole = (memory.bytes - head) & ~mask;
  const std::uint64_t tail = memory.bytes - head - whole;
  Discarded done;
  const auto add = [&](const MemoryResult<Discarded>& part) {
    if (part) done = sum(done, *part);
    return part.has_value();
  };
  if (head > 0)
    if (const auto part = clear(part_of(target, 0, head)); !add(part)) return part;
  if (whole > 0)
    if (const auto part = discard_whole(part_of(target, head, whole)); !add(part)) return part;
  if (tail > 0)
    if (const auto part = clear(part_of(target, head + whole, tail)); !add(part)) return part;
  return done;
}

static DiscardTarget target_of(const DiscardTarget& target, PageRange all, PageRange pages) {
  return part_of(target, (pages.first().value() - all.first().value()) * page_size, pages.bytes());
}

/// Pages that are anonymous already.
static MemoryResult<Discarded> discard_replaced(DiscardTarget target) {
  target.backing = Backing::anonymous;
  target.memory.fd = -1;
  return discard_memory(target);
}

MemoryResult<Discarded> discard_private_file(const DiscardTarget& target, PageRange pages, ReplacedPages& replaced) {
  if (pages.empty()) return Discarded{};
  const std::lock_guard lock(replaced.mutex);
  if (replaced.pages.contains(pages)) return discard_replaced(target);

  PageSet after = replaced.pages;
  after.add(pages);
  if (after.range_count() <= ReplacedPages::most_ranges) {
    void* const mapped = mmap(host_of(target.memory), target.memory.bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (mapped != MAP_FAILED) {
      replaced.pages = std::move(after);
      // A refusal changes nothing about what the pages hold.
      if (replaced.huge_pages) static_cast<void>(advise_huge_pages(mapped, target.memory.bytes, *replaced.huge_pages));
      return Discarded{.freed_pages = pages.count()};
    }
    const int error = errno;
    // The process may have no mapping left to make, and what was there be as it was; kernels differ in what they undo.
    if (!check_backing({.memory = target.memory, .backing = Backing::private_file}))
      return refuse(target.memory, "mmap of anonymous memory over a file's", error);
  }

  PageSet known = replaced.pages;
  known.intersect(pages);
  PageSet rest = pages;
  rest.remove(known);
  Discarded done;
  for (const PageRange& part : known.ranges()) {
    const auto discarded = discard_replaced(target_of(target, pages, part));
    if (!discarded) return discarded;
    done = sum(done, *discarded);
  }
  for (const PageRange& part : rest.ranges()) {
    const auto cleared = clear(target_of(target, pages, part));
    if (!cleared) return cleared;
    done = sum(done, *cleared);
  }
  return done;
}

/// Makes private copies of zeros, if it may. What cannot be had is an error: the store would be a SIGBUS.
static MemoryResult<Discarded> hide_file(const DiscardTarget& target) {
  const FileMapping& part = target.memory;
  if (target.mode == DiscardMode::free_only) return Discarded{.kept_pages = part.bytes / page_size};
  const int error = advise(part, advice_populate);
  if (error != 0 && error != EINVAL)
    return refuse(part, "MADV_POPULATE_WRITE of huge pages to clear", error, GuestAccess{.error = error}.code());
  return clear_all(part, target.reach);
}

MemoryResult<Discarded> discard_hugetlb_private_file(const DiscardTarget& target, const ExtentList& data) {
  // Where the file holds nothing, what is discarded reads zero as anonymous memory does.
  DiscardTarget without_data = target;
  without_data.backing = Backing::hugetlb;
  without_data.memory.fd = without_data.region.fd = -1;
  const std::uint64_t first = (target.memory.offset - target.region.offset) / page_size;
  const std::uint64_t end = first + target.memory.bytes / page_size;
  Discarded done;
  std::uint64_t at = first;
  const auto part = [&](std::uint64_t from, std::uint64_t to) {
    return part_of(without_data, (from - first) * page_size, (to - from) * page_size);
  };
  const auto discard_until = [&](std::uint64_t to) -> MemoryResult<void> {
    if (at >= to) return {};
    const auto discarded = discard_memory(part(at, to));
    if (!discarded) return std::unexpected(discarded.error());
    done = sum(done, *discarded);
    return {};
  };
  for (const Extent extent : data) {
    const std::uint64_t from = std::max(extent.first, first);
    const std::uint64_t to = std::min(extent.end(), end);
    if (from >= to) continue;
    if (auto discarded = discard_until(from); !discarded) return std::unexpected(discarded.error());
    const auto hidden = hide_file(part(from, to));
    if (!hidden) return hidden;
    done = sum(done, *hidden);
    at = to;
  }
  if (auto discarded = discard_until(end); !discarded) return std::unexpected(discarded.error());
  return done;
}

MemoryResult<Discarded> Region::discard(PageRange range, DiscardMode mode) const {
  const auto refuse_range = [&](MemoryErrc code) {
    return refuse_region(code, range.start_address(), range.bytes(), "Region::discard");
  };
  if (range.empty()) return Discarded{};
  if (range.first() < pages().first() || pages().end() < range.end()) return refuse_range(MemoryErrc::not_backed);
  if (kind() == RegionKind::rom) return refuse_range(MemoryErrc::read_only);
  if (backing() == Backing::unknown && mode == DiscardMode::free_only) return Discarded{.kept_pages = range.count()};
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
      .reach = reach_of(is_adopted()),
      .mode = mode};
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

} // namespace cppvmm
