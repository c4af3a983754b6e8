#include "swap.hpp"

#include "descriptor.hpp"
#include "kernel_files.hpp"

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <expected>
#include <fcntl.h>
#include <string>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/sysmacros.h>
#include <system_error>
#include <unistd.h>
#include <vector>

namespace cppvmm::test {
namespace {

constexpr const char* zram_control = "/sys/class/zram-control";

std::unexpected<std::string> failure(const char* what) {
  return std::unexpected(std::string(what) + ": " + std::generic_category().message(errno));
}

/// The header that swapon(2) looks for (include/linux/swap.h, union swap_header), in the first page.
bool make_swap(int fd, std::uint64_t pages) {
  std::array<char, 4096> header{};
  const std::array<std::uint32_t, 2> info = {1, static_cast<std::uint32_t>(pages - 1)}; // version, last page
  std::memcpy(header.data() + 1024, info.data(), sizeof info);
  std::memcpy(header.data() + header.size() - 10, "SWAPSPACE2", 10);
  return pwrite(fd, header.data(), header.size(), 0) == static_cast<ssize_t>(header.size());
}

} // namespace

bool has_swap() {
  // One line of titles, one for each device.
  const std::string swaps = kernel_text("/proc/swaps");
  return swaps.find('\n') != std::string::npos && swaps.find('\n') + 1 < swaps.size();
}

std::expected<SwapSpace, std::string> SwapSpace::take() {
  SwapSpace space;
  space.lock_ = Descriptor(open(zram_control, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (space.lock_.is_open() && flock(space.lock_.number(), LOCK_EX) != 0) return failure("flock of zram");
  // To read it makes a device.
  space.device_ = kernel_number(std::string(zram_control) + "/hot_add");
  if (space.device_ < 0) {
    if (has_swap()) return space;
    return std::unexpected("no swap, and no zram device can be made (needs root and CONFIG_ZRAM)");
  }
  const std::string sys = "/sys/block/zram" + std::to_string(space.device_);
  constexpr std::uint64_t bytes = std::uint64_t{1} << 30; // of which only what is swapped out takes memory
  if (!tell_kernel(sys + "/disksize", std::to_string(bytes))) return failure("the size of a zram device");
  unsigned major_number = 0;
  unsigned minor_number = 0;
  // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
  if (std::sscanf(kernel_text(sys + "/dev").c_str(), "%u:%u", &major_number, &minor_number) != 2)
    return std::unexpected("no number of a zram device");
  // A node of our own: whether and when /dev has one is for others to decide.
  char path[] = "/tmp/cppvmm-swap-XXXXXX";
  if (mkdtemp(path) == nullptr) return failure("mkdtemp");
  space.node_ = std::string(path) + "/node";
  if (mknod(space.node_.c_str(), S_IFBLK | 0600, makedev(major_number, minor_number)) != 0)
    return failure("mknod of a zram device");
  {
    const Descriptor disk(open(space.node_.c_str(), O_RDWR | O_CLOEXEC));
    if (!disk.is_open()) return failure("open of a zram device");
    if (!make_swap(disk.number(), bytes / 4096) || fsync(disk.number()) != 0) return failure("write to a zram device");
  }
  if (swapon(space.node_.c_str(), 0) != 0) return failure("swapon of a zram device");
  return space;
}

SwapSpace::~SwapSpace() {
  if (!node_.empty()) {
    swapoff(node_.c_str());
    unlink(node_.c_str());
    rmdir(node_.substr(0, node_.rfind('/')).c_str());
  }
  if (device_ >= 0) static_cast<void>(tell_kernel(std::string(zram_control) + "/hot_remove", std::to_string(device_)));
  // Not only closed: children may have inherited the descriptor.
  if (lock_.is_open()) flock(lock_.number(), LOCK_UN);
}

std::vector<bool> swapped_pages(const void* host, std::size_t bytes) {
  std::vector<std::uint64_t> entries(bytes / 4096);
  std::vector<bool> result(entries.size());
  const Descriptor pagemap(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  const auto offset = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(host) / 4096 * sizeof(std::uint64_t));
  const std::size_t size = entries.size() * sizeof(std::uint64_t);
  if (pread(pagemap.number(), entries.data(), size, offset) != static_cast<ssize_t>(size)) return result;
  for (std::size_t i = 0; i < entries.size(); ++i)
    result[i] = (entries[i] >> 62 & 1) != 0;
  return result;
}

std::vector<bool> cached_pages(void* host, std::size_t bytes) {
  std::vector<unsigned char> resident(bytes / 4096);
  std::vector<bool> result(resident.size());
  if (mincore(host, bytes, resident.data()) != 0) return result;
  for (std::size_t i = 0; i < resident.size(); ++i)
    result[i] = (resident[i] & 1) != 0;
  return result;
}

} // namespace cppvmm::test
