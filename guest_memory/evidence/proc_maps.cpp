module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <expected>
#include <functional>
#include <string>
#include <string_view>
module cppvmm.guest_memory:proc_maps.impl;
import :book_files;
import :error;
import :proc_maps;

namespace cppvmm {

/// Calls `visit` for each line, without its newline, until it returns false; for none while another thread reads.
/// `visit` must not read any other text of the kernel's.
static MemoryResult<void> for_each_line(const std::function<bool(const char*)>& visit) {
  const auto failed = [&](const char* operation) {
    return std::unexpected(MemoryError{.code = MemoryErrc::os, .os_error = errno, .operation = operation});
  };
  BookText file = open_mappings();
  if (!file.is_open()) return failed("open /proc/self/smaps");
  std::string text;
  std::array<char, 4096> buffer;
  for (;;) {
    const std::ptrdiff_t got = file.read(buffer.data(), buffer.size());
    if (got < 0) return failed("read /proc/self/smaps");
    if (got == 0) return {};
    text.append(buffer.data(), static_cast<std::size_t>(got));
    std::size_t begin = 0;
    for (std::size_t end = text.find('\n'); end != std::string::npos; end = text.find('\n', begin)) {
      text[end] = '\0';
      if (!visit(text.data() + begin)) return {};
      begin = end + 1;
    }
    text.erase(0, begin);
  }
}

static bool parse(const char* line, ProcMapping& mapping) {
  unsigned long long start = 0;
  unsigned long long end = 0;
  unsigned long long offset = 0;
  unsigned long long inode = 0;
  char access[5] = {};
  int path = 0;
  if (std::sscanf(line, "%llx-%llx %4s %llx %x:%x %llu %n", &start, &end, access, &offset, &mapping.device_major,
                  &mapping.device_minor, &inode, &path) != 7)
    return false;
  mapping.path = line + path;
  mapping.start = start;
  mapping.end = end;
  mapping.is_readable = access[0] == 'r';
  mapping.is_writable = access[1] == 'w';
  mapping.is_private = access[3] == 'p';
  mapping.offset = offset;
  mapping.inode = inode;
  return true;
}

/// Whether mappings that are listed in ascending order leave out nothing of the memory.
class Coverage {
public:
  Coverage(std::uint64_t start, std::uint64_t bytes) : start_(start), end_(start + bytes), covered_(start) {}

  [[nodiscard]] bool overlaps(const ProcMapping& mapping) const { return mapping.start < end_ && mapping.end > start_; }
  [[nodiscard]] bool is_behind(const ProcMapping& mapping) const { return mapping.start >= end_; }
  /// Of one that overlaps.
  void add(const ProcMapping& mapping) {
    if (mapping.start <= covered_) covered_ = std::max(covered_, mapping.end);
  }
  [[nodiscard]] MemoryResult<void> check() const {
    if (covered_ >= end_) return {};
    return std::unexpected(MemoryError{.code = MemoryErrc::wrong_nature,
                                       .address = start_,
                                       .length = end_ - start_,
                                       .operation = "list all of the memory by /proc/self/smaps"});
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
  return for_each_line([&](const char* line) {
    ProcMapping mapping;
    if (parse(line, mapping)) {
      is_wanted = wanted(mapping);
      current = mapping;
      return !is_behind(mapping);
    }
    const std::string_view text(line);
    unsigned long long kib = 0;
    if (is_wanted && std::sscanf(line, "KernelPageSize: %llu kB", &kib) == 1) current.page_bytes = kib * 1024;
    if (is_wanted && std::sscanf(line, "AnonHugePages: %llu kB", &kib) == 1) current.has_huge_pages = kib != 0;
    if (is_wanted && std::sscanf(line, "THPeligible: %llu", &kib) == 1) current.may_get_huge_pages = kib != 0;
    if (is_wanted && std::sscanf(line, "LazyFree: %llu kB", &kib) == 1) current.has_given_up_pages = kib != 0;
    // The last line of a mapping's record. um is VM_UFFD_MISSING, ui VM_UFFD_MINOR, uw VM_UFFD_WP, dp VM_DROPPABLE
    // (Linux fs/proc/task_mmu.c).
    if (!is_wanted || !text.starts_with("VmFlags:")) return true;
    const auto has = [&](std::string_view flag) { return text.find(flag) != std::string_view::npos; };
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

MemoryResult<void> for_each_mapping_of_process(const std::function<bool(const ProcMapping&)>& visit) {
  return walk([](const ProcMapping&) { return true; }, [](const ProcMapping&) { return false; }, visit);
}

MemoryResult<std::uint64_t> sum_smaps(std::uint64_t start, std::uint64_t bytes,
                                      const std::function<bool(std::string_view)>& wanted) {
  std::uint64_t sum = 0;
  Coverage coverage(start, bytes);
  bool overlaps = false;
  bool reaches_beyond = false;
  auto done = for_each_line([&](const char* line) {
    ProcMapping mapping;
    if (parse(line, mapping)) {
      overlaps = coverage.overlaps(mapping);
      if (overlaps) coverage.add(mapping);
      if (overlaps && (mapping.start < start || mapping.end > start + bytes)) reaches_beyond = true;
      return !coverage.is_behind(mapping) && !reaches_beyond;
    }
    char name[64];
    unsigned long long kib = 0;
    if (overlaps && std::sscanf(line, "%63[^:]: %llu kB", name, &kib) == 2 && wanted(name)) sum += kib * 1024;
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
