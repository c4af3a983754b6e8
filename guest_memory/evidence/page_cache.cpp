module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <linux/magic.h>
#include <optional>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:page_cache.impl;
import :address;
import :error;
import :evidence;
import :page_evidence;
import :survey_stop;

// SEEK_DATA alone does not prove a page of shared memory untouched. It calls data what is up to date in the page cache,
// and a page that is being migrated (compaction, NUMA balancing) or collapsed into a huge page (before Linux 6.4) is,
// for a moment, in the cache and not up to date although it holds data (Linux mm/filemap.c folio_seek_hole_data,
// mm/migrate.c): SEEK_DATA skips it. Its slot in the cache is never empty, though. So each hole is confirmed:
// - with cachestat(2), which counts the occupied slots whatever state their pages are in;
// - on kernels without it, by comparing the pages found with the blocks that the file has allocated.
// Pages that were allocated by fallocate(2) and never written look the same as a page in migration; reading them
// through the descriptor takes the page's lock, and so waits for a migration to end.
//
// All this is of use only where the descriptor's inode has the pages itself. On a file system that is stacked on
// another one, such as overlayfs, the inode below has them, and this one's page cache is empty whatever happens. So
// only file systems count of which it is known:
// - tmpfs: there is nothing but slots in the page cache, of pages or of what is swapped out (mm/shmem.c).
// - ext4 and XFS: SEEK_DATA goes by blocks (fs/iomap/seek.c). Those that are written, or reserved for data in the page
//   cache (delayed allocation), are data. Of those that are allocated and not written, it looks at the page cache, and
//   so overlooks pages in migration as above. Blocks become written before the pages' writeback ends (ext4_end_io_end
//   in fs/ext4/page-io.c, xfs_end_ioend in fs/xfs/xfs_aops.c), and until then no page leaves the cache. So a page that
//   holds data and has no slot has written blocks, from then on: blocks are looked at again after the slots. ext2 and
//   ext3 have ext4's number; ext2's own driver calls all of a file data.
// - XFS not before Linux 6.9: there SEEK_DATA skips data behind blocks reserved for copy-on-write (4b2f459d8625).
// A file that nobody changes and that was synced has its data in written blocks, so that on a disk these tell all.

namespace cppvmm {

// include/uapi/linux/mman.h (Linux 6.5), which the headers of older distributions lack.
struct CacheStatRange {
  std::uint64_t offset;
  std::uint64_t length;
};
struct CacheStat {
  std::uint64_t cached;
  std::uint64_t dirty;
  std::uint64_t writeback;
  std::uint64_t evicted;
  std::uint64_t recently_evicted;
};
constexpr long cachestat_number = 451;

struct SystemError {
  const char* operation;
  int os_error;
};

constexpr SystemError stopped{"a survey that was to end early", ECANCELED};

static MemoryError memory_error(const SystemError& error, const FileMapping& mapping) {
  const auto address = reinterpret_cast<std::uintptr_t>(mapping.host);
  if (error.os_error == ECANCELED) return survey_stopped(address, mapping.bytes);
  return {.code = MemoryErrc::os,
          .address = address,
          .length = mapping.bytes,
          .os_error = error.os_error,
          .operation = error.operation};
}

/// Where the data of a file is.
enum class DataPlace : std::uint8_t {
  memory,  ///< In the page cache of its inode.
  disk,    ///< There until it is in blocks that SEEK_DATA calls data.
  unknown, ///< Perhaps where nothing here looks.
};

static bool is_linux_since(unsigned major, unsigned minor) {
  utsname name{};
  unsigned have_major = 0;
  unsigned have_minor = 0;
  if (uname(&name) != 0 || std::sscanf(name.release, "%u.%u", &have_major, &have_minor) != 2) return false;
  return have_major > major || (have_major == major && have_minor >= minor);
}

class FilePages {
public:
  explicit FilePages(int fd) : fd_(fd) {}

