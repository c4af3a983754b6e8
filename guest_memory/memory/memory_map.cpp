module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <iterator>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>
module cppvmm.guest_memory:memory_map.impl;
import :address;
import :backing;
import :error;
import :guest_copy;
import :memory_map;
import :page_set;
import :region;

namespace cppvmm {

/// Where the bytes of a region are: in a file, or at an address.
struct HostPlace {
  std::uint64_t device;
  std::uint64_t inode;
  std::uint64_t start;
  std::uint64_t end;
  const Region* region;
};

/// The second of two regions of RAM that are the same host memory, or null. Every region counts by its addresses, and
/// shared mappings of files by their place in the file as well.
static const Region* find_alias(const std::vector<Region>& regions) {
  std::vector<HostPlace> places;
  for (const Region& region : regions) {
    if (region.kind() != RegionKind::ram) continue;
    const auto host = reinterpret_cast<std::uintptr_t>(region.host_address());
    places.push_back({0, 0, host, host + region.bytes(), &region});
    if (const auto file = region.shared_file_id())
      places.push_back(
          {file->device, file->inode, region.file_offset(), region.file_offset() + region.bytes(), &region});
  }
  std::ranges::sort(places, {}, [](const HostPlace& place) {
    return std::tuple(place.device, place.inode, place.start, place.region->start().value());
  });
  const auto clash = std::ranges::adjacent_find(places, [](const HostPlace& left, const HostPlace& right) {
    return left.device == right.device && left.inode == right.inode && right.start < left.end;
  });
  return clash == places.end() ? nullptr : std::next(clash)->region;
}

MemoryResult<MemoryMap> MemoryMap::make(std::vector<Region> regions) {
  std::ranges::sort(regions, {}, [](const Region& region) { return region.pages().first(); });
  const auto clash = std::ranges::adjacent_find(
      regions, [](const Region& left, const Region& right) { return left.pages().overlaps(right.pages()); });
  if (clash != regions.end()) {
    const Region& second = *std::next(clash);
    return std::unexpected(MemoryError{.code = MemoryErrc::overlap,
                                       .address = second.start().value(),
                                       .length = second.bytes(),
                                       .operation = "MemoryMap::make"});
  }
  if (const Region* second = find_alias(regions))
    return std::unexpected(MemoryError{.code = MemoryErrc::overlap,
                                       .address = second->start().value(),
                                       .length = second->bytes(),
                                       .operation = "MemoryMap::make: RAM that another region has already"});
  MemoryMap map;
  map.set_regions(std::move(regions));
  return map;
}

void MemoryMap::set_regions(std::vector<Region> regions) {
  places_.clear();
  places_.reserve(regions.size());
  largest_ = 0;
  for (const Region& region : regions) {
    places_.push_back({.first = region.start().value(),
                       .bytes = region.bytes(),
                       .host = static_cast<std::byte*>(region.host_address()),
                       .is_adopted = region.is_adopted(),
                       .is_rom = region.kind() == RegionKind::rom});
    if (places_.back().bytes > places_[largest_].bytes) largest_ = places_.size() - 1;
  }
  regions_ = std::move(regions);
}

MemoryResult<MemoryMap> MemoryMap::with(Region region) const {
  auto regions = regions_;
  regions.push_back(std::move(region));
  return make(std::move(regions));
}

MemoryResult<MemoryMap> MemoryMap::without(GuestAddress start) const {
  const Region* region = find(start);
  if (region == nullptr || region->start() != start)
    return std::unexpected(
        MemoryError{.code = MemoryErrc::not_backed, .address = start.value(), .operation = "MemoryMap::without"});
  std::vector<Region> rest = regions_;
  rest.erase(rest.begin() + (region - regions_.data()));
  MemoryMap map;
  map.set_regions(std::move(rest));
  return map;
}

const MemoryMap::Place* MemoryMap::place_of(std::uint64_t address) const {
  if (places_.empty()) return nullptr;
  const Place& largest = places_[largest_];
  if (address - largest.first < largest.bytes) return &largest;
  const auto after = std::ranges::upper_bound(places_, address, {}, &Place::first);
  if (after == places_.begin()) return nullptr;
  const Place& place = *std::prev(after);
  return address - place.first < place.bytes ? &place : nullptr;
}

const MemoryMap::Place* MemoryMap::plain_place(GuestAddress address, std::uint64_t bytes) const {
  const Place* place = place_of(address.value());
  if (place == nullptr || bytes > place->bytes - (address.value() - place->first)) return nullptr;
  return reach_of(place->is_adopted) == GuestReach::plain ? place : nullptr;
}

const Region* MemoryMap::find(GuestAddress address) const {
  const Place* place = place_of(address.value());
  return place == nullptr ? nullptr : &regions_[static_cast<std::size_t>(place - places_.data())];
}

PageSet MemoryMap::pages(RegionKind kind) const {
  PageSet result;
  for (const Region& region : regions_)
    if (region.kind() == kind) result.add(region.pages());
  return result;
}

template <class Copy>
MemoryResult<void> MemoryMap::for_each_part(GuestAddress address, std::uint64_t bytes, Access access,
                                            const char* operation, Copy copy) const {
  MemoryError error{.address = address.value(), .length = bytes, .operation = operation};
  const auto refuse = [&](MemoryErrc code, GuestAddress where, std::uint64_t completed) {
    error.code = code;
    error.address = where.value();
    error.completed = completed;
    return std::unexpected(error);
  };
  if (!address.checked_add(bytes)) return refuse(MemoryErrc::out_of_range, address, 0);
  for (std::uint64_t done = 0; done < bytes;) {
    const GuestAddress at(address.value() + done);
    const Region* region = find(at);
    if (region == nullptr) return refuse(MemoryErrc::not_backed, at, done);
    if ((access == Access::write || access == Access::check_write) && region->kind() == RegionKind::rom)
      return refuse(MemoryErrc::read_only, at, done);
    const std::uint64_t offset = at.value() - region->start().value();
    const std::uint64_t part = std::min(bytes - done, region->bytes() - offset);
    // Before the bytes change: a survey that begins after they did finds the record.
    if (access == Access::write || access == Access::load) region->record_write(offset, part);
    const GuestAccess result = copy(*region, static_cast<std::byte*>(region->host_address()) + offset, done, part);
    if (result.error != 0) {
      error.os_error = result.error;
      return refuse(result.code(), GuestAddress(at.value() + result.done), done + result.done);
    }
    done += part;
  }
  return {};
}

/// What became of an access to memory that is all of one region.
static MemoryResult<void> result_of(const GuestAccess& access, GuestAddress address, std::uint64_t bytes,
                                    const char* operation) {
  if (access.error == 0) return {};
  return std::unexpected(MemoryError{.code = access.code(),
                                     .address = address.value() + access.done,
                                     .length = bytes,
                                     .completed = access.done,
                                     .os_error = access.error,
                                     .operation = operation});
}

MemoryResult<void> MemoryMap::read(GuestAddress address, std::span<std::byte> into) const {
  if (const Place* place = plain_place(address, into.size()))
    return result_of(
        copy_from_guest(GuestReach::plain, into.data(), place->host + (address.value() - place->first), into.size()),
        address, into.size(), "MemoryMap::read");
  return for_each_part(address, into.size(), Access::read, "MemoryMap::read",
                       [&](const Region& region, const std::byte* host, std::uint64_t done, std::uint64_t part) {
                         return copy_from_guest(reach_of(region.is_adopted()), into.data() + done, host, part);
                       });
}

MemoryResult<void> MemoryMap::write(GuestAddress address, std::span<const std::byte> from) const {
  if (const Place* place = plain_place(address, from.size()); place != nullptr && !place->is_rom) {
    const std::uint64_t offset = address.value() - place->first;
    regions_[static_cast<std::size_t>(place - places_.data())].record_write(offset, from.size());
    return result_of(copy_to_guest(GuestReach::plain, place->host + offset, from.data(), from.size()), address,
                     from.size(), "MemoryMap::write");
  }
  return for_each_part(address, from.size(), Access::write, "MemoryMap::write",
                       [&](const Region& region, std::byte* host, std::uint64_t done, std::uint64_t part) {
                         return copy_to_guest(reach_of(region.is_adopted()), host, from.data() + done, part);
                       });
}

MemoryResult<void> MemoryMap::load(GuestAddress address, std::span<const std::byte> from) const {
  return for_each_part(address, from.size(), Access::load, "MemoryMap::load",
                       [&](const Region& region, std::byte* host, std::uint64_t done, std::uint64_t part) {
                         return copy_to_guest(reach_of(region.is_adopted()), host, from.data() + done, part);
                       });
}

MemoryResult<void> MemoryMap::check_write(GuestAddress address, std::uint64_t bytes) const {
  return for_each_part(address, bytes, Access::check_write, "MemoryMap::check_write",
                       [](const Region& region, std::byte* host, std::uint64_t, std::uint64_t part) {
                         return region.is_adopted() ? probe_guest(host, part) : GuestAccess{.done = part};
                       });
}

/// The part of a range that one region has.
struct RegionPart {
  const Region* region;
  PageRange pages;
};

static std::unexpected<MemoryError> refuse_part(MemoryErrc code, const RegionPart& part, const char* operation) {
  return std::unexpected(MemoryError{.code = code,
                                     .address = part.pages.start_address().value(),
                                     .length = part.pages.bytes(),
                                     .operation = operation});
}

/// The pages, by region; not_backed where one is in none.
static MemoryResult<std::vector<RegionPart>> parts_of(const MemoryMap& map, const PageSet& pages,
                                                      const char* operation) {
  std::vector<RegionPart> parts;
  for (const PageRange& range : pages.ranges()) {
    for (PageNumber at = range.first(); at < range.end();) {
      const Region* region = map.find(GuestAddress(at.value() * page_size));
      const PageNumber end = region == nullptr ? range.end() : std::min(range.end(), region->pages().end());
      const auto part = PageRange::make(at, end.value() - at.value());
      if (!part) return std::unexpected(part.error());
      if (region == nullptr) return refuse_part(MemoryErrc::not_backed, {nullptr, *part}, operation);
      parts.push_back({region, *part});
      at = end;
    }
  }
  return parts;
}

MemoryResult<Discarded> MemoryMap::discard(const PageSet& pages, DiscardMode mode) const {
  constexpr const char* operation = "MemoryMap::discard";
  const auto parts = parts_of(*this, pages, operation);
  if (!parts) return std::unexpected(parts.error());
  for (const RegionPart& part : *parts) {
    if (part.region->kind() == RegionKind::rom) return refuse_part(MemoryErrc::read_only, part, operation);
    if (part.region->backing() == Backing::unknown && mode != DiscardMode::free_only)
      return refuse_part(MemoryErrc::unavailable, part, operation);
  }
  Discarded sum;
  for (const RegionPart& part : *parts) {
    auto done = part.region->discard(part.pages, mode);
    if (!done) {
      done.error().completed = (sum.freed_pages + sum.cleared_pages) * page_size;
      return done;
    }
    sum.freed_pages += done->freed_pages;
    sum.cleared_pages += done->cleared_pages;
    sum.kept_pages += done->kept_pages;
  }
  return sum;
}

MemoryResult<std::uint64_t> MemoryMap::advise(const PageSet& pages, PageUse use) const {
  const auto parts = parts_of(*this, pages, "MemoryMap::advise");
  if (!parts) return std::unexpected(parts.error());
  std::uint64_t advised = 0;
  for (const RegionPart& part : *parts) {
    if (const auto done = part.region->advise(part.pages, use))
      advised += part.pages.count();
    else if (done.error().code != MemoryErrc::unavailable)
      return std::unexpected(done.error());
  }
  return advised;
}

MemoryResult<void> MemoryMap::set_huge_pages(HugePages use) const {
  for (const Region& region : regions_) {
    if (region.kind() != RegionKind::ram || !traits_of(region.backing()).may_be_transparent_huge) continue;
    if (auto done = region.set_huge_pages(use); !done) return done;
  }
  return {};
}

} // namespace cppvmm
