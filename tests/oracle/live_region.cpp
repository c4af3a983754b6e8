#include "support/locked_memory.hpp"
#include "support/machine_facts.hpp"
#include "support/temporary_file.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <fcntl.h>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#include "live_region.hpp"

namespace cppvmm::oracle {
namespace {

constexpr std::uint32_t huge_pages = 512; // 4 KiB pages in a huge page

// include/uapi/asm-generic/mman-common.h (Linux 5.14), which the C library's headers may lack.
constexpr int madv_populate_write = 23;

std::unexpected<std::string> failure(const char* what) {
  return std::unexpected(std::string(what) + ": " + std::generic_category().message(errno));
}

} // namespace

const char* to_string(Reason reason) {
  constexpr const char* words[reason_kinds] = {
      "for no reason",
      "the page was written: with zeros, or with data that was overwritten with zeros",
      "the page was read: shared memory is allocated by that, kernels without a shared page of zeros give the reader "
      "a page of its own, and older kernels cannot tell it from a write",
      "the memory was populated or collapsed into huge pages beforehand",
      "a neighbour in the same huge page was touched",
      "this kernel has no evidence for this kind of memory",
      "the embedder marked the page as touched",
      "the embedder left the page out",
      "the page holds the answer",
      "the page is in a range that is smaller than the 255 largest",
      "the page is swapped out, or is of a disk's file and not mapped, so that its content was not looked at",
      "huge pages of the pool were discarded by madvise or fallocate while they were watched: what protected them "
      "stays in the page tables, and looks like a page"};
  return words[static_cast<unsigned>(reason) % reason_kinds];
}

std::expected<std::unique_ptr<LiveRegion>, std::string> LiveRegion::make(const RegionSpec& spec,
                                                                         std::uint64_t first_page) {
  std::unique_ptr<LiveRegion> live(new LiveRegion);
  live->spec_ = spec;
  if (is_hugetlb(spec.memory)) live->spec_.pages = (spec.pages + huge_pages - 1) / huge_pages * huge_pages;
  live->first_page_ = first_page;
  const std::uint64_t bytes = live->spec_.pages * page_size;
  const GuestAddress start(first_page * page_size);
  const RegionKind kind = spec.rom ? RegionKind::rom : RegionKind::ram;
  live->contents_.assign(live->spec_.pages, Content::zero);
  live->reasons_.assign(live->spec_.pages, Reason::none);
  live->ever_touched_.assign(live->spec_.pages, false);
  live->file_contents_.assign(live->spec_.pages, Content::zero);
  live->proven_.assign(live->spec_.pages, false);
  live->writers_.assign(live->spec_.pages, 0);

  // Some of a file or a larger mapping lies outside the region.
  const std::uint64_t slice = (spec.file_seed % 5) * page_size;
  const auto own_file = [&](int fd, std::uint64_t offset) {
    live->own_fd_ = live->file_ = fd;
    live->file_offset_ = offset;
  };
  const int populate = spec.before == Before::populated ? MAP_POPULATE : 0;
  MemoryResult<Region> made = std::unexpected(MemoryError{});
  const auto adopt = [&](Backing backing) {
    made = Region::adopt(
        start,
        {.host_address = static_cast<std::byte*>(live->own_) + (live->own_bytes_ - bytes),
         .bytes = bytes,
         .backing = backing,
         .fd = backing == Backing::anonymous || backing == Backing::shared_anonymous || backing == Backing::unknown
                   ? -1
                   : live->own_fd_,
         .fd_offset = live->file_offset_},
        kind);
  };
  const auto map = [&](std::uint64_t extra, int flags, int fd, std::uint64_t offset) {
    live->own_bytes_ = bytes + extra;
    live->own_ = mmap(nullptr, live->own_bytes_, PROT_READ | PROT_WRITE, flags, fd, static_cast<off_t>(offset));
    if (live->own_ == MAP_FAILED) live->own_ = nullptr;
    return live->own_ != nullptr;
  };
  switch (spec.memory) {
  case Memory::anonymous:
    made = Region::anonymous(start, bytes, kind);
    break;
  case Memory::memfd:
    made = Region::memfd(start, bytes, kind);
    if (made) live->file_ = made->file_descriptor();
    break;
  case Memory::hugetlb:
    made = Region::hugetlb(start, bytes, HugePageSize::two_mib, kind);
    break;
  case Memory::hugetlb_memfd:
    made = Region::hugetlb_memfd(start, bytes, HugePageSize::two_mib, kind);
    if (made) live->file_ = made->file_descriptor();
    break;
  case Memory::adopted_anonymous:
  case Memory::unknown:
    if (!map(slice, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | populate, -1, 0)) return failure("mmap");
    adopt(spec.memory == Memory::unknown ? Backing::unknown : Backing::anonymous);
    break;
  case Memory::shared_anonymous:
    if (!map(slice, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE | populate, -1, 0)) return failure("mmap");
    adopt(Backing::shared_anonymous);
    break;
  case Memory::adopted_memfd:
    own_file(memfd_create("oracle", MFD_CLOEXEC), slice);
    if (live->own_fd_ < 0 || ftruncate(live->own_fd_, static_cast<off_t>(bytes + 2 * slice)) != 0)
      return failure("memfd");
    // What lies before the region in the file is none of its business.
    if (slice > 0 && pwrite(live->own_fd_, "x", 1, static_cast<off_t>(slice - 1)) != 1) return failure("pwrite");
    if (!map(0, MAP_SHARED | populate, live->own_fd_, slice)) return failure("mmap of a memfd");
    adopt(Backing::memfd);
    break;
  case Memory::shared_file: {
    auto file = test::temporary_file();
    if (!file) return std::unexpected(file.error());
    own_file(*file, slice);
    if (ftruncate(*file, static_cast<off_t>(bytes + slice)) != 0) return failure("ftruncate");
    if (!map(0, MAP_SHARED | populate, *file, slice)) return failure("mmap of a file");
    adopt(Backing::shared_file);
    break;
  }
  case Memory::private_file:
  case Memory::adopted_private_file:
    if (auto opened = live->open_snapshot(slice); !opened) return std::unexpected(opened.error());
    if (spec.memory == Memory::private_file) {
      made = Region::private_file(start, bytes, live->own_fd_, live->file_offset_, kind);
    } else {
      if (!map(0, MAP_PRIVATE | MAP_NORESERVE | populate, live->own_fd_, live->file_offset_))
        return failure("mmap of a snapshot");
      adopt(Backing::private_file);
    }
    break;
  }
  if (!made) return std::unexpected(made.error().message());
  live->region_ = std::make_unique<Region>(std::move(*made));
  // What lies before it in the file comes in a huge page with what the region has of that.
  if (spec.memory == Memory::adopted_memfd && slice > 0 && live->is_coarse()) live->touched(0, 1, Reason::huge_page);
  if (auto prepared = live->prepare(); !prepared) return std::unexpected(prepared.error());
  return live;
}

LiveRegion::~LiveRegion() {
  region_.reset();
  if (own_ != nullptr) munmap(own_, own_bytes_);
  if (own_fd_ >= 0) close(own_fd_);
}

/// A sparse file with data in a few extents, of whole blocks.
std::expected<void, std::string> LiveRegion::open_snapshot(std::uint64_t slice) {
  auto file = test::temporary_file();
  if (!file) return std::unexpected(file.error());
  own_fd_ = *file;
  file_offset_ = slice;
  const std::uint64_t bytes = spec_.pages * page_size;
  if (ftruncate(own_fd_, static_cast<off_t>(slice + bytes + page_size)) != 0) return failure("ftruncate");
  std::mt19937 random(spec_.file_seed);
  std::array<char, page_size> block;
  for (unsigned extent = random() % 4; extent > 0; --extent) {
    const auto first = static_cast<std::uint32_t>(random() % spec_.pages);
    const auto end = std::min<std::uint32_t>(spec_.pages, first + 1 + random() % 8);
    for (std::uint32_t page = first; page < end; ++page) {
      block.fill(0);
      block[512 + random() % (block.size() - 512)] = 'd'; // below, writers of zeros have a place of their own
      if (pwrite(own_fd_, block.data(), block.size(), static_cast<off_t>(slice + page * page_size)) !=
          static_cast<ssize_t>(block.size()))
        return failure("pwrite");
      file_contents_[page] = Content::data;
    }
  }
  contents_ = file_contents_;
  return {};
}

std::expected<void, std::string> LiveRegion::prepare() {
  void* const start = region_->host_address();
  const std::uint64_t bytes = region_->bytes();
  // Kinds that cannot have them say EINVAL.
  if (spec_.thp != Thp::unstated)
    static_cast<void>(madvise(start, bytes, spec_.thp == Thp::wanted ? MADV_HUGEPAGE : MADV_NOHUGEPAGE));
  if (spec_.before == Before::populated) {
    // Before Linux 5.14 there is no such advice.
    static_cast<void>(madvise(start, bytes, madv_populate_write));
    touched(0, spec_.pages, Reason::populated);
  }
  if (spec_.before == Before::locked) {
    is_locked_ = test::lock_memory(start, bytes);
    touched(0, spec_.pages, Reason::populated); // a limit may stop it halfway
  }
  return {};
}

std::byte* LiveRegion::host(std::uint64_t page) const {
  return static_cast<std::byte*>(region_->host_address()) + page * page_size;
}

bool LiveRegion::gets_huge_pages() const {
  return spec_.thp == Thp::wanted || (spec_.thp == Thp::unstated && test::machine_facts().thp_unasked());
}

bool LiveRegion::is_coarse() const {
  if (is_hugetlb(spec_.memory)) return true;
  const test::MachineFacts& machine = test::machine_facts();
  switch (spec_.memory) {
  case Memory::anonymous:
  case Memory::adopted_anonymous:
    return gets_huge_pages();
  case Memory::memfd:
  case Memory::adopted_memfd:
  case Memory::shared_anonymous:
    // What a mapping was advised does not bind the others, nor write(2).
    return machine.shmem_thp_unasked() || (spec_.thp != Thp::forbidden && machine.shmem_thp());
  // The page cache of a disk's file has folios of all sizes, and a store makes one dirty as a whole.
  case Memory::shared_file:
    return true;
  // What the library maps in place of a file's pages knows of its own advice only.
  case Memory::private_file:
  case Memory::adopted_private_file:
    return facts.replaced && (facts.library_huge || machine.thp_unasked());
  default:
    return false;
  }
}

std::uint32_t LiveRegion::window() const {
  if (is_coarse()) return huge_pages;
  if (is_private_file(spec_.memory)) {
    const test::FileFacts& files = test::machine_facts().files;
    return static_cast<std::uint32_t>(std::max({page_size, files.block_bytes, files.data_bytes}) / page_size);
  }
  return 1;
}

std::uint32_t LiveRegion::window_base() const {
  // What a file has in memory is aligned in the file.
  const bool is_of_file = is_shared(spec_.memory) || (is_private_file(spec_.memory) && !is_coarse());
  const bool is_hidden = spec_.memory == Memory::shared_anonymous; // whose mapping is all of its file
  const std::uint64_t in_file = is_hidden ? own_bytes_ - spec_.pages * page_size : file_offset_;
  const std::uint64_t start = is_of_file ? in_file : reinterpret_cast<std::uintptr_t>(host(0));
  return static_cast<std::uint32_t>(start / page_size % huge_pages);
}

bool LiveRegion::reads_leave_no_trace(SurveyMode mode) const {
  const test::MachineFacts& machine = test::machine_facts();
  const bool can_tell = machine.reads_told_apart && mode != SurveyMode::legacy && !is_coarse();
  switch (spec_.memory) {
  case Memory::anonymous:
  case Memory::adopted_anonymous:
    return can_tell;
  case Memory::private_file:
  case Memory::adopted_private_file:
    return !machine.files.reads_make_data && (can_tell || !facts.replaced);
  case Memory::shared_file:
    return !machine.files.reads_make_data;
  default:
    return false;
  }
}

void LiveRegion::disprove(std::uint32_t page, std::uint32_t count) {
  std::fill_n(proven_.begin() + page, count, false);
}

void LiveRegion::wrote(std::uint32_t page, std::uint32_t count, Content content) {
  touched(page, count, Reason::written);
  disprove(page, count);
  std::fill_n(contents_.begin() + page, count, content);
}

void LiveRegion::touched(std::uint32_t page, std::uint32_t count, Reason why) {
  std::fill_n(ever_touched_.begin() + page, count, true);
  for (std::uint32_t at = page; at < page + count; ++at)
    if (why == Reason::written || reasons_[at] == Reason::none || reasons_[at] == Reason::read) reasons_[at] = why;
  if (proof_ == Proof::watch && why != Reason::read) {
    // The host's page tables go by 4 KiB, but for huge pages of the pool.
    const std::uint32_t unit = is_hugetlb(spec_.memory) ? huge_pages : 1;
    const std::uint32_t from = page / unit * unit;
    disprove(from, (page + count + unit - 1) / unit * unit - from);
  }
  // The rest of a huge page comes with it, and stays when that page goes.
  if (!is_coarse()) return;
  const std::uint32_t base = window_base();
  const std::uint32_t first = (base + page) / huge_pages * huge_pages;
  const std::uint32_t end = (base + page + count + huge_pages - 1) / huge_pages * huge_pages;
  for (std::uint32_t at = std::max(first, base); at < std::min(end, base + spec_.pages); ++at)
    if (reasons_[at - base] == Reason::none) reasons_[at - base] = Reason::huge_page;
}

void LiveRegion::discarded(std::uint32_t page, std::uint32_t count, bool by_library) {
  const bool is_left = proof_ == Proof::watch && is_hugetlb(spec_.memory) && !by_library;
  for (std::uint32_t at = page; at < page + count; ++at) {
    contents_[at] = file_contents_[at];
    // Whoever made a private copy has read the file first, where that allocates.
    const bool was_read = is_private_file(spec_.memory) && reasons_[at] != Reason::none;
    reasons_[at] = was_read ? Reason::read : is_left ? Reason::protection_left : Reason::none;
  }
  // Page tables forget their protection; what was never written stays so.
  if (proof_ == Proof::watch) disprove(page, count);
}

void LiveRegion::discarded_by_library(std::uint32_t page, std::uint32_t count, bool may_be_cleared) {
  if (is_private_file(spec_.memory)) {
    facts.replaced = true;
    std::fill_n(file_contents_.begin() + page, count, Content::zero);
  }
  discarded(page, count, true);
  if (may_be_cleared) touched(page, count, Reason::written);
}

void LiveRegion::freed(std::uint32_t page, std::uint32_t count) {
  std::fill_n(contents_.begin() + page, count, Content::any);
  if (proof_ == Proof::watch) disprove(page, count);
  facts.given_up = true;
}

std::vector<bool> LiveRegion::readable() const {
  // The whole file is, mapped or not.
  std::vector<bool> result(spec_.pages, spec_.memory == Memory::hugetlb_memfd);
  if (spec_.memory == Memory::unknown || spec_.memory == Memory::hugetlb_memfd) return result;
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return result;
  std::vector<std::uint64_t> entries(spec_.pages);
  const std::size_t bytes = entries.size() * sizeof(std::uint64_t);
  const auto from = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(host(0)) / page_size * sizeof(std::uint64_t));
  const bool is_known = pread(pagemap, entries.data(), bytes, from) == static_cast<ssize_t>(bytes);
  close(pagemap);
  if (!is_known) return result;
  // Documentation/admin-guide/mm/pagemap.rst: bit 63, present; bit 62, swapped.
  for (std::uint32_t page = 0; page < spec_.pages; ++page)
    result[page] = entries[page] >> 62 == 2;
  // Of shared memory, what no process has mapped can be in the page cache. What was paged out may leave it any time.
  if (!is_shared(spec_.memory) || spec_.memory == Memory::shared_file || facts.paged_out) return result;
  std::vector<unsigned char> resident(spec_.pages);
  if (mincore(host(0), spec_.pages * page_size, resident.data()) != 0) return result;
  for (std::uint32_t page = 0; page < spec_.pages; ++page)
    result[page] = result[page] || (resident[page] & 1) != 0;
  return result;
}