  /// Adds the pages of `range` that SEEK_DATA calls data.
  std::optional<SystemError> add_data(Extent range, ExtentList& data) const {
    const std::uint64_t end = range.end() * page_size;
    for (std::uint64_t at = range.first * page_size; at < end;) {
      if (is_survey_stopped()) return stopped;
      const off_t start = lseek(fd_, static_cast<off_t>(at), SEEK_DATA);
      if (start < 0 && errno == ENXIO) return std::nullopt; // only a hole up to the end of the file
      if (start < 0) return SystemError{"SEEK_DATA", errno};
      if (static_cast<std::uint64_t>(start) >= end) return std::nullopt;
      const off_t stop = lseek(fd_, start, SEEK_HOLE);
      // A hole was punched in between: look again from there on, counting the page as data.
      if (stop < 0 && errno != ENXIO) return SystemError{"SEEK_HOLE", errno};
      const auto first = static_cast<std::uint64_t>(start) / page_size;
      const auto last = std::max(first + 1, stop < 0 ? 0 : static_cast<std::uint64_t>(stop) / page_size);
      data.add({first, std::min(last, range.end()) - first});
      at = last * page_size;
    }
    return std::nullopt;
  }

  /// How many pages of the range have an occupied slot in the page cache; ENOSYS on kernels that cannot tell.
  std::optional<SystemError> occupied(Extent range, std::uint64_t& pages) const {
    CacheStatRange where{range.first * page_size, range.count * page_size};
    CacheStat status{};
    if (syscall(cachestat_number, fd_, &where, &status, 0) != 0) return SystemError{"cachestat", errno};
    pages = status.cached + status.evicted;
    return std::nullopt;
  }

  /// Whether all pages of the range read zero; waits for pages in migration. Allocates nothing.
  std::optional<SystemError> reads_zero(Extent range, bool& zero) const {
    alignas(8) std::array<std::uint64_t, 65536 / sizeof(std::uint64_t)> buffer;
    for (std::uint64_t at = range.first * page_size; at < range.end() * page_size;) {
      const auto wanted = std::min<std::uint64_t>(sizeof buffer, range.end() * page_size - at);
      const ssize_t got = pread(fd_, buffer.data(), wanted, static_cast<off_t>(at));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return SystemError{"pread of shared memory", errno};
      if (got == 0 || got % static_cast<ssize_t>(page_size) != 0) {
        zero = false; // the file ends here: nothing is known
        return std::nullopt;
      }
      const auto words = static_cast<std::size_t>(got) / sizeof(std::uint64_t);
      if (std::any_of(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(words),
                      [](std::uint64_t word) { return word != 0; })) {
        zero = false;
        return std::nullopt;
      }
      at += static_cast<std::uint64_t>(got);
    }
    zero = true;
    return std::nullopt;
  }

  /// By its file system.
  [[nodiscard]] DataPlace data_place() const {
    // A device's node is a file of devtmpfs, and its data is not there.
    struct stat status{};
    struct statfs system{};
    if (fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode) || fstatfs(fd_, &system) != 0) return DataPlace::unknown;
    switch (system.f_type) {
    case TMPFS_MAGIC:
      return DataPlace::memory;
    case EXT4_SUPER_MAGIC:
      return DataPlace::disk;
    case XFS_SUPER_MAGIC:
      return is_linux_since(6, 9) ? DataPlace::disk : DataPlace::unknown;
    default:
      return DataPlace::unknown;
    }
  }

private:
  int fd_;
};

/// What it means that a slot of the page cache is occupied.
enum class OccupiedSlots : std::uint8_t {
  are_looked_at, ///< Something is there: what it is, is read.
  are_data,
};

/// Confirms with cachestat that holes are holes, in ascending order, and collects the pages that are none.
class HoleCheck {
public:
  HoleCheck(const FilePages& file, OccupiedSlots occupied) : file_(file), occupied_(occupied) {}

  std::optional<SystemError> confirm(Extent hole) {
    std::vector<Extent> open = {hole};
    while (!open.empty()) {
      if (is_survey_stopped()) return stopped;
      const Extent range = open.back();
      open.pop_back();
      std::uint64_t occupied = 0;
      if (auto error = file_.occupied(range, occupied)) return error;
      if (occupied == 0) continue;
      if (occupied >= range.count) {
        if (auto error = settle(range)) return error;
      } else if (steps_ == 0) {
        leave(range);
      } else {
        --steps_;
        const std::uint64_t half = range.count / 2;
        open.push_back({range.first + half, range.count - half});
        open.push_back({range.first, half});
      }
    }
    return std::nullopt;
  }

