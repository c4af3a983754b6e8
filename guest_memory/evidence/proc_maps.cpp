module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <sys/ioctl.h>
#include <system_error>
#include <utility>
#include <vector>
module cppvmm.guest_memory:proc_maps.impl;
import :book_files;
import :error;
import :proc_maps;

namespace cppvmm {

/// A file of text, and what is said when it can't be opened or read.
struct MappingText {
  BookText file;
  const char* opening;
  const char* reading;
};

static MappingText mappings() { return {open_mappings(), "open /proc/self/smaps", "read /proc/self/smaps"}; }
static MappingText mapping_list() { return {open_mapping_list_text(), "open /proc/self/maps", "read /proc/self/maps"}; }

/// Calls `visit` for each line of the text, without its newline, until it returns false; for none while another thread
/// reads. `visit` must not read any other text of the kernel's.
static MemoryResult<void> for_each_line(MappingText source, const std::function<bool(std::string_view)>& visit) {
  const auto failed = [&](const char* operation) {
    return std::unexpected(MemoryError{.code = MemoryErrc::os, .os_error = errno, .operation = operation});
  };
  if (!source.file.is_open()) return failed(source.opening);
  std::string text;
  std::array<char, 4096> buffer;
  for (;;) {
    const std::ptrdiff_t got = source.file.read(buffer.data(), buffer.size());
    if (got < 0) return failed(source.reading);
    if (got == 0) return {};
    text.append(buffer.data(), static_cast<std::size_t>(got));
    std::size_t begin = 0;
    for (std::size_t end = text.find('\n'); end != std::string::npos; end = text.find('\n', begin)) {
      if (!visit(std::string_view(text).substr(begin, end - begin))) return {};
      begin = end + 1;
    }
    text.erase(0, begin);
  }
}

/// Takes a number off the text, of digits of the base.
template <int base>
static bool take_number(std::string_view& text, std::uint64_t& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number, base);
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return error == std::errc();
}

static bool take(std::string_view& text, char expected) {
  if (!text.starts_with(expected)) return false;
  text.remove_prefix(1);
  return true;
}

/// All but the path, which is left: of the line that a mapping's record begins with. The names of the fields begin with
/// capitals.
static bool parse(std::string_view& line, ListedMapping& mapping) {
  if (line.empty() || (line.front() >= 'A' && line.front() <= 'Z')) return false;
  std::uint64_t major = 0;
  std::uint64_t minor = 0;
  if (!take_number<16>(line, mapping.start) || !take(line, '-') || !take_number<16>(line, mapping.end) ||
      !take(line, ' ') || line.size() < 4)
    return false;
  mapping.is_readable = line[0] == 'r';
  mapping.is_writable = line[1] == 'w';
  mapping.is_private = line[3] == 'p';
  line.remove_prefix(4);
  if (!take(line, ' ') || !take_number<16>(line, mapping.offset) || !take(line, ' ') || !take_number<16>(line, major) ||
      !take(line, ':') || !take_number<16>(line, minor) || !take(line, ' ') || !take_number<10>(line, mapping.inode))
    return false;
  mapping.device_major = static_cast<unsigned>(major);
  mapping.device_minor = static_cast<unsigned>(minor);
  line.remove_prefix(std::min(line.find_first_not_of(' '), line.size()));
  return true;
}

/// The number after the name of a field.
static std::optional<std::uint64_t> field(std::string_view line, std::string_view name) {
  if (!line.starts_with(name)) return std::nullopt;
  line.remove_prefix(name.size());
  line.remove_prefix(std::min(line.find_first_not_of(' '), line.size()));
  std::uint64_t number = 0;
  return take_number<10>(line, number) ? std::optional(number) : std::nullopt;
}

/// Whether mappings that are listed in ascending order leave out nothing of the memory.
class Coverage {
public:
  Coverage(std::uint64_t start, std::uint64_t bytes) : start_(start), end_(start + bytes), covered_(start) {}

