#include "resources.hpp"

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <expected>
#include <fcntl.h>
#include <fstream>
#include <linux/magic.h>
#include <sstream>
#include <string>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <system_error>
#include <unistd.h>

namespace cppvmm::oracle {
namespace {

constexpr const char* pool_size = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
constexpr const char* pool_free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

long number(const char* path) {
  long value = -1;
  std::ifstream(path) >> value;
  return value;
}

std::string text(const char* path) {
  std::ifstream file(path);
  std::stringstream all;
  all << file.rdbuf();
  return all.str();
}

bool put(const std::string& path, const std::string& value) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool done = write(fd, value.data(), value.size()) == static_cast<ssize_t>(value.size());
  close(fd);
  return done;
}

std::unexpected<std::string> failure(const char* what) {
  return std::unexpected(std::string(what) + ": " + std::generic_category().message(errno));
}

/// The header that swapon(2) looks for (include/linux/swap.h, union swap_header), in the first page.
bool make_swap(int fd, std::uint64_t pages) {
  std::array<char, 4096> header{};
  const std::uint32_t info[2] = {1, static_cast<std::uint32_t>(pages - 1)}; // version, last page
  std::memcpy(header.data() + 1024, info, sizeof info);
  std::memcpy(header.data() + header.size() - 10, "SWAPSPACE2", 10);
  return pwrite(fd, header.data(), header.size(), 0) == static_cast<ssize_t>(header.size());
}

bool at_least(unsigned major, unsigned minor) {
  utsname name{};
  unsigned have_major = 0;
  unsigned have_minor = 0;
  // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
  if (uname(&name) != 0 || std::sscanf(name.release, "%u.%u", &have_major, &have_minor) != 2) return false;
  return have_major > major || (have_major == major && have_minor >= minor);
}

KernelFacts find_facts() {
  KernelFacts facts;
  facts.page_map_scan = at_least(6, 7);
  facts.cachestat = at_least(6, 5);
  facts.thp_always = text("/sys/kernel/mm/transparent_hugepage/enabled").find("[always]") != std::string::npos;
  const std::string shmem = text("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  facts.shmem_thp = shmem.find("[never]") == std::string::npos && shmem.find("[deny]") == std::string::npos;

  constexpr std::size_t bytes = 4096;
  if (void* const page = mmap(nullptr, bytes, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0); page != MAP_FAILED) {
    char path[96];
    const auto at = reinterpret_cast<std::uintptr_t>(page);
    std::snprintf(path, sizeof path, "/proc/self/map_files/%zx-%zx", at, at + bytes);
    if (const int fd = open(path, O_RDONLY | O_CLOEXEC); fd >= 0) {
      facts.map_files = true;
      close(fd);
    }
    munmap(page, bytes);
  }

  const auto file = temporary_file();
  if (!file) return facts;
  struct stat status{};
  struct statfs system{};
  if (ftruncate(*file, 1 << 20) == 0 && pwrite(*file, "x", 1, 1 << 19) == 1 && fsync(*file) == 0 &&
      fstat(*file, &status) == 0 && fstatfs(*file, &system) == 0) {
    facts.files_in_memory = system.f_type == TMPFS_MAGIC;
    facts.file_block = static_cast<std::uint64_t>(status.st_blksize);
    facts.files_tell_holes = lseek(*file, 0, SEEK_HOLE) == 0 && lseek(*file, 0, SEEK_DATA) > 0;
    if (void* const page = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, *file, 0); page != MAP_FAILED) {
      std::ifstream maps("/proc/self/maps");
      for (std::string line; std::getline(maps, line);) {
        std::uintptr_t start = 0;
        std::uintptr_t end = 0;
        unsigned major_number = 0;
        unsigned minor_number = 0;
        unsigned long inode = 0;
        // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
        if (std::sscanf(line.c_str(), "%zx-%zx %*s %*x %x:%x %lu", &start, &end, &major_number, &minor_number,
                        &inode) == 5 &&
            start == reinterpret_cast<std::uintptr_t>(page))
          facts.files_by_fstat = inode == status.st_ino && makedev(major_number, minor_number) == status.st_dev;
      }
      munmap(page, bytes);
    }
  }
  close(*file);
  return facts;
}

} // namespace

