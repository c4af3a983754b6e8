#include "support/machine_facts.hpp"
#include "support/overlay_file.hpp"
#include "support/temporary_file.hpp"

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#include "arena.hpp"

namespace cppvmm::oracle {
namespace {

std::unexpected<std::string> failure(const std::string& what) {
  return std::unexpected(what + ": " + std::generic_category().message(errno));
}

std::expected<test::Descriptor, std::string> file_for(const MovingHost& host, MovingMemory memory) {
  switch (memory) {
  case MovingMemory::private_overlay_file:
  case MovingMemory::shared_overlay_file:
    return test::overlay_file();
  case MovingMemory::private_disk_file:
  case MovingMemory::shared_disk_file:
    return host.disk_file();
  default:
    const auto made = test::temporary_file();
    if (!made) return std::unexpected(made.error());
    return test::Descriptor(*made);
  }
}

} // namespace

std::expected<std::unique_ptr<Arena>, std::string> Arena::make(const MovingHost& host, MovingMemory memory) {
  std::unique_ptr<Arena> arena(new Arena);
  arena->memory_ = memory;
  arena->block_bytes_ = is_hugetlb(memory) ? static_cast<std::uint64_t>(HugePageSize::two_mib) : page_size;
  arena->blocks_ = is_hugetlb(memory) ? 16 : 1024;
  const std::uint64_t used = arena->bytes();
  const std::uint64_t bytes = used / 2 * 3;
  for (std::uint32_t block = 0; block < arena->blocks_; ++block)
    arena->by_use_[static_cast<unsigned>(arena->use(block))].push_back(block);
  if (is_hugetlb(memory) && !host.has_huge_pages()) return std::unexpected("no huge pages");

  const GuestAddress start(0);
  const auto map = [&](int flags, int file) -> bool {
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file, 0);
    if (mapped == MAP_FAILED) return false;
    arena->own_ = mapped;
    arena->own_bytes_ = bytes;
    return true;
  };
  const auto adopt = [&](Backing backing) {
    return Region::adopt(
        start,
        {.host_address = arena->own_, .bytes = bytes, .backing = backing, .fd = arena->file_.number(), .fd_offset = 0});
  };
  MemoryResult<Region> made = std::unexpected(MemoryError{});
  switch (memory) {
  case MovingMemory::anonymous:
  case MovingMemory::anonymous_huge:
    made = Region::anonymous(start, bytes);
    break;
  case MovingMemory::memfd:
    made = Region::memfd(start, bytes);
    break;
  case MovingMemory::hugetlb:
    made = Region::hugetlb(start, bytes, HugePageSize::two_mib);
    break;
  case MovingMemory::hugetlb_memfd:
    made = Region::hugetlb_memfd(start, bytes, HugePageSize::two_mib);
    break;
  case MovingMemory::shared_anonymous:
    if (!map(MAP_SHARED | MAP_ANONYMOUS, -1)) return failure("mmap");
    made = adopt(Backing::shared_anonymous);
    break;
  default: {
    auto file = file_for(host, memory);
    if (!file) return std::unexpected(file.error());
    arena->file_ = std::move(*file);
    const int number = arena->file_.number();
    if (ftruncate(number, static_cast<off_t>(bytes)) != 0) return failure("ftruncate");
    if (!is_private_file(memory)) {
      if (!map(MAP_SHARED, number)) return failure("mmap of a file");
      // A file of a tmpfs is a memfd of another name.
      made = adopt(test::file_facts(number).in_memory ? Backing::memfd : Backing::shared_file);
      break;
    }
    for (const Use use : {Use::kept, Use::lost})
      for (const std::uint32_t block : arena->blocks_of(use)) {
        const std::uint64_t word = Arena::word(block, 1);
        const auto where = static_cast<off_t>(block * arena->block_bytes_ + arena->word_offset(block));
        if (pwrite(number, &word, sizeof word, where) != sizeof word) return failure("pwrite");
      }
    made = Region::private_file(start, bytes, number, 0);
  }
  }
  if (!made) return std::unexpected(made.error().message());
  arena->region_ = std::make_unique<Region>(std::move(*made));
  arena->start_ = static_cast<std::byte*>(arena->region_->host_address());
  // Kinds that cannot have them say EINVAL.
  if (memory == MovingMemory::anonymous) static_cast<void>(madvise(arena->start_, bytes, MADV_NOHUGEPAGE));
  if (memory == MovingMemory::anonymous_huge) static_cast<void>(madvise(arena->start_, bytes, MADV_HUGEPAGE));
  return arena;
}

Arena::~Arena() {
  region_.reset();
  if (own_ != nullptr) munmap(own_, own_bytes_);
}

Use Arena::use(std::uint32_t block) const {
  const auto use = static_cast<Use>(block % 8);
  if (use == Use::kept && block % 64 == 8) return Use::lost;
  return use == Use::shared && is_private(memory_) ? Use::rewritten : use;
}

PageNumber Arena::data_page(std::uint32_t block) const {
  return PageNumber((block * block_bytes_ + word_offset(block)) / page_size);
}

std::uint64_t Arena::word_offset(std::uint32_t block) const {
  const std::uint64_t page = block * std::uint64_t{7} % (block_bytes_ / page_size);
  return page * page_size + std::uint64_t{block / 8 % 4} * 808;
}

std::uint64_t Arena::word(std::uint32_t block, std::uint32_t state) {
  // Some are alike, for KSM to merge; but none with one that may be lost, or that would be lost too.
  const std::uint64_t own = block % 64 == 8 ? block : 0;
  return (own << 48) + (std::uint64_t{state} << 16) + 0x100 + block / 8 % 4;
}

std::uint64_t* Arena::at(std::uint32_t block) const {
  return reinterpret_cast<std::uint64_t*>(host(block) + word_offset(block));
}

std::vector<std::uint32_t> Arena::states() const {
  std::vector<std::uint32_t> result(blocks_);
  for (std::uint32_t block = 0; block < blocks_; ++block)
    result[block] = state(block).now();
  return result;
}

void Arena::write(std::uint32_t block) const {
  std::atomic_ref(*at(block)).store(word(block, state(block).now() + 1), std::memory_order_relaxed);
  state(block).publish_written();
}
void Arena::rewrite(std::uint32_t block) const {
  std::atomic_ref(*at(block)).store(word(block, state(block).now()), std::memory_order_relaxed);
}
void Arena::read(std::uint32_t block) const {
  static_cast<void>(std::atomic_ref(*at(block)).load(std::memory_order_relaxed));
}

bool Arena::discard(std::uint32_t block) const {
  state(block).publish_discard();
  return madvise(host(block), block_bytes_, is_private(memory_) ? MADV_DONTNEED : MADV_REMOVE) == 0;
}

void Arena::fill() const {
  for (const Use use : {Use::kept, Use::lost, Use::rewritten})
    for (const std::uint32_t block : blocks_of(use)) {
      if (is_private_file(memory_) && use != Use::rewritten)
        state(block).publish_written(); // the file has it
      else
        write(block);
    }
}

std::uint64_t Arena::spoiled() const {
  std::uint64_t count = 0;
  for (std::uint32_t block = 0; block < blocks_; ++block) {
    const std::uint32_t now = state(block).now();
    const Use what = use(block);
    if (what == Use::lost) continue;
    if (holds_data(now) && *at(block) != word(block, now)) ++count;
    if (what == Use::empty && *at(block) != 0) ++count;
  }
  return count;
}

} // namespace cppvmm::oracle