  [[nodiscard]] bool overlaps(const ListedMapping& mapping) const {
    return mapping.start < end_ && mapping.end > start_;
  }
  [[nodiscard]] bool is_behind(const ListedMapping& mapping) const { return mapping.start >= end_; }
  /// Of one that overlaps.
  void add(const ListedMapping& mapping) {
    if (mapping.start <= covered_) covered_ = std::max(covered_, mapping.end);
  }
  [[nodiscard]] MemoryResult<void> check() const {
    if (covered_ >= end_) return {};
    return std::unexpected(MemoryError{.code = MemoryErrc::wrong_nature,
                                       .address = start_,
                                       .length = end_ - start_,
                                       .operation = "list all of the memory's mappings"});
  }

private:
  std::uint64_t start_;
  std::uint64_t end_;
  std::uint64_t covered_;
};

using MappingTest = std::function<bool(const ProcMapping&)>;

/// Calls `visit` for each mapping that is `wanted`, until it returns false or one `is_behind` what is looked for.
static MemoryResult<void> walk(const MappingTest& wanted, const MappingTest& is_behind, const MappingTest& visit) {
  ProcMapping current;
  bool is_wanted = false;
  return for_each_line(mappings(), [&](std::string_view line) {
    ProcMapping mapping;
    if (std::string_view rest = line; parse(rest, mapping)) {
      is_wanted = wanted(mapping);
      if (is_wanted) {
        mapping.path = rest;
        current = std::move(mapping);
        return !is_behind(current);
      }
      return !is_behind(mapping);
    }
    if (!is_wanted) return true;
    if (const auto kib = field(line, "KernelPageSize:")) current.page_bytes = *kib * 1024;
    if (const auto kib = field(line, "AnonHugePages:")) current.has_huge_pages = *kib != 0;
    if (const auto yes = field(line, "THPeligible:")) current.may_get_huge_pages = *yes != 0;
    if (const auto kib = field(line, "LazyFree:")) current.has_given_up_pages = *kib != 0;
    // The last line of a mapping's record. um is VM_UFFD_MISSING, ui VM_UFFD_MINOR, uw VM_UFFD_WP, dp VM_DROPPABLE
    // (Linux fs/proc/task_mmu.c).
    if (!line.starts_with("VmFlags:")) return true;
    const auto has = [&](std::string_view flag) { return line.find(flag) != std::string_view::npos; };
    current.is_filled_on_demand = has(" um") || has(" ui");
    current.is_held = current.is_filled_on_demand || has(" uw");
    current.has_given_up_pages = current.has_given_up_pages || has(" dp");
    return visit(current);
  });
}

MemoryResult<void> for_each_mapping(std::uint64_t start, std::uint64_t bytes,
                                    const std::function<bool(const ProcMapping&)>& visit) {
  Coverage coverage(start, bytes);
  bool wants_more = true;
  auto done = walk([&](const ProcMapping& mapping) { return coverage.overlaps(mapping); },
                   [&](const ProcMapping& mapping) { return coverage.is_behind(mapping); },
                   [&](const ProcMapping& mapping) {
                     coverage.add(mapping);
                     wants_more = visit(mapping);
                     return wants_more;
                   });
  return done && wants_more ? coverage.check() : done;
}

/// Which of many parts a mapping overlaps.
class Parts {
public:
  explicit Parts(std::span<const MappedPart> parts) {
    for (std::size_t i = 0; i < parts.size(); ++i)
      parts_.push_back({.number = i, .start = parts[i].start, .end = parts[i].start + parts[i].bytes});
    std::ranges::sort(parts_, {}, &Part::start);
    std::uint64_t reach = 0;
    for (Part& part : parts_)
      part.reach = reach = std::max(reach, part.end);
  }

  [[nodiscard]] std::uint64_t end() const { return parts_.empty() ? 0 : parts_.back().reach; }

  /// Calls `visit` with the number of each, until it returns true: whether it did.
  template <class Visit>
  [[nodiscard]] bool find(const ListedMapping& mapping, Visit visit) const {
    auto part = std::ranges::upper_bound(parts_, mapping.start, {}, &Part::reach);
    for (; part != parts_.end() && part->start < mapping.end; ++part)
      if (part->end > mapping.start && visit(part->number)) return true;
    return false;
  }

private:
  struct Part {
    std::size_t number = 0;
    std::uint64_t start = 0;
    std::uint64_t end = 0;
    std::uint64_t reach = 0; ///< The last end of this and of those before: parts may overlap.
  };
  std::vector<Part> parts_;
};