std::expected<HugePool, std::string> HugePool::take(long pages) {
  const int lock = open(pool_size, O_RDONLY | O_CLOEXEC);
  if (lock < 0) return failure("the pool of huge pages");
  if (flock(lock, LOCK_EX) != 0) {
    close(lock);
    return failure("flock of the pool of huge pages");
  }
  HugePool pool(lock, number(pool_size));
  if (number(pool_free) < pages) {
    put(pool_size, std::to_string(pool.before_ + pages));
    if (number(pool_free) < pages)
      return std::unexpected("the host's pool of huge pages cannot be made larger (needs root)");
  }
  return pool;
}

HugePool::~HugePool() {
  if (lock_ < 0) return;
  put(pool_size, std::to_string(before_));
  // Not only closed: children may have inherited the descriptor.
  flock(lock_, LOCK_UN);
  close(lock_);
}

std::expected<SwapSpace, std::string> SwapSpace::take() {
  SwapSpace space;
  const long device = number("/sys/class/zram-control/hot_add");
  if (device < 0) {
    // One line of titles, one for each device.
    const std::string swaps = text("/proc/swaps");
    if (swaps.find('\n') != std::string::npos && swaps.find('\n') + 1 < swaps.size()) return space;
    return std::unexpected("no swap, and no zram device can be made (needs root and CONFIG_ZRAM)");
  }
  space.device_ = static_cast<int>(device);
  const std::string sys = "/sys/block/zram" + std::to_string(device);
  constexpr std::uint64_t bytes = std::uint64_t{1} << 30; // of which only what is swapped out takes memory
  if (!put(sys + "/disksize", std::to_string(bytes))) return failure("the size of a zram device");
  unsigned major_number = 0;
  unsigned minor_number = 0;
  // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
  if (std::sscanf(text((sys + "/dev").c_str()).c_str(), "%u:%u", &major_number, &minor_number) != 2)
    return std::unexpected("no number of a zram device");
  // A node of our own: whether and when /dev has one is for others to decide.
  char path[] = "/tmp/cppvmm-swap-XXXXXX";
  if (mkdtemp(path) == nullptr) return failure("mkdtemp");
  space.node_ = std::string(path) + "/node";
  if (mknod(space.node_.c_str(), S_IFBLK | 0600, makedev(major_number, minor_number)) != 0)
    return failure("mknod of a zram device");
  const int fd = open(space.node_.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return failure("open of a zram device");
  const bool made = make_swap(fd, bytes / 4096) && fsync(fd) == 0;
  close(fd);
  if (!made) return failure("write to a zram device");
  if (swapon(space.node_.c_str(), 0) != 0) return failure("swapon of a zram device");
  return space;
}

SwapSpace::~SwapSpace() {
  if (!node_.empty()) {
    swapoff(node_.c_str());
    unlink(node_.c_str());
    rmdir(node_.substr(0, node_.rfind('/')).c_str());
  }
  if (device_ >= 0) put("/sys/class/zram-control/hot_remove", std::to_string(device_));
}

std::expected<int, std::string> temporary_file() {
  const char* const folder = std::getenv("TMPDIR");
  std::string name = std::string(folder != nullptr && *folder != 0 ? folder : "/tmp") + "/cppvmm-oracle-XXXXXX";
  const int fd = mkostemp(name.data(), O_CLOEXEC);
  if (fd < 0) return failure("a temporary file");
  unlink(name.c_str());
  return fd;
}

const KernelFacts& kernel_facts() {
  static const KernelFacts facts = find_facts();
  return facts;
}

} // namespace cppvmm::oracle
