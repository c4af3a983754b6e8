#pragma once
#include "beside.hpp"
#include "floors.hpp"
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>
import cppvmm.guest_memory;

// Memory of guests, touched as it is by one that has booted, or in other ways.

namespace cppvmm::bench {

inline constexpr std::uint64_t kib = 1 << 10;
inline constexpr std::uint64_t mib = 1 << 20;
inline constexpr std::uint64_t gib = 1 << 30;

/// A region of small pages: which are touched is exact then. Nothing where this machine has no room for it; says so.
inline std::optional<Region> small_pages(Measurement& measurement, Backing backing, std::uint64_t start,
                                         std::uint64_t bytes) {
  auto region = backing == Backing::memfd ? Region::memfd(GuestAddress(start), bytes)
                                          : Region::anonymous(GuestAddress(start), bytes);
  if (!region) {
    measurement.skip(region.error().message());
    return std::nullopt;
  }
  // A kernel without huge pages refuses, and has none.
  static_cast<void>(region->set_huge_pages(HugePages::never));
  return *std::move(region);
}

inline void touch(const Region& region, std::uint64_t page) {
  static_cast<volatile char*>(region.host_address())[page * page_size] = 1;
}

/// `count` extents of so many bytes, evenly spread.
inline void touch_extents(const Region& region, std::uint64_t count, std::uint64_t bytes) {
  const std::uint64_t apart = region.pages().count() / count;
  for (std::uint64_t i = 0; i < count; ++i)
    for (std::uint64_t page = 0; page < bytes / page_size; ++page)
      touch(region, i * apart + page);
}

inline void touch_random_pages(const Region& region, std::uint64_t count) {
  std::mt19937_64 random(1);
  for (std::uint64_t i = 0; i < count; ++i)
    touch(region, random() % region.pages().count());
}

/// What a guest that has booted has touched: 128 extents of 4 MiB.
inline void touch_as_booted(const Region& region) { touch_extents(region, 128, unless_brief(4 * mib, 16 * kib)); }

/// Mappings of the process that are no guest's.
class OtherMappings {
public:
  explicit OtherMappings(std::uint64_t count)
      : bytes_(count * page_size),
        memory_(count == 0 ? nullptr : mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    // Neighbours that are alike would be one.
    for (std::uint64_t page = 1; page < count && memory_ != MAP_FAILED; page += 2)
      if (mprotect(static_cast<char*>(memory_) + page * page_size, page_size, PROT_READ | PROT_WRITE) != 0)
        is_short_ = true;
    if (memory_ == MAP_FAILED) is_short_ = true;
  }
  OtherMappings(const OtherMappings&) = delete;
  OtherMappings& operator=(const OtherMappings&) = delete;
  ~OtherMappings() {
    if (memory_ != nullptr && memory_ != MAP_FAILED) munmap(memory_, bytes_);
  }
  /// This machine allows a process fewer (vm.max_map_count).
  [[nodiscard]] bool is_short() const { return is_short_; }

private:
  std::uint64_t bytes_;
  void* memory_;
  bool is_short_ = false;
};

/// How many pages of the regions the bare system calls find touched; nothing where this kernel lacks them.
class BareScan {
public:
  explicit BareScan(std::vector<Region> regions) : regions_(std::move(regions)) {}
  [[nodiscard]] std::optional<std::uint64_t> pages() const {
    std::uint64_t all = 0;
    for (const Region& region : regions_)
      if (region.backing() == Backing::memfd) {
        const auto found = pages_of_file(region.file_descriptor(), region.bytes());
        if (!found) return std::nullopt;
        all += *found;
      } else if (scans_) {
        all += scan_.pages(region.host_address(), region.bytes());
      } else {
        return std::nullopt;
      }
    return all;
  }

private:
  std::vector<Region> regions_;
  PagemapScan scan_;
  bool scans_ = scan_.works();
};

inline constexpr const char* no_bare_scan = "this kernel has no PAGEMAP_SCAN (Linux 6.7), or no cachestat (6.5)";

/// A survey of the regions beside the bare system calls.
inline void survey_beside_bare_scan(Measurement& measurement, const std::vector<Region>& regions) {
  auto map = MemoryMap::make(regions);
  if (!map) return measurement.fail(map.error().message());
  const GuestMemory memory(*std::move(map));
  const BareScan bare(regions);
  const auto there = bare.pages();
  if (!there) return measurement.skip(no_bare_scan);
  const Survey survey = memory.survey();
  std::uint64_t given_up = 0;
  for (const RegionSurvey& region : survey.regions) {
    if (region.error) return measurement.fail(region.error->message());
    given_up += region.given_up_pages;
  }
  if (survey.touched.page_count() - given_up != *there)
    return measurement.fail("the survey found " + std::to_string(survey.touched.page_count()) +
                            " touched pages, the system calls " + std::to_string(*there));
  measurement.floor_takes(16 * survey.touched.range_count());
  measurement.run([&] { benchmark::DoNotOptimize(memory.survey()); }, [&] { benchmark::DoNotOptimize(bare.pages()); });
}

} // namespace cppvmm::bench