/// Of each part: why its mappings were not all visited, which is known of all if the walk over them failed.
static std::vector<std::optional<MemoryError>> results_of(std::span<const Coverage> coverages,
                                                          const MemoryResult<void>& walked) {
  std::vector<std::optional<MemoryError>> results;
  for (const Coverage& coverage : coverages) {
    auto& result = results.emplace_back();
    if (!walked)
      result = walked.error();
    else if (auto all = coverage.check(); !all)
      result = all.error();
  }
  return results;
}

static std::vector<Coverage> coverages_of(std::span<const MappedPart> parts) {
  std::vector<Coverage> coverages;
  for (const MappedPart& part : parts)
    coverages.emplace_back(part.start, part.bytes);
  return coverages;
}

std::vector<std::optional<MemoryError>>
for_each_mapping_of(std::span<const MappedPart> parts,
                    const std::function<void(std::size_t part, const ProcMapping&)>& visit) {
  const Parts sorted(parts);
  std::vector<Coverage> coverages = coverages_of(parts);
  const auto walked =
      walk([&](const ProcMapping& mapping) { return sorted.find(mapping, [](std::size_t) { return true; }); },
           [&](const ProcMapping& mapping) { return mapping.start >= sorted.end(); },
           [&](const ProcMapping& mapping) {
             static_cast<void>(sorted.find(mapping, [&](std::size_t part) {
               coverages[part].add(mapping);
               visit(part, mapping);
               return false;
             }));
             return true;
           });
  return results_of(coverages, walked);
}

/// struct procmap_query (include/uapi/linux/fs.h, Linux 6.11), which older headers lack.
struct MappingQuery {
  std::uint64_t size = sizeof(MappingQuery);
  std::uint64_t query_flags = 0;
  std::uint64_t address = 0;
  std::uint64_t start = 0;
  std::uint64_t end = 0;
  std::uint64_t flags = 0;
  std::uint64_t page_bytes = 0;
  std::uint64_t offset = 0;
  std::uint64_t inode = 0;
  std::uint32_t device_major = 0;
  std::uint32_t device_minor = 0;
  std::uint32_t name_size = 0;
  std::uint32_t build_id_size = 0;
  std::uint64_t name = 0;
  std::uint64_t build_id = 0;
};

/// PROCMAP_QUERY: the mapping that has the address. 0, or errno: ENOENT where there is none, ENOTTY before Linux 6.11.
static int query_mapping(int list, std::uint64_t address, ListedMapping& mapping) {
  constexpr std::uint64_t readable = 0x1;
  constexpr std::uint64_t writable = 0x2;
  constexpr std::uint64_t shared = 0x8;
  std::array<char, 4096> name; // PATH_MAX, beyond which there is none (do_procmap_query)
  MappingQuery query{.address = address,
                     .name_size = static_cast<std::uint32_t>(name.size()),
                     .name = reinterpret_cast<std::uintptr_t>(name.data())};
  if (ioctl(list, _IOWR('f', 17, MappingQuery), &query) != 0) return errno;
  if (query.start > address || query.end <= address) return ENOENT;
  mapping.start = query.start;
  mapping.end = query.end;
  mapping.is_readable = (query.flags & readable) != 0;
  mapping.is_writable = (query.flags & writable) != 0;
  mapping.is_private = (query.flags & shared) == 0;
  mapping.offset = query.offset;
  mapping.device_major = query.device_major;
  mapping.device_minor = query.device_minor;
  mapping.inode = query.inode;
  // With its NUL; 0 of memory without a name.
  const std::size_t length = std::min<std::size_t>(query.name_size, name.size());
  mapping.path.assign(name.data(), length != 0 ? length - 1 : 0);
  return 0;
}

