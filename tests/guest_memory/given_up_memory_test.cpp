#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <optional>
#include <sys/mman.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "support/descriptor.hpp"
#include "support/machine_facts.hpp"

import cppvmm.guest_memory;

// Huge pages that were given up by MADV_FREE: the kernel takes them back when it likes, and on its way to that clears
// the entries of those that it then leaves.

using namespace cppvmm;

namespace {

constexpr std::uint64_t huge_count = 16;
constexpr std::uint64_t pages_a_huge = 512;
constexpr std::uint64_t bytes = huge_count * pages_a_huge * page_size;

/// A region whose huge pages have data in their second pages, which are in use elsewhere too, and are given up.
class GivenUp {
public:
  GivenUp() {
    std::array<int, 2> ends{-1, -1};
    if (pipe2(ends.data(), O_CLOEXEC) != 0) return;
    read_end_ = test::Descriptor(ends[0]);
    write_end_ = test::Descriptor(ends[1]);
    const auto made = Region::anonymous(GuestAddress(0), bytes);
    if (!made || !made->set_huge_pages(HugePages::preferred)) return;
    region_.emplace(*made);
    memory_.replace(*MemoryMap::make({*region_}));
    for (std::uint64_t page = 1; page < bytes / page_size; page += pages_a_huge) {
      *data(page) = std::byte{0x5a};
      pages_.add(*PageRange::make(PageNumber(page), 1));
    }
    is_made_ = madvise(region_->host_address(), bytes, MADV_FREE) == 0;
  }

  /// As a device does that reads it: the kernel cannot take what someone has. EAGAIN: the pipe has no room for it.
  [[nodiscard]] bool use() const {
    for (const PageRange& range : pages_.ranges()) {
      const iovec page{data(range.first().value()), page_size};
      if (vmsplice(write_end_.number(), &page, 1, SPLICE_F_NONBLOCK) != static_cast<ssize_t>(page_size)) return false;
    }
    return true;
  }
  [[nodiscard]] bool is_made() const { return is_made_; }
  [[nodiscard]] bool has_data() const {
    for (const PageRange& range : pages_.ranges())
      if (*data(range.first().value()) != std::byte{0x5a}) return false;
    return true;
  }
  [[nodiscard]] const PageSet& pages() const { return pages_; }
  [[nodiscard]] const Region& region() const { return *region_; }
  [[nodiscard]] const GuestMemory& memory() const { return memory_; }
  [[nodiscard]] int reclaim() const { return madvise(region_->host_address(), bytes, MADV_PAGEOUT) == 0 ? 0 : errno; }

private:
  [[nodiscard]] std::byte* data(std::uint64_t page) const {
    return static_cast<std::byte*>(region_->host_address()) + page * page_size;
  }

  test::Descriptor read_end_;
  test::Descriptor write_end_;
  std::optional<Region> region_;
  GuestMemory memory_;
  PageSet pages_;
  bool is_made_ = false;
};

class GivenUpMemory : public testing::Test {
protected:
  void SetUp() override {
    if (!test::machine_facts().gives_huge_pages) GTEST_SKIP() << "no huge pages are given here";
    if (!test::machine_facts().membarrier) GTEST_SKIP() << "membarrier is refused: huge pages have no evidence";
  }
};

TEST_F(GivenUpMemory, OfHugePagesProvesNothingUntilItIsDiscarded) {
  const GivenUp given_up;
  ASSERT_TRUE(given_up.is_made());
  if (given_up.region().huge_page_bytes().value_or(0) == 0) GTEST_SKIP() << "no huge pages were given";
  const Survey survey = given_up.memory().survey();
  EXPECT_TRUE(survey.zeroed().empty());
  EXPECT_EQ(survey.regions[0].evidence, Evidence::none);
  ASSERT_TRUE(survey.regions[0].error);
  EXPECT_EQ(survey.regions[0].error->code, MemoryErrc::unavailable);

  ASSERT_TRUE(given_up.region().discard(given_up.region().pages()));
  EXPECT_EQ(given_up.memory().survey().zeroed(), PageSet(given_up.region().pages()));
}

TEST_F(GivenUpMemory, IsNotReportedWhileTheKernelTriesToTakeIt) {
  if (!test::machine_facts().page_out) GTEST_SKIP() << "this kernel has no MADV_PAGEOUT";
  constexpr int rounds = 20;
  std::uint64_t surveys = 0;
  std::uint64_t unsound = 0;
  int huge_rounds = 0;
  bool is_pipe_full = false;
  for (int round = 0; round < rounds; ++round) {
    const GivenUp given_up;
    ASSERT_TRUE(given_up.is_made());
    if (given_up.region().huge_page_bytes().value_or(0) > 0) ++huge_rounds;
    if (!given_up.use()) {
      ASSERT_EQ(errno, EAGAIN);
      is_pipe_full = true;
      break;
    }
    std::atomic<bool> is_looking = false;
    std::atomic<bool> stop = false;
    std::thread looking([&] {
      while (!stop) {
        PageSet reported = given_up.memory().survey().zeroed();
        reported.intersect(given_up.pages());
        ++surveys;
        if (!reported.empty()) ++unsound;
        is_looking = true;
      }
    });
    while (!is_looking)
      std::this_thread::yield();
    const int refused = given_up.reclaim();
    stop = true;
    looking.join();
    ASSERT_EQ(refused, 0);
    // Had it been taken, there would be no data to miss.
    ASSERT_TRUE(given_up.has_data());
  }
  EXPECT_EQ(unsound, 0U) << "of " << surveys << " surveys";
  if (is_pipe_full) GTEST_SKIP() << "a pipe has no room for " << huge_count << " pages here";
  if (huge_rounds == 0) GTEST_SKIP() << "no huge pages were given";
}

} // namespace
