// Huge pages of 2 MiB for tests, from the host's pool.
#pragma once

#include <fcntl.h>
#include <fstream>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

namespace cppvmm::test {

/// Makes the host's pool larger by 16 huge pages while it lives, where that is allowed. One at a time in all processes.
class HugePagePool {
public:
  HugePagePool() : lock_(open(pool, O_RDONLY | O_CLOEXEC)) {
    if (lock_ < 0 || flock(lock_, LOCK_EX) != 0) return;
    before_ = number(pool);
    std::ofstream(pool) << before_ + wanted;
  }
  HugePagePool(const HugePagePool&) = delete;
  HugePagePool& operator=(const HugePagePool&) = delete;
  ~HugePagePool() {
    if (before_ >= 0) std::ofstream(pool) << before_;
    if (lock_ >= 0) close(lock_);
  }

  /// Whether as many huge pages are free.
  [[nodiscard]] bool is_usable() const { return number(free_pages) >= wanted; }
  static constexpr const char* why_not = "the host's pool of huge pages cannot be made larger (needs root)";

private:
  static constexpr const char* pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
  static constexpr const char* free_pages = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
  static constexpr long wanted = 16;

  static long number(const char* path) {
    long value = -1;
    std::ifstream(path) >> value;
    return value;
  }

  int lock_;
  long before_ = -1;
};

/// A test that needs the pool.
class HugePagesTest : public ::testing::Test {
protected:
  void SetUp() override {
    if (!pool.is_usable()) GTEST_SKIP() << HugePagePool::why_not;
  }

  HugePagePool pool;
};

} // namespace cppvmm::test
