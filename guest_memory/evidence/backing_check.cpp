module;
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <linux/magic.h>
#include <optional>
#include <span>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <utility>
#include <vector>
module cppvmm.guest_memory:backing_check.impl;
import :address;
import :backing;
import :error;
import :evidence;
import :file_data;
import :guard_file;
import :holder_probe;
import :page_evidence;
import :proc_maps;
import :unmap;

namespace cppvmm {

/// Where the files of guest_memfds are: from Linux 6.19 on among themselves, before it with all that has no file system
/// (virt/kvm/guest_memfd.c), where their name tells them from the others.
static bool is_of_guest_memfds(long type) {
  constexpr long guest_memfd_magic = 0x474d454d; // include/uapi/linux/magic.h, which older headers lack it in
  return type == ANON_INODE_FS_MAGIC || type == guest_memfd_magic;
}

/// The file systems whose files are memory, and need the evidence of their own kind. A block device is none of them,
/// wherever its node is.
static bool fits_file_system(Backing backing, long type, bool is_device) {
  if (is_device) return backing == Backing::private_file || backing == Backing::shared_file;
  switch (backing) {
  case Backing::memfd:
    return type == TMPFS_MAGIC;
  case Backing::hugetlb_memfd:
  case Backing::hugetlb_private_file:
    return type == HUGETLBFS_MAGIC;
  case Backing::private_file:
    return type != HUGETLBFS_MAGIC && !is_of_guest_memfds(type);
  case Backing::guest_memfd:
    return is_of_guest_memfds(type);
  default:
    return type != TMPFS_MAGIC && type != HUGETLBFS_MAGIC && !is_of_guest_memfds(type);
  }
}

static bool fits_without_file(Backing backing, const ListedMapping& mapping) {
  switch (backing) {
  case Backing::anonymous:
    return mapping.is_private && mapping.inode == 0;
  case Backing::shared_anonymous:
    return mapping.is_shared_anonymous();
  // The name that the kernel gives to the file behind it (mm/hugetlb.c).
  case Backing::hugetlb:
    return mapping.is_private && mapping.path == "/anon_hugepage (deleted)";
  default:
    return false;
  }
}

/// Pages of a private file that were discarded: anonymous memory took their place.
static bool is_replaced(Backing backing, const ListedMapping& mapping) {
  return backing == Backing::private_file && fits_without_file(Backing::anonymous, mapping);
}

/// What a mapping is of, by the kernel's list.
struct ListedFile {
  unsigned device_major = 0;
  unsigned device_minor = 0;
  std::uint64_t inode = 0;
  std::string path;
  friend bool operator==(const ListedFile&, const ListedFile&) = default;
};

static ListedFile file_of(const ListedMapping& mapping) {
  return {mapping.device_major, mapping.device_minor, mapping.inode, mapping.path};
}

/// A page of a file, which nobody may access.
class MappedPage {
public:
  explicit MappedPage(int fd) : at_(mmap(nullptr, page_size, PROT_NONE, MAP_PRIVATE, fd, 0)) {}
  MappedPage(const MappedPage&) = delete;
  MappedPage& operator=(const MappedPage&) = delete;
  ~MappedPage() {
    if (is_mapped()) unmap(at_, page_size);
  }
  [[nodiscard]] bool is_mapped() const { return at_ != MAP_FAILED; }
  [[nodiscard]] std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(at_); }

private:
  void* at_;
};

/// How mappings of this file are listed, by making one: of some file systems it is not what fstat(2) says (btrfs has
/// numbers of its own for each subvolume, overlayfs those of its layers). Files of two subvolumes may have the same
/// numbers there, and are told apart by their paths.
static std::optional<ListedFile> listed_file(int fd) {
  const MappedPage page(fd);
  if (!page.is_mapped()) return std::nullopt;
  std::optional<ListedFile> file;
  const auto walked = for_each_mapping(page.address(), page_size, [&](const ProcMapping& mapping) {
    file = file_of(mapping);
    return true;
  });
  return walked ? file : std::nullopt;
}

/// One look at the mappings of some memory.
class BackingCheck {
public:
  explicit BackingCheck(const StatedMemory& stated)
      : stated_(stated), traits_(traits_of(stated.backing)),
        start_(reinterpret_cast<std::uintptr_t>(stated.memory.host)) {
    if (traits_.has_file) look_at_file();
  }

