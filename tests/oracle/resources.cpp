#include "resources.hpp"

#include "support/kernel_files.hpp"
#include "support/temporary_file.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fcntl.h>
#include <fstream>
#include <linux/magic.h>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

namespace cppvmm::oracle {
namespace {

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
  facts.thp_always =
      test::kernel_text("/sys/kernel/mm/transparent_hugepage/enabled").find("[always]") != std::string::npos;
  const std::string shmem = test::kernel_text("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
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

  const auto file = test::temporary_file();
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

const KernelFacts& kernel_facts() {
  static const KernelFacts facts = find_facts();
  return facts;
}

} // namespace cppvmm::oracle
