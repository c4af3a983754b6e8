#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <latch>
#include <linux/userfaultfd.h>
#include <optional>
#include <poll.h>
#include <string>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"
#include "support/machine_facts.hpp"

import cppvmm.guest_memory;

// A snapshot that a userfaultfd handler brings in page by page: what is discarded must not come back.

using namespace cppvmm;

namespace {

constexpr std::uint64_t count = 64;
constexpr std::uint64_t bytes = count * page_size;
constexpr int user_mode_only = 1; // UFFD_USER_MODE_ONLY, Linux 5.11

PageRange pages(std::uint64_t first, std::uint64_t number) { return *PageRange::make(PageNumber(first), number); }

/// Fills missing pages of a region with the snapshot's bytes, or with zeros once it was told that they were removed.
class SnapshotHandler {
public:
  static constexpr std::uint8_t snapshot_byte = 0xAA;

  /// `begins`: what it does nothing before.
  explicit SnapshotHandler(const void* host, std::latch* begins = nullptr)
      : host_(reinterpret_cast<std::uintptr_t>(host)), begins_(begins) {
    snapshot_.fill(std::byte{snapshot_byte});
    const auto open = [](int flags) {
      return test::Descriptor(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags)));
    };
    fd_ = open(0);
    if (!fd_.is_open()) {
      // One that the kernel's own accesses are errors to: adopted memory is to be accessed by loads and stores then.
      fd_ = open(user_mode_only);
      if (auto guard = FaultGuard::install()) guard_.emplace(std::move(*guard));
    }
    stop_ = test::Descriptor(eventfd(0, EFD_CLOEXEC));
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_MISSING_SHMEM;
    uffdio_register request{};
    request.range = {.start = host_, .len = bytes};
    request.mode = UFFDIO_REGISTER_MODE_MISSING;
    is_registered_ = fd_.is_open() && stop_.is_open() && ioctl(fd_.number(), UFFDIO_API, &api) == 0 &&
                     ioctl(fd_.number(), UFFDIO_REGISTER, &request) == 0;
    if (is_registered_) thread_ = std::thread([this] { serve(); });
  }
  SnapshotHandler(const SnapshotHandler&) = delete;
  SnapshotHandler& operator=(const SnapshotHandler&) = delete;
  ~SnapshotHandler() {
    const std::uint64_t one = 1;
    if (!thread_.joinable()) return;
    EXPECT_EQ(write(stop_.number(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
    thread_.join();
  }

  [[nodiscard]] bool is_registered() const { return is_registered_; }
  [[nodiscard]] unsigned removals() const { return removals_; }
  /// Until somebody waits for it.
  void wait_for_message() const {
    pollfd wait{fd_.number(), POLLIN, 0};
    EXPECT_EQ(poll(&wait, 1, -1), 1);
  }

private:
  void serve() {
    if (begins_ != nullptr) begins_->wait();
    std::array<pollfd, 2> wait{{{fd_.number(), POLLIN, 0}, {stop_.number(), POLLIN, 0}}};
    for (;;) {
      if (poll(wait.data(), wait.size(), -1) < 0 || wait[1].revents != 0) return;
      uffd_msg message{};
      if (read(fd_.number(), &message, sizeof message) != sizeof message) continue;
      if (message.event == UFFD_EVENT_REMOVE) {
        for (auto at = message.arg.remove.start; at < message.arg.remove.end; at += page_size)
          removed_[(at - host_) / page_size] = true;
        ++removals_;
      } else if (message.event == UFFD_EVENT_PAGEFAULT) {
        const auto at = message.arg.pagefault.address & ~(page_size - 1);
        uffdio_copy copy{};
        copy.dst = at;
        copy.src = reinterpret_cast<std::uintptr_t>(removed_[(at - host_) / page_size] ? &zeros_ : &snapshot_);
        copy.len = page_size;
        while (ioctl(fd_.number(), UFFDIO_COPY, &copy) != 0 && errno == EAGAIN)
          copy.copy = 0;
      }
    }
  }

  alignas(page_size) std::array<std::byte, page_size> snapshot_{};
  alignas(page_size) std::array<std::byte, page_size> zeros_{};
  std::uintptr_t host_;
  std::latch* begins_;
  std::optional<FaultGuard> guard_;
  test::Descriptor fd_;
  test::Descriptor stop_;
  std::array<bool, count> removed_{};
  std::atomic<unsigned> removals_ = 0;
  bool is_registered_ = false;
  std::thread thread_;
};

enum class Made { anonymous, memfd, adopted_shared_anonymous, adopted_memfd };

class SnapshotOnDemand : public testing::TestWithParam<Made> {
protected:
  void SetUp() override {
    if (!test::machine_facts().userfaultfd) GTEST_SKIP() << "this kernel, or this process, has no userfaultfd";
    switch (GetParam()) {
    case Made::anonymous:
      region.emplace(*Region::anonymous(GuestAddress(0), bytes));
      break;
    case Made::memfd:
      region.emplace(*Region::memfd(GuestAddress(0), bytes));
      break;
    case Made::adopted_shared_anonymous:
      own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
      region.emplace(*Region::adopt(GuestAddress(0), {own, bytes, Backing::shared_anonymous}));
      break;
    case Made::adopted_memfd:
      file = test::Descriptor(memfd_create("snapshot", MFD_CLOEXEC));
      ASSERT_EQ(ftruncate(file.number(), bytes), 0);
      own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.number(), 0);
      region.emplace(*Region::adopt(GuestAddress(0), {own, bytes, Backing::memfd, file.number()}));
      break;
    }
    // A huge page at a time would be another size than what the handler fills.
    madvise(region->host_address(), bytes, MADV_NOHUGEPAGE);
    memory.replace(*MemoryMap::make({*region}));
  }
  void TearDown() override {
    memory.replace({});
    region.reset();
    if (own != nullptr) munmap(own, bytes);
  }
  [[nodiscard]] std::uint8_t byte_of(std::uint64_t page) const {
    return *memory.read_value<std::uint8_t>(GuestAddress(page * page_size));
  }

  test::Descriptor file;
  void* own = nullptr;
  std::optional<Region> region;
  GuestMemory memory;
};

std::string name_of(const testing::TestParamInfo<Made>& info) {
  switch (info.param) {
  case Made::anonymous:
    return "anonymous";
  case Made::memfd:
    return "memfd";
  case Made::adopted_shared_anonymous:
    return "adopted_shared_anonymous";
  case Made::adopted_memfd:
    return "adopted_memfd";
  }
  return "unknown";
}

INSTANTIATE_TEST_SUITE_P(Kinds, SnapshotOnDemand,
                         testing::Values(Made::anonymous, Made::memfd, Made::adopted_shared_anonymous,
                                         Made::adopted_memfd),
                         name_of);

TEST_P(SnapshotOnDemand, DoesNotComeBackAfterADiscard) {
  const SnapshotHandler handler(region->host_address());
  ASSERT_TRUE(handler.is_registered());
  EXPECT_EQ(byte_of(3), SnapshotHandler::snapshot_byte);
  const auto done = memory.discard(pages(3, 2));
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(*done, (Discarded{.freed_pages = 2}));
  EXPECT_EQ(byte_of(3), 0);
  EXPECT_EQ(byte_of(4), 0);
  EXPECT_EQ(byte_of(5), SnapshotHandler::snapshot_byte);
  // It has been told before it filled those.
  EXPECT_EQ(handler.removals(), 1U);
  EXPECT_TRUE(memory.survey().zeroed().empty());
}

// Of locked memory the kernel removes nothing that way, and a hole punched through the file is told to nobody.
TEST_P(SnapshotOnDemand, DoesNotComeBackAfterADiscardOfLockedMemory) {
  if (mlock2(region->host_address(), bytes, MLOCK_ONFAULT) != 0) GTEST_SKIP() << "mlock2: errno " << errno;
  const SnapshotHandler handler(region->host_address());
  ASSERT_TRUE(handler.is_registered());
  EXPECT_EQ(byte_of(3), SnapshotHandler::snapshot_byte);
  const auto done = memory.discard(pages(3, 2));
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(done->freed_pages + done->cleared_pages, 2U);
  EXPECT_EQ(byte_of(3), 0);
  EXPECT_EQ(byte_of(4), 0);
  EXPECT_EQ(byte_of(5), SnapshotHandler::snapshot_byte);
}

// A discard holds the marks until the handler has been told.
TEST(SurveyBesideADiscard, IsStoppedInTimeAndReportsNothing) {
  if (!test::machine_facts().userfaultfd) GTEST_SKIP() << "this kernel, or this process, has no userfaultfd";
  const Region discarded = *Region::anonymous(GuestAddress(0), bytes);
  const Region other = *Region::anonymous(GuestAddress(bytes), bytes);
  GuestMemory memory(*MemoryMap::make({discarded, other}));
  memory.mark_touched(pages(count, 1), Toucher::device);
  std::latch begins(1);
  const SnapshotHandler handler(discarded.host_address(), &begins);
  ASSERT_TRUE(handler.is_registered());
  std::jthread discarding([&] { EXPECT_TRUE(memory.discard(pages(0, 2))); });
  handler.wait_for_message();

  const Survey stopped = memory.survey({.max_time = std::chrono::milliseconds(20)});
  EXPECT_TRUE(stopped.zeroed().empty());
  for (const RegionSurvey& region : stopped.regions)
    EXPECT_EQ(region.zeroed_pages, 0U);
  EXPECT_TRUE(stopped.regions[1].error && stopped.regions[1].error->code == MemoryErrc::stopped);

  begins.count_down();
  discarding.join();
  EXPECT_EQ(memory.survey().zeroed(), PageSet(pages(count + 1, count - 1)));
}

} // namespace