/// Asks for each mapping of each part: 0, or errno of a kernel that can't be asked.
static int query_parts(std::span<const MappedPart> parts, std::span<Coverage> coverages,
                       const std::function<void(std::size_t part, const ListedMapping&)>& visit) {
  const BookFile list = open_mapping_list();
  if (!list.is_open()) return errno;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::uint64_t end = parts[i].start + parts[i].bytes;
    for (std::uint64_t at = parts[i].start; at < end;) {
      ListedMapping mapping;
      const int error = query_mapping(list.number(), at, mapping);
      if (error == ENOENT) break;
      if (error != 0) return error;
      coverages[i].add(mapping);
      visit(i, mapping);
      at = mapping.end;
    }
  }
  return 0;
}

std::vector<std::optional<MemoryError>>
for_each_listed_mapping_of(std::span<const MappedPart> parts,
                           const std::function<void(std::size_t part, const ListedMapping&)>& visit) {
  std::vector<Coverage> coverages = coverages_of(parts);
  if (query_parts(parts, coverages, visit) == 0) return results_of(coverages, {});
  coverages = coverages_of(parts);
  const Parts sorted(parts);
  const auto walked = for_each_line(mapping_list(), [&](std::string_view line) {
    ListedMapping mapping;
    if (!parse(line, mapping)) return true;
    if (mapping.start >= sorted.end()) return false;
    bool is_new = true;
    static_cast<void>(sorted.find(mapping, [&](std::size_t part) {
      if (std::exchange(is_new, false)) mapping.path = line;
      coverages[part].add(mapping);
      visit(part, mapping);
      return false;
    }));
    return true;
  });
  return results_of(coverages, walked);
}

MemoryResult<void> for_each_listed_mapping(std::uint64_t start, std::uint64_t bytes,
                                           const std::function<bool(const ListedMapping&)>& visit) {
  // Each is visited when all have been listed, for `visit` may read other files of the kernel's.
  std::vector<ListedMapping> mappings;
  const MappedPart part{.start = start, .bytes = bytes};
  const auto results = for_each_listed_mapping_of(
      std::span(&part, 1), [&](std::size_t, const ListedMapping& mapping) { mappings.push_back(mapping); });
  for (const ListedMapping& mapping : mappings)
    if (!visit(mapping)) return {};
  if (results.front()) return std::unexpected(*results.front());
  return {};
}

std::optional<ListedMapping> listed_mapping_at(std::uint64_t address) {
  std::optional<ListedMapping> found;
  const MappedPart part{.start = address, .bytes = 1};
  const auto results = for_each_listed_mapping_of(std::span(&part, 1),
                                                  [&](std::size_t, const ListedMapping& mapping) { found = mapping; });
  return results.front() ? std::nullopt : found;
}

MemoryResult<void> for_each_mapping_of_process(const std::function<bool(const ProcMapping&)>& visit) {
  return walk([](const ProcMapping&) { return true; }, [](const ProcMapping&) { return false; }, visit);
}

MemoryResult<std::uint64_t> sum_smaps(std::uint64_t start, std::uint64_t bytes,
                                      const std::function<bool(std::string_view)>& wanted) {
  std::uint64_t sum = 0;
  Coverage coverage(start, bytes);
  bool overlaps = false;
  bool reaches_beyond = false;
  auto done = for_each_line(mappings(), [&](std::string_view line) {
    ProcMapping mapping;
    if (std::string_view rest = line; parse(rest, mapping)) {
      overlaps = coverage.overlaps(mapping);
      if (overlaps) coverage.add(mapping);
      if (overlaps && (mapping.start < start || mapping.end > start + bytes)) reaches_beyond = true;
      return !coverage.is_behind(mapping) && !reaches_beyond;
    }
    if (!overlaps) return true;
    const std::string_view name = line.substr(0, std::min(line.find(':'), line.size()));
    if (!wanted(name)) return true;
    if (const auto kib = field(line.substr(name.size()), ":")) sum += *kib * 1024;
    return true;
  });
  if (!done) return std::unexpected(done.error());
  if (reaches_beyond)
    return std::unexpected(MemoryError{.code = MemoryErrc::unavailable,
                                       .address = start,
                                       .length = bytes,
                                       .operation = "sum of /proc/self/smaps for a part of a mapping"});
  if (auto all = coverage.check(); !all) return std::unexpected(all.error());
  return sum;
}

} // namespace cppvmm