  [[nodiscard]] std::uint64_t unaccounted_pages() const { return unaccounted_; }
  /// What turned out to be no hole.
  [[nodiscard]] ExtentList&& take_data() { return std::move(data_); }

private:
  /// Every slot of the range is occupied, by pages that SEEK_DATA skipped: allocated and never written, being migrated,
  /// or written since.
  std::optional<SystemError> settle(Extent range) {
    if (occupied_ == OccupiedSlots::are_data) {
      data_.add(range);
      return std::nullopt;
    }
    if (range.count > readable_) {
      leave(range);
      return std::nullopt;
    }
    readable_ -= range.count;
    for (std::uint64_t first = range.first; first < range.end(); first += block) {
      if (is_survey_stopped()) return stopped;
      const Extent part{first, std::min(block, range.end() - first)};
      bool zero = false;
      if (auto error = file_.reads_zero(part, zero)) return error;
      if (!zero)
        data_.add(part);
      else if (auto error = file_.add_data(part, data_)) // zeros that were written are data like any other
        return error;
    }
    return std::nullopt;
  }

  void leave(Extent range) {
    unaccounted_ += range.count;
    data_.add(range);
  }

  static constexpr std::uint64_t block = 16; // pages read at a time, and counted as touched together if one is
  const FilePages& file_;
  OccupiedSlots occupied_;
  ExtentList data_;
  std::uint64_t steps_ = 100'000;    // cachestat calls to find the occupied slots
  std::uint64_t readable_ = 1 << 18; // pages to read: 1 GiB, a fraction of a second
  std::uint64_t unaccounted_ = 0;
};

/// Of a file's `range`, without evidence that a call failed.
struct FileEvidence {
  std::vector<ExtentList> data;
  std::uint64_t unaccounted = 0;
};

/// Calls `visit` for what `data` leaves of the range, ascending, until it fails.
template <class Visit>
static std::optional<SystemError> for_each_hole(Extent range, const ExtentList& data, Visit visit) {
  std::uint64_t at = range.first;
  for (const Extent extent : data) {
    if (extent.first > at)
      if (auto error = visit(Extent{at, extent.first - at})) return error;
    at = extent.end();
  }
  return range.end() > at ? visit(Extent{at, range.end() - at}) : std::nullopt;
}

static std::optional<SystemError> confirm_by_cachestat(const FilePages& file, DataPlace place, Extent range,
                                                       FileEvidence& found) {
  HoleCheck check(file, OccupiedSlots::are_looked_at);
  ExtentList data;
  if (auto error = file.add_data(range, data)) return error;
  if (auto error = for_each_hole(range, data, [&](Extent hole) { return check.confirm(hole); })) return error;
  ExtentList written_back;
  if (place == DataPlace::disk) {
    // What was in the page cache alone when the blocks were looked at, and had left it when its slots were counted.
    const auto look_again = [&](Extent hole) { return file.add_data(hole, written_back); };
    if (auto error = for_each_hole(range, data, look_again)) return error;
  }
  found.unaccounted = check.unaccounted_pages();
  found.data.push_back(std::move(data));
  found.data.push_back(check.take_data());
  found.data.push_back(std::move(written_back));
  return std::nullopt;
}