void LiveRegion::begin_proof(Proof proof, bool is_promised) {
  proof_ = proof;
  std::vector<bool> is_readable = readable();
  if (spec_.memory == Memory::hugetlb_memfd) {
    // Of these, mincore looks at own page tables, which is what can be protected.
    std::vector<unsigned char> mapped(spec_.pages);
    const bool is_known = mincore(host(0), spec_.pages * page_size, mapped.data()) == 0;
    for (std::uint32_t page = 0; page < spec_.pages; ++page)
      is_readable[page] = is_known && (mapped[page] & 1) != 0;
  }
  for (std::uint32_t page = 0; page < spec_.pages; ++page) {
    const Reason why = reasons_[page];
    // Only what is in memory can be protected: what was read may be the kernel's one page of zeros, and of a huge page
    // that a neighbour brought it is not known whether it came.
    const bool is_protected = is_readable[page] && (why == Reason::written || why == Reason::populated);
    const bool is_untouched = why == Reason::none && reason(page, SurveyMode::newest) == Reason::none;
    const bool is_known = is_protected || (proof == Proof::log && (is_untouched || is_promised));
    proven_[page] = is_known && contents_[page] == Content::zero;
  }
}

void LiveRegion::written_by(std::uint32_t page, std::uint32_t count, std::uint8_t who) {
  for (std::uint32_t at = page; at < page + count; ++at)
    writers_[at] |= who;
}