  [[nodiscard]] MappedPart part() const { return {.start = start_, .bytes = stated_.memory.bytes}; }
  /// Begins anew, going by how mappings of the file are listed.
  void expect(ListedFile listed) {
    listed_ = std::move(listed);
    start_over();
  }
  void start_over() { fits_ = true; }
  /// Of each mapping that overlaps it.
  void look(const ProcMapping& mapping) {
    if (SeenPages* const seen = stated_.seen) {
      seen->has_huge = seen->has_huge || mapping.has_huge_pages;
      seen->may_get_huge = seen->may_get_huge || mapping.may_get_huge_pages;
      seen->has_given_up = seen->has_given_up || mapping.has_given_up_pages;
    }
    const bool is_for_others = stated_.backing != Backing::unknown && mapping.is_filled_on_demand;
    fits_ = fits_ && !is_for_others && fits(mapping);
  }
  /// The same, where nobody holds it.
  void look_at_free(const ListedMapping& mapping) { fits_ = fits_ && fits(mapping); }
  /// What the file alone tells, before any mapping.
  [[nodiscard]] const std::optional<MemoryError>& refused() const { return refused_; }
  [[nodiscard]] bool fits() const { return fits_; }
  [[nodiscard]] MemoryError misfit() const {
    return error(MemoryErrc::wrong_nature, "compare with the process's mappings");
  }

private:
  [[nodiscard]] MemoryError error(MemoryErrc code, const char* operation, int os_error = 0) const {
    return {
        .code = code, .address = start_, .length = stated_.memory.bytes, .os_error = os_error, .operation = operation};
  }
  void look_at_file();
  [[nodiscard]] bool is_of_file(const ListedMapping& mapping) const;
  [[nodiscard]] bool fits(const ListedMapping& mapping) const;

  const StatedMemory& stated_;
  BackingTraits traits_;
  std::uint64_t start_;
  struct stat file_{};
  std::optional<MemoryError> refused_;
  std::optional<ListedFile> listed_;
  bool fits_ = true;
};

void BackingCheck::look_at_file() {
  const FileMapping& mapped = stated_.memory;
  struct statfs system{};
  if (fstat(mapped.fd, &file_) != 0 || fstatfs(mapped.fd, &system) != 0) {
    refused_ = error(MemoryErrc::os, "fstat of the adopted file", errno);
    return;
  }
  if (!fits_file_system(stated_.backing, system.f_type, S_ISBLK(file_.st_mode))) {
    refused_ = error(MemoryErrc::wrong_nature, "adopted file is of another kind of file system");
    return;
  }
  const auto size = file_bytes(mapped.fd);
  if (!size)
    refused_ = error(MemoryErrc::os, "size of the adopted file", size.error());
  else if (mapped.offset > *size || mapped.bytes > *size - mapped.offset)
    refused_ = error(MemoryErrc::wrong_nature, "adopted file ends before the region");
}

bool BackingCheck::is_of_file(const ListedMapping& mapping) const {
  if (stated_.backing == Backing::guest_memfd && mapping.path.find("[kvm-gmem]") == std::string::npos) return false;
  if (listed_) return mapping.inode != 0 && file_of(mapping) == *listed_;
  return mapping.inode == file_.st_ino && mapping.device_major == major(file_.st_dev) &&
         mapping.device_minor == minor(file_.st_dev);
}

bool BackingCheck::fits(const ListedMapping& mapping) const {
  if (!mapping.is_readable || (!mapping.is_writable && stated_.kind != RegionKind::rom)) return false;
  if (stated_.backing == Backing::unknown) return true;
  if (!traits_.has_file) return fits_without_file(stated_.backing, mapping);
  if (is_replaced(stated_.backing, mapping)) return true;
  // File offset and address advance together, so that one comparison modulo 2^64 covers either order of starts.
  return mapping.is_private == traits_.is_private && is_of_file(mapping) &&
         mapping.offset - mapping.start == stated_.memory.offset - start_;
}

static bool is_guard(const ListedMapping& mapping) {
  return !mapping.is_private && !mapping.is_writable && mapping.path == guard_file_path;
}

