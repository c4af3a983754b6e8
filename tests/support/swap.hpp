// Swap space for tests, on a compressed disk in memory where the machine has no swap of its own.
#pragma once

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <string>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/swap.h>
#include <unistd.h>
#include <vector>

namespace cppvmm::test {

/// Swap space while it lives. Where the machine has none it makes some on zram0, which takes root and a zram0 that
/// nobody uses; one user at a time, in all processes that use this.
class SwapSpace {
public:
  SwapSpace() : missing_(make()) {}
  SwapSpace(const SwapSpace&) = delete;
  SwapSpace& operator=(const SwapSpace&) = delete;
  ~SwapSpace() {
    if (is_on_) swapoff(device);
    if (is_sized_) std::ofstream("/sys/block/zram0/reset") << 1;
    if (lock_ >= 0) close(lock_);
  }

  /// Why there is none; empty if there is.
  [[nodiscard]] const std::string& missing() const { return missing_; }

private:
  static constexpr const char* device = "/dev/zram0";
  static constexpr std::size_t bytes = std::size_t{64} << 20;
  static constexpr std::size_t page = 4096;

  std::string make() {
    lock_ = open("/sys/block/zram0", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock_ >= 0 && flock(lock_, LOCK_EX) != 0) return because("flock of zram0", errno);
    if (has_swap()) return {};
    if (lock_ < 0) return "no swap, and no zram0 to make some on";
    std::string size;
    std::ifstream("/sys/block/zram0/disksize") >> size;
    if (size != "0") return "no swap, and zram0 is in use";
    if (!(std::ofstream("/sys/block/zram0/disksize") << bytes).flush()) return "no swap, and zram0 takes root";
    is_sized_ = true;
    if (const int error = write_header(); error != 0) return because("writing to /dev/zram0", error);
    if (swapon(device, 0) != 0) return because("swapon of zram0", errno);
    is_on_ = true;
    return {};
  }

  static std::string because(const char* what, int error) { return std::string(what) + ": " + std::strerror(error); }

  static bool has_swap() {
    std::ifstream swaps("/proc/swaps");
    std::string line;
    std::getline(swaps, line); // the heading
    return static_cast<bool>(std::getline(swaps, line));
  }

  /// As mkswap does: union swap_header of Linux include/linux/swap.h.
  static int write_header() {
    std::array<char, page> header{};
    const std::array<std::uint32_t, 3> info = {1, bytes / page - 1, 0}; // version, last page, number of bad pages
    std::memcpy(header.data() + 1024, info.data(), sizeof info);
    std::memcpy(header.data() + page - 10, "SWAPSPACE2", 10);
    const int fd = open(device, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return errno;
    const int error = pwrite(fd, header.data(), page, 0) == static_cast<ssize_t>(page) && fsync(fd) == 0 ? 0 : errno;
    close(fd);
    return error;
  }

  int lock_ = -1;
  bool is_sized_ = false;
  bool is_on_ = false;
  std::string missing_;
};

/// Which 4 KiB pages of a mapping are swapped out, by this process's page tables: says nothing of shared memory.
[[nodiscard]] inline std::vector<bool> swapped_pages(const void* host, std::size_t bytes) {
  std::vector<std::uint64_t> entries(bytes / 4096);
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  const auto offset = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(host) / 4096 * sizeof(std::uint64_t));
  const ssize_t got = pread(pagemap, entries.data(), entries.size() * sizeof(std::uint64_t), offset);
  close(pagemap);
  std::vector<bool> result(entries.size());
  for (std::size_t i = 0; got == static_cast<ssize_t>(entries.size() * sizeof(std::uint64_t)) && i < entries.size();
       ++i)
    result[i] = (entries[i] >> 62 & 1) != 0;
  return result;
}

/// Which 4 KiB pages of a shared mapping are in the page cache.
[[nodiscard]] inline std::vector<bool> cached_pages(void* host, std::size_t bytes) {
  std::vector<unsigned char> resident(bytes / 4096);
  std::vector<bool> result(resident.size());
  if (mincore(host, bytes, resident.data()) != 0) return result;
  for (std::size_t i = 0; i < resident.size(); ++i)
    result[i] = (resident[i] & 1) != 0;
  return result;
}

} // namespace cppvmm::test
