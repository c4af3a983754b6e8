#include "huge_pages.hpp"

#include "kernel_files.hpp"

#include <cerrno>
#include <cstdio>
#include <expected>
#include <fcntl.h>
#include <string>
#include <sys/file.h>
#include <system_error>
#include <utility>

namespace cppvmm::test {
namespace {

constexpr const char* pool_size = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
constexpr const char* pool_free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

std::unexpected<std::string> failure(const char* what) {
  return std::unexpected(std::string(what) + ": " + std::generic_category().message(errno));
}

} // namespace

std::expected<HugePagePool, std::string> HugePagePool::take(long pages) {
  Descriptor lock(open(pool_size, O_RDONLY | O_CLOEXEC));
  if (!lock.is_open()) return failure("the pool of huge pages");
  if (flock(lock.number(), LOCK_EX | LOCK_NB) != 0) {
    std::fputs("waiting for another process that has the pool of huge pages\n", stderr);
    if (flock(lock.number(), LOCK_EX) != 0) return failure("flock of the pool of huge pages");
  }
  HugePagePool pool(std::move(lock), kernel_number(pool_size));
  if (kernel_number(pool_free) < pages &&
      (!tell_kernel(pool_size, std::to_string(pool.before_ + pages)) || kernel_number(pool_free) < pages))
    return std::unexpected("the host's pool of huge pages cannot be made larger (needs root)");
  return pool;
}

HugePagePool::~HugePagePool() {
  if (!lock_.is_open()) return;
  if (kernel_number(pool_size) != before_) static_cast<void>(tell_kernel(pool_size, std::to_string(before_)));
  // Not only closed: children may have inherited the descriptor.
  flock(lock_.number(), LOCK_UN);
}

} // namespace cppvmm::test
