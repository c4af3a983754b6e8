#include "floors.hpp"
#include <array>
#include <benchmark/benchmark.h>
#include <cerrno>
#include <fcntl.h>
#include <fstream>
#include <string>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace cppvmm::bench {

namespace {

constexpr std::uint64_t page = 4096;

// <linux/fs.h> of Linux 6.7, and <linux/mman.h> of 6.5: the headers may be older.
struct ScannedRegion {
  std::uint64_t start, end, categories;
};
struct ScanArguments {
  std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  std::uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
constexpr unsigned long pagemap_scan = _IOWR('f', 16, ScanArguments);
constexpr std::uint64_t is_present = 1 << 3;
constexpr std::uint64_t is_swapped = 1 << 4;

struct CachedRange {
  std::uint64_t offset, length;
};
struct CachedPages {
  std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
};
constexpr long cachestat = 451;

using Part = std::uint64_t __attribute__((vector_size(32)));

// The parts are those of a loop, so that loads do not wait for each other.
[[gnu::target("avx2")]] bool read_by_avx2(const void* memory, std::uint64_t bytes) {
  const auto* at = static_cast<const Part*>(memory);
  const auto* const end = at + bytes / sizeof(Part);
  Part a{}, b{}, c{}, d{};
  for (; at + 4 <= end; at += 4) {
    a |= at[0];
    b |= at[1];
    c |= at[2];
    d |= at[3];
  }
  const Part all = a | b | c | d;
  return (all[0] | all[1] | all[2] | all[3]) != 0;
}

bool read_by_words(const void* memory, std::uint64_t bytes) {
  const auto* words = static_cast<const std::uint64_t*>(memory);
  std::uint64_t all = 0;
  for (std::uint64_t i = 0; i < bytes / sizeof all; ++i)
    all |= words[i];
  return all != 0;
}

} // namespace

PagemapScan::PagemapScan() : pagemap_(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) {}

PagemapScan::~PagemapScan() {
  if (pagemap_ >= 0) close(pagemap_);
}

bool PagemapScan::works() const {
  ScanArguments scan{};
  scan.size = sizeof scan;
  return pagemap_ >= 0 && ioctl(pagemap_, pagemap_scan, &scan) >= 0;
}

std::uint64_t PagemapScan::pages(const void* memory, std::uint64_t bytes) const {
  thread_local std::array<ScannedRegion, 4096> regions;
  ScanArguments scan{};
  scan.size = sizeof scan;
  scan.start = reinterpret_cast<std::uintptr_t>(memory);
  scan.end = scan.start + bytes;
  scan.vec = reinterpret_cast<std::uintptr_t>(regions.data());
  scan.vec_len = regions.size();
  scan.category_anyof_mask = scan.return_mask = is_present | is_swapped;
  std::uint64_t found = 0;
  for (;;) {
    const int count = ioctl(pagemap_, pagemap_scan, &scan);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return 0;
    for (int i = 0; i < count; ++i)
      found += (regions[static_cast<std::size_t>(i)].end - regions[static_cast<std::size_t>(i)].start) / page;
    if (static_cast<std::size_t>(count) < regions.size()) return found;
    scan.start = regions.back().end;
  }
}

std::optional<std::uint64_t> pages_of_file(int fd, std::uint64_t bytes) {
  std::uint64_t found = 0;
  const auto occupied = [fd](std::uint64_t from, std::uint64_t to) -> std::optional<std::uint64_t> {
    if (to <= from) return 0;
    CachedRange range{from, to - from};
    CachedPages pages{};
    if (syscall(cachestat, fd, &range, &pages, 0) != 0) return std::nullopt;
    return pages.cached;
  };
  for (std::uint64_t at = 0; at < bytes;) {
    const off_t start = lseek(fd, static_cast<off_t>(at), SEEK_DATA);
    const auto data = start < 0 ? bytes : static_cast<std::uint64_t>(start);
    const auto in_hole = occupied(at, data);
    if (!in_hole) return std::nullopt;
    found += *in_hole;
    if (start < 0) break;
    at = static_cast<std::uint64_t>(lseek(fd, start, SEEK_HOLE));
    found += (at - data) / page;
  }
  return found;
}

bool read_all(const void* memory, std::uint64_t bytes) {
  return __builtin_cpu_supports("avx2") ? read_by_avx2(memory, bytes) : read_by_words(memory, bytes);
}

std::uint64_t available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string name;
  std::uint64_t kib = 0;
  for (std::string rest; file >> name >> kib && std::getline(file, rest);)
    if (name == "MemAvailable:") return kib * 1024;
  return 0;
}

} // namespace cppvmm::bench
