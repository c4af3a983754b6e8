// Tests that need huge pages of the host's pool.
#pragma once

#include "huge_pages.hpp"

#include <gtest/gtest.h>
#include <optional>
#include <utility>

namespace cppvmm::test {

/// Has 16 free huge pages of 2 MiB in the pool; skipped, saying why, where there are none.
class HugePagesTest : public ::testing::Test {
protected:
  void SetUp() override {
    auto taken = HugePagePool::take();
    if (!taken) GTEST_SKIP() << taken.error();
    pool.emplace(std::move(*taken));
  }

  std::optional<HugePagePool> pool;
};

} // namespace cppvmm::test
