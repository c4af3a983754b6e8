#include "input.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <fcntl.h>
#include <map>
#include <set>
#include <span>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "guest.hpp"

import cppvmm.guest_memory;

namespace cppvmm::fuzz {
namespace {

constexpr std::uint64_t rom_pages = 8;
constexpr std::uint64_t adopted_pages = 32;
constexpr std::uint64_t hole_pages = 64;
constexpr std::uint64_t space_pages = guest_space_end >> page_shift;

/// Where the embedder maps its memory: the kernel puts nothing else there by itself, so that what is unmapped stays so.
constexpr std::uintptr_t embedders_place = std::uintptr_t{1} << 45;

PageRange range(std::uint64_t first, std::uint64_t count) {
  const auto made = PageRange::make(PageNumber(first), count);
  require(made.has_value(), "a range of the fuzzer's own is in the guest-physical space");
  return *made;
}

template <class T>
T own(MemoryResult<T> result) {
  if (!result) std::fprintf(stderr, "%s\n", result.error().message().c_str());
  require(result.has_value(), "the fuzzer's own memory is to be had");
  return std::move(*result);
}

std::byte* embedders(std::uint64_t page) {
  return reinterpret_cast<std::byte*>(embedders_place) + (page << page_shift);
}

void map_embedders(std::uint64_t page, std::uint64_t pages, int flags) {
  require(mmap(embedders(page), pages << page_shift, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1,
               0) == embedders(page),
          "the embedder's memory can be mapped");
}

int page_tables() {
  static const int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  require(file >= 0, "/proc/self/pagemap can be read");
  return file;
}

} // namespace

Guest::Guest(std::uint64_t ram_pages) : access_(adopted_pages, Access::write) {
  slots_[anonymous].pages = range(0, ram_pages);
  slots_[memfd].pages = range(ram_pages, ram_pages);
  slots_[rom].pages = range(2 * ram_pages, rom_pages);
  slots_[adopted].pages = range(2 * ram_pages + rom_pages + hole_pages, adopted_pages);
  slots_[last].pages = range(space_pages - 1, 1);
  const auto start = [&](Slot slot) { return slots_[slot].pages.start_address(); };
  const auto bytes = [&](Slot slot) { return slots_[slot].pages.bytes(); };
  slots_[anonymous].region = own(Region::anonymous(start(anonymous), bytes(anonymous)));
  slots_[memfd].region = own(Region::memfd(start(memfd), bytes(memfd)));
  slots_[rom].region = own(Region::memfd(start(rom), bytes(rom), RegionKind::rom));
  slots_[last].region = own(Region::memfd(start(last), bytes(last)));
  map_embedders(0, adopted_pages, MAP_FIXED_NOREPLACE);
  slots_[adopted].region = own(Region::adopt(
      start(adopted), {.host_address = embedders(0), .bytes = bytes(adopted), .backing = Backing::anonymous}));
  std::vector<Region> regions;
  for (const Place& place : slots_)
    regions.push_back(*place.region);
  memory_.replace(own(MemoryMap::make(std::move(regions))));
  // Firmware, with a page of zeros that no answer may name.
  const std::array code = {std::byte{0xF4}, std::byte{0xEB}, std::byte{0xFD}};
  require(memory_.snapshot()->load(start(rom), code).has_value(), "firmware is loaded");
  note_write(start(rom), code);
}

Guest::~Guest() {
  memory_.replace({});
  slots_[adopted].region.reset();
  munmap(embedders(0), adopted_pages << page_shift);
}

const Guest::Place* Guest::place_of(PageNumber page) const {
  const auto place =
      std::ranges::find_if(slots_, [&](const Place& each) { return each.is_in_map && each.pages.contains(page); });
  return place == slots_.end() ? nullptr : &*place;
}

Guest::Access Guest::access(PageNumber page) const {
  const Place* const place = place_of(page);
  if (place == nullptr) return Access::gone;
  if (place == &slots_[rom]) return Access::read;
  return place == &slots_[adopted] ? access_[page.value() - place->pages.first().value()] : Access::write;
}

bool Guest::is_ram(PageNumber page) const {
  const Place* const place = place_of(page);
  return place != nullptr && place != &slots_[rom];
}
bool Guest::can_read(PageNumber page) const { return access(page) == Access::read || access(page) == Access::write; }
bool Guest::can_write(PageNumber page) const { return access(page) == Access::write; }

std::byte* Guest::host(PageNumber page) const {
  const Place& place = *place_of(page);
  return static_cast<std::byte*>(place.region->host_address()) +
         ((page.value() - place.pages.first().value()) << page_shift);
}

std::uint64_t Guest::any_address(Input& input) const {
  const std::uint8_t how = input.byte();
  if ((how & 0xF0) == 0xF0) return input.take<std::uint64_t>();
  std::uint64_t page = 0;
  if ((how & 1) == 0) {
    page = input.below(slots_[adopted].pages.end().value() + 2);
  } else {
    const Place& place = slots_[(how >> 1) % slots];
    page = (how & 0x10) != 0 ? place.pages.first().value() + input.byte() % place.pages.count()
                             : place.pages.end().value() - 1 + input.byte() % 2;
  }
  if ((how & 0xE0) == 0) return page << page_shift;
  const std::uint64_t offset = input.take<std::uint16_t>() & (page_size - 1);
  return (page << page_shift) + ((how & 0x80) != 0 ? offset : offset & ~std::uint64_t{7});
}

PageRange Guest::any_range(Input& input, std::uint64_t most) const {
  const std::uint64_t first = std::min(any_page(input).value(), space_pages);
  return range(first, std::min(1 + input.below(most), space_pages - first));
}

void Guest::toggle(Slot slot) {
  Place& place = slots_[slot];
  if (place.is_in_map) {
    require(memory_.remove_region(place.pages.start_address()).has_value(), "a region of the map can be removed");
  } else {
    require(memory_.add_region(*place.region).has_value(), "a region can come back");
  }
  place.is_in_map = !place.is_in_map;
  settle();
}

void Guest::settle() {
  const std::vector<std::uint64_t> pages(maybe_zero_.begin(), maybe_zero_.end());
  for (const std::uint64_t page : pages)
    check(PageNumber(page));
}

void Guest::protect(Input& input) {
  const std::uint64_t index = input.below(adopted_pages);
  const auto to = static_cast<Access>(input.byte() % 4);
  if (to == Access::gone) {
    require(munmap(embedders(index), page_size) == 0, "the embedder can unmap");
  } else {
    constexpr std::array protections = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
    if (access_[index] == Access::gone) {
      map_embedders(index, 1, MAP_FIXED_NOREPLACE);
      note_zero(range(slots_[adopted].pages.first().value() + index, 1));
    }
    require(mprotect(embedders(index), page_size, protections[static_cast<unsigned>(to)]) == 0,
            "the embedder can protect");
  }
  access_[index] = to;
  settle();
}

void Guest::write_something(Input& input) {
  const GuestAddress address(any_address(input));
  const std::uint8_t how = input.byte();
  const auto bytes = input.bytes(1 + how % 64);
  if (bytes.empty()) return;
  const auto end = address.checked_add(bytes.size());
  if (!end) {
    require(!memory_.write(address, bytes), "nothing is written beyond the guest-physical space");
    return;
  }
  const PageNumber ends[] = {address.page(), GuestAddress(end->value() - 1).page()};
  if (std::ranges::all_of(ends, [&](PageNumber page) { return can_write(page); })) {
    if ((how & 0x80) == 0 || ends[0] != ends[1])
      require(memory_.write(address, bytes).has_value(), "memory of the guest's can be written");
    else
      std::memcpy(host(ends[0]) + address.offset_in_page(), bytes.data(), bytes.size());
    note_write(address, bytes);
    return;
  }
  const auto done = memory_.write(address, bytes);
  require(!done, "no other memory can be written");
  const std::uint64_t completed = done.error().completed;
  require(completed < bytes.size(), "a write that fails is no whole one");
  note_write(address, bytes.first(completed));
}

PageSet Guest::discard_something(Input& input) {
  const PageRange pages = any_range(input, 40);
  const auto done = memory_.discard(PageSet(pages));
  if (done) {
    for (std::uint64_t i = 0; i < pages.count(); ++i)
      require(is_ram(PageNumber(pages.first().value() + i)), "what is discarded is RAM");
    require(done->freed_pages + done->cleared_pages == pages.count(), "each page is freed or cleared");
    note_zero(pages);
    return {pages};
  }
  if (done.error().code == MemoryErrc::inaccessible || done.error().code == MemoryErrc::os) {
    for (std::uint64_t i = 0; i < pages.count(); ++i)
      note_maybe_zero(PageNumber(pages.first().value() + i));
  }
  settle();
  return {};
}

void Guest::note_write(GuestAddress address, std::span<const std::byte> bytes) {
  std::uint64_t at = address.value();
  while (!bytes.empty()) {
    const std::uint64_t offset = at & (page_size - 1);
    const auto part = bytes.first(std::min<std::uint64_t>(bytes.size(), page_size - offset));
    std::ranges::copy(part, written_[at >> page_shift].begin() + static_cast<std::ptrdiff_t>(offset));
    bytes = bytes.subspan(part.size());
    at += part.size();
  }
}

void Guest::note_zero(PageRange pages) {
  written_.erase(written_.lower_bound(pages.first().value()), written_.lower_bound(pages.end().value()));
  maybe_zero_.erase(maybe_zero_.lower_bound(pages.first().value()), maybe_zero_.lower_bound(pages.end().value()));
}

Page Guest::expected(PageNumber page) const {
  const auto found = written_.find(page.value());
  return found == written_.end() ? Page{} : found->second;
}

Page Guest::content(PageNumber page) const {
  Page found;
  std::memcpy(found.data(), host(page), found.size());
  return found;
}

void Guest::check(PageNumber page) {
  if (!can_read(page)) return;
  if (maybe_zero_.erase(page.value()) != 0 && is_equal(host(page), zeros)) written_.erase(page.value());
  const auto written = written_.find(page.value());
  if (is_equal(host(page), written == written_.end() ? zeros : written->second)) return;
  std::fprintf(stderr, "page 0x%llx\n", static_cast<unsigned long long>(page.value()));
  require(false, "a page holds what was written there");
}

template <class Each>
void Guest::for_each_present(const Place& place, Each each) const {
  const std::uint64_t first = place.pages.first().value();
  if (place.region->backing() == Backing::memfd) {
    const int file = place.region->file_descriptor();
    for (off_t at = 0; (at = lseek(file, at, SEEK_DATA)) >= 0;) {
      const off_t hole = lseek(file, at, SEEK_HOLE);
      for (; at < hole; at += static_cast<off_t>(page_size))
        each(PageNumber(first + (static_cast<std::uint64_t>(at) >> page_shift)));
    }
    return;
  }
  std::vector<std::uint64_t> entries(place.pages.count());
  const auto host_page = reinterpret_cast<std::uintptr_t>(place.region->host_address()) >> page_shift;
  const auto size = static_cast<ssize_t>(entries.size() * sizeof(std::uint64_t));
  require(pread(page_tables(), entries.data(), static_cast<std::size_t>(size),
                static_cast<off_t>(host_page * sizeof(std::uint64_t))) == size,
          "page tables can be read");
  // Bit 63: present, bit 62: swapped out.
  for (std::uint64_t i = 0; i < entries.size(); ++i)
    if (entries[i] >> 62 != 0) each(PageNumber(first + i));
}

void Guest::check(bool all) {
  settle();
  std::vector<std::uint64_t> known;
  for (const auto& [page, content] : written_)
    known.push_back(page);
  for (const std::uint64_t page : known)
    check(PageNumber(page));
  for (const Place& place : slots_) {
    if (!place.is_in_map) continue;
    if (all) {
      for (std::uint64_t i = 0; i < place.pages.count(); ++i)
        check(PageNumber(place.pages.first().value() + i));
    } else {
      for_each_present(place, [&](PageNumber page) { check(page); });
    }
  }
}

} // namespace cppvmm::fuzz
