#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <sys/mman.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#include "ram.hpp"

namespace cppvmm::boot {

class OwnMapping {
public:
  OwnMapping(void* host, std::uint64_t bytes) : host_(host), bytes_(bytes) {}
  OwnMapping(const OwnMapping&) = delete;
  OwnMapping& operator=(const OwnMapping&) = delete;
  ~OwnMapping() { munmap(host_, bytes_); }

private:
  void* host_;
  std::uint64_t bytes_;
};

namespace {

template <class T>
using Result = std::expected<T, std::string>;

std::unexpected<std::string> failure(const std::string& what, int error) {
  return std::unexpected("no guest memory: " + what + ": " + std::generic_category().message(error));
}

std::unexpected<std::string> failure(const Options& options, const MemoryError& error) {
  std::string text = "no guest memory: " + error.message();
  const bool is_huge = options.backing == MemoryBacking::hugetlb || options.backing == MemoryBacking::hugetlb_memfd;
  if (is_huge && error.code == MemoryErrc::unavailable)
    text += "; reserve huge pages first (sysctl vm.nr_hugepages=" + std::to_string(options.memory_bytes >> 21) + ")";
  return std::unexpected(std::move(text));
}

std::shared_ptr<int> owned(int descriptor) {
  return {new int(descriptor), [](const int* number) {
            close(*number);
            delete number;
          }};
}

/// A file of `bytes` that are one hole.
Result<std::shared_ptr<int>> sparse_file(std::uint64_t bytes) {
  const char* folder = std::getenv("TMPDIR");
  if (folder == nullptr || *folder == '\0') folder = access("/var/tmp", W_OK) == 0 ? "/var/tmp" : "/tmp";
  const int descriptor = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (descriptor < 0) return failure(std::string("a file in ") + folder, errno);
  auto file = owned(descriptor);
  if (ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) return failure("ftruncate", errno);
  return file;
}

/// A mapping that a region adopts.
Result<Region> adopt(const Options& options, GuestAddress start, std::uint64_t bytes, Backing backing, int fd,
                     Ram& ram) {
  const int flags = MAP_SHARED | MAP_NORESERVE | (fd < 0 ? MAP_ANONYMOUS : 0);
  void* const host = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (host == MAP_FAILED) return failure("mmap", errno);
  ram.mappings.push_back(std::make_shared<OwnMapping>(host, bytes));
  auto region = Region::adopt(start, {.host_address = host, .bytes = bytes, .backing = backing, .fd = fd});
  if (!region) return failure(options, region.error());
  return std::move(*region);
}

Result<Region> make_region(const Options& options, GuestAddress start, std::uint64_t bytes, Ram& ram) {
  const auto checked = [&](MemoryResult<Region> region) -> Result<Region> {
    if (!region) return failure(options, region.error());
    return std::move(*region);
  };
  switch (options.backing) {
  case MemoryBacking::anonymous:
    break;
  case MemoryBacking::memfd:
    return checked(Region::memfd(start, bytes));
  case MemoryBacking::shared_anonymous:
    return adopt(options, start, bytes, Backing::shared_anonymous, -1, ram);
  case MemoryBacking::hugetlb:
    return checked(Region::hugetlb(start, bytes, HugePageSize::two_mib));
  case MemoryBacking::hugetlb_memfd:
    return checked(Region::hugetlb_memfd(start, bytes, HugePageSize::two_mib));
  case MemoryBacking::private_file:
  case MemoryBacking::shared_file: {
    const auto file = sparse_file(bytes);
    if (!file) return std::unexpected(file.error());
    if (options.backing == MemoryBacking::private_file) return checked(Region::private_file(start, bytes, **file, 0));
    return adopt(options, start, bytes, Backing::shared_file, **file, ram);
  }
  }
  return checked(Region::anonymous(start, bytes));
}

/// The file behind a shared anonymous mapping, which only a privileged process finds.
Result<std::shared_ptr<int>> hidden_file(const Region& region) {
  const unsigned long long start = reinterpret_cast<std::uintptr_t>(region.host_address());
  char path[96];
  std::snprintf(path, sizeof path, "/proc/self/map_files/%llx-%llx", start, start + region.bytes());
  const int descriptor = open(path, O_RDONLY | O_CLOEXEC);
  if (descriptor < 0)
    return std::unexpected("audit: shared anonymous memory can be read through /proc/self/map_files alone, by root: " +
                           std::generic_category().message(errno));
  return owned(descriptor);
}

} // namespace

std::expected<Ram, std::string> make_ram(const Options& options, std::span<const zeroing::Pages> ranges) {
  Ram ram;
  std::vector<Region> regions;
  for (const auto& range : ranges) {
    auto region = make_region(options, GuestAddress(range.first * page_size), range.count * page_size, ram);
    if (!region) return std::unexpected(std::move(region.error()));
    regions.push_back(std::move(*region));
  }
  auto map = MemoryMap::make(std::move(regions));
  if (!map) return failure(options, map.error());
  ram.map = std::move(*map);
  return ram;
}

std::expected<void, std::string> prepare_ram(const Options& options, const MemoryMap& map) {
  if (options.huge_pages != HugePageUse::system) {
    const auto use = options.huge_pages == HugePageUse::always ? HugePages::preferred : HugePages::never;
    if (auto set = map.set_huge_pages(use); !set) return std::unexpected("--thp: " + set.error().message());
  }
  if (options.populate)
    for (const auto& region : map.regions())
      if (auto populated = region.populate(); !populated)
        return std::unexpected("--populate: " + populated.error().message());
  return {};
}

std::expected<AuditedRam, std::string> audited_ram(const MemoryMap& map) {
  using Memory = AuditedRegion::Memory;
  AuditedRam ram;
  for (const auto& region : map.regions()) {
    if (region.kind() != RegionKind::ram) continue;
    AuditedRegion audited{.first_page = region.pages().first().value(),
                          .page_count = region.pages().count(),
                          .host = region.host_address(),
                          .memory = Memory::private_anonymous,
                          .fd = region.file_descriptor(),
                          .fd_offset = region.file_offset()};
    switch (region.backing()) {
    case Backing::memfd:
    case Backing::shared_file:
    case Backing::hugetlb_memfd:
      audited.memory = Memory::shared_file;
      break;
    case Backing::shared_anonymous: {
      auto file = hidden_file(region);
      if (!file) return std::unexpected(std::move(file.error()));
      audited.memory = Memory::shared_file;
      audited.fd = **file;
      ram.descriptors.push_back(std::move(*file));
      break;
    }
    case Backing::hugetlb:
    case Backing::hugetlb_private_file:
      audited.memory = Memory::private_hugetlb;
      break;
    default:
      break;
    }
    ram.regions.push_back(audited);
  }
  return ram;
}

} // namespace cppvmm::boot