/// For kernels before 6.5: a pass counts when it saw exactly as many pages as the file had allocated before it and
/// after it, and two such passes must follow each other. A page that both skipped would have to be in migration both
/// times, and to be made up for both times by a page that was allocated, seen and freed in between. What any pass saw
/// is data, and own page tables add the pages that are mapped here, guest and VMM writes, whatever happens to them
/// meanwhile.
static std::optional<SystemError> confirm_by_blocks(const FileMapping& mapping, const FilePages& file, Extent range,
                                                    EvidenceSource source, FileEvidence& found) {
  auto tables = page_table_evidence(mapping.host, mapping.bytes, PageEntries::all, source);
  if (tables.error) return SystemError{tables.error->operation, tables.error->os_error};
  for (ExtentList& list : tables.touched) {
    list.shift_up(range.first);
    found.data.push_back(std::move(list));
  }

  constexpr int passes = 16;
  constexpr int wanted = 2;
  int complete = 0;
  for (int pass = 0; pass < passes && complete < wanted; ++pass) {
    struct stat before{};
    struct stat after{};
    if (fstat(mapping.fd, &before) != 0) return SystemError{"fstat of shared memory", errno};
    const auto file_pages = (static_cast<std::uint64_t>(before.st_size) + page_size - 1) / page_size;
    ExtentList data;
    ExtentList elsewhere; // the embedder's other uses of the file
    if (range.first > 0)
      if (auto error = file.add_data({0, range.first}, elsewhere)) return error;
    if (auto error = file.add_data(range, data)) return error;
    if (file_pages > range.end())
      if (auto error = file.add_data({range.end(), file_pages - range.end()}, elsewhere)) return error;
    if (fstat(mapping.fd, &after) != 0) return SystemError{"fstat of shared memory", errno};
    const std::uint64_t seen = data.page_count() + elsewhere.page_count();
    found.data.push_back(std::move(data));
    const auto allocated = static_cast<std::uint64_t>(after.st_blocks) * 512 / page_size;
    const bool is_complete = before.st_blocks == after.st_blocks && seen == allocated;
    complete = is_complete ? complete + 1 : 0;
    found.unaccounted = is_complete ? 0 : std::max<std::uint64_t>(1, allocated > seen ? allocated - seen : 0);
  }
  if (complete < wanted) found.unaccounted = std::max<std::uint64_t>(1, found.unaccounted);
  return std::nullopt;
}

bool shows_holes(int fd) { return FilePages(fd).data_place() != DataPlace::unknown; }

RegionEvidence page_cache_evidence(const FileMapping& mapping, FileChanges changes, EvidenceSource source) {
  const FilePages file(mapping.fd);
  const DataPlace place = file.data_place();
  const Extent range{mapping.offset / page_size, mapping.bytes / page_size};
  RegionEvidence result;
  const auto fail = [&](const SystemError& error) {
    result.kind = Evidence::none;
    result.error = memory_error(error, mapping);
    return result;
  };
  const auto unavailable = [&](const char* operation) {
    fail({operation, 0});
    result.error->code = MemoryErrc::unavailable;
    return result;
  };
  if (place == DataPlace::unknown)
    return unavailable("survey of a file on a file system that is not known to show its data");
  FileEvidence found;
  std::optional<SystemError> error;
  std::uint64_t occupied = 0;
  if (place == DataPlace::disk && changes == FileChanges::never) {
    result.kind = Evidence::file_holes;
    error = file.add_data(range, found.data.emplace_back());
  } else if (source == EvidenceSource::automatic && !file.occupied({range.first, 1}, occupied)) {
    result.kind = Evidence::page_cache;
    error = confirm_by_cachestat(file, place, range, found);
    result.unaccounted_pages = found.unaccounted;
  } else if (place == DataPlace::memory) {
    error = confirm_by_blocks(mapping, file, range, source, found);
    result.unaccounted_pages = found.unaccounted;
    if (found.unaccounted == 0) result.kind = Evidence::page_cache_blocks;
  } else {
    return unavailable("survey of a file that others may write, without cachestat");
  }
  if (error) return fail(*error);
  for (ExtentList& list : found.data) {
    list.shift_down(range.first);
    result.touched.push_back(std::move(list));
  }
  return result;
}

// All that a guest_memfd holds, whoever wrote it, is in the page cache of its inode, and there is nothing else: no
// disk, no swap. A page that is there stays, at the same place: it is not migrated (kvm_gmem_migrate_folio, and the
// mapping is unmovable), not written back, and a memory error leaves it where it is (kvm_gmem_error_folio). Only a hole
// that is punched takes it away (virt/kvm/guest_memfd.c of Linux 6.18).
RegionEvidence guest_memfd_evidence(const FileMapping& mapping) {
  RegionEvidence result;
  const FilePages file(mapping.fd);
  const Extent range{mapping.offset / page_size, mapping.bytes / page_size};
  HoleCheck check(file, OccupiedSlots::are_data);
  if (const auto error = check.confirm(range)) {
    result.error = memory_error(*error, mapping);
    return result;
  }
  result.kind = Evidence::page_cache;
  result.unaccounted_pages = check.unaccounted_pages();
  result.touched.push_back(check.take_data());
  result.touched.back().shift_down(range.first);
  return result;
}

} // namespace cppvmm