Reason LiveRegion::reason(std::uint32_t page, SurveyMode mode) const {
  const test::MachineFacts& machine = test::machine_facts();
  if (spec_.memory == Memory::unknown) return Reason::no_evidence;
  const bool has_cachestat = machine.cachestat && mode != SurveyMode::legacy;
  if (spec_.memory == Memory::shared_file && !has_cachestat) return Reason::no_evidence;
  if (spec_.memory == Memory::shared_anonymous && !machine.map_files) return Reason::no_evidence;
  // Private memory in huge pages is looked at twice, with one of these between.
  if (!machine.membarrier && is_coarse() && !is_hugetlb(spec_.memory) && !is_shared(spec_.memory))
    return Reason::no_evidence;
  // Without cachestat, allocated pages that nobody wrote cannot be told from data in migration, wherever they are.
  if (facts.allocated_unwritten && !has_cachestat && is_shared(spec_.memory) && !is_hugetlb(spec_.memory))
    return Reason::no_evidence;
  const bool is_traceless = reads_leave_no_trace(mode);
  const auto counts = [&](Reason why) { return why != Reason::none && !(why == Reason::read && is_traceless); };
  if (counts(reasons_[page])) return reasons_[page];
  // khugepaged may have made a huge page of it, for a neighbour's sake.
  const std::uint32_t pages_at_once = window();
  if (pages_at_once == 1) return Reason::none;
  const std::uint32_t base = window_base();
  const std::uint32_t first = (base + page) / pages_at_once * pages_at_once;
  for (std::uint32_t at = std::max(first, base); at < std::min(first + pages_at_once, base + spec_.pages); ++at)
    if (counts(reasons_[at - base]) || file_contents_[at - base] == Content::data) return Reason::huge_page;
  return Reason::none;
}