/// Those whose mappings, as they are listed, are what was stated, and held by nobody. Of the others nothing is said.
static std::vector<bool> fit_as_listed(std::span<const StatedMemory> stated, std::span<BackingCheck> checks,
                                       std::span<const std::size_t> asked_for) {
  std::vector<MappedPart> parts;
  parts.reserve(asked_for.size());
  for (const std::size_t each : asked_for) {
    parts.push_back(checks[each].part());
    if (stated[each].memory.ends_at_guard_file) parts.back().bytes += page_size;
  }
  std::vector<std::vector<ListedMapping>> mappings(parts.size());
  const auto listed = for_each_listed_mapping_of(
      parts, [&](std::size_t part, const ListedMapping& mapping) { mappings[part].push_back(mapping); });
  std::vector<bool> fit(parts.size());
  HolderProbe probe;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const StatedMemory& each = stated[asked_for[i]];
    BackingCheck& check = checks[asked_for[i]];
    const std::uint64_t end = check.part().start + each.memory.bytes;
    bool is_guarded = each.memory.ends_at_guard_file;
    std::erase_if(mappings[i], [&](const ListedMapping& mapping) {
      if (mapping.start < end) return false;
      is_guarded = is_guarded && is_guard(mapping);
      return true;
    });
    for (const ListedMapping& mapping : mappings[i])
      check.look_at_free(mapping);
    // Of anonymous memory, a part that was mapped anew may get huge pages where the rest gets none.
    const bool is_one = each.backing != Backing::anonymous || mappings[i].size() == 1;
    fit[i] = !listed[i] && is_one && check.fits() && is_guarded == each.memory.ends_at_guard_file &&
             std::ranges::all_of(mappings[i], [&](const ListedMapping& mapping) {
               return mapping.is_writable && probe.is_free(mapping, is_guarded && mapping.end == end);
             });
    check.start_over();
  }
  if (!probe.was_heard()) fit.assign(parts.size(), false);
  return fit;
}

std::vector<std::optional<MemoryError>> check_backings(std::span<const StatedMemory> stated, EvidenceSource source) {
  std::vector<std::optional<MemoryError>> results(stated.size());
  std::vector<BackingCheck> checks;
  checks.reserve(stated.size());
  std::vector<std::size_t> listed;
  std::vector<std::size_t> rest;
  for (std::size_t i = 0; i < stated.size(); ++i) {
    results[i] = checks.emplace_back(stated[i]).refused();
    if (results[i]) continue;
    const bool is_listed =
        source == EvidenceSource::automatic && traits_of(stated[i].backing).is_listed && !stated[i].needs_seen;
    (is_listed ? listed : rest).push_back(i);
  }
  if (!listed.empty()) {
    const std::vector<bool> fit = fit_as_listed(stated, checks, listed);
    for (std::size_t i = 0; i < listed.size(); ++i)
      if (!fit[i]) rest.push_back(listed[i]);
  }
  if (rest.empty()) return results;
  std::vector<MappedPart> parts;
  parts.reserve(rest.size());
  for (const std::size_t each : rest)
    parts.push_back(checks[each].part());
  const auto walked = for_each_mapping_of(
      parts, [&](std::size_t part, const ProcMapping& mapping) { checks[rest[part]].look(mapping); });
  // On Linux 6.1, one line in some 700 of a file on overlayfs had another path than all others.
  constexpr int most_listings = 4;
  for (std::size_t i = 0; i < rest.size(); ++i) {
    BackingCheck& check = checks[rest[i]];
    const StatedMemory& each = stated[rest[i]];
    auto& result = results[rest[i]] = walked[i];
    for (int listing = 0; listing < most_listings && !result && !check.fits(); ++listing) {
      if (!traits_of(each.backing).is_on_disk) break;
      auto file = listed_file(each.memory.fd);
      if (!file) break;
      check.expect(std::move(*file));
      result = for_each_mapping_of(std::span(&parts[i], 1), [&](std::size_t, const ProcMapping& mapping) {
                 check.look(mapping);
               }).front();
    }
    if (!result && !check.fits()) result = check.misfit();
  }
  return results;
}

MemoryResult<void> check_backing(const StatedMemory& stated, EvidenceSource source) {
  if (auto refused = check_backings(std::span(&stated, 1), source).front()) return std::unexpected(*refused);
  return {};
}

} // namespace cppvmm