bool LiveRegion::may_be_merged() const {
  switch (spec_.memory) {
  case Memory::adopted_anonymous:
  case Memory::unknown:
    return true;
  case Memory::adopted_private_file:
    return facts.replaced;
  default:
    return false;
  }
}

bool LiveRegion::may_come_with(std::uint32_t page, const LiveRegion& neighbour) const {
  const auto brings_huge_pages = [](const LiveRegion& live) {
    return live.is_coarse() || (live.spec_.memory == Memory::unknown && live.gets_huge_pages());
  };
  if (!may_be_merged() || !neighbour.may_be_merged()) return false;
  if (!brings_huge_pages(*this) || !brings_huge_pages(neighbour)) return false;
  const auto number = [](const LiveRegion& live) { return reinterpret_cast<std::uintptr_t>(live.host(0)) / page_size; };
  const std::uint64_t first = (number(*this) + page) / huge_pages * huge_pages;
  const std::uint64_t from = std::max(first, number(neighbour));
  const std::uint64_t to = std::min(first + huge_pages, number(neighbour) + neighbour.spec_.pages);
  for (std::uint64_t at = from; at < to; ++at)
    if (neighbour.ever_touched_[at - number(neighbour)]) return true;
  return false;
}

} // namespace cppvmm::oracle
