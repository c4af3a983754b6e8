#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <iterator>
#include <latch>
#include <linux/userfaultfd.h>
#include <optional>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "support/descriptor.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"

import cppvmm.guest_memory;

// Memory that the embedder has its own userfaultfd over, as for a background snapshot: write protection of pages that
// are not there leaves entries in the page tables, which are of no page.

using namespace cppvmm;

namespace {

constexpr std::uint64_t count = 4096;
constexpr std::uint64_t bytes = count * page_size;
constexpr std::uint64_t huge = std::uint64_t{2} << 20;
constexpr int user_mode_only = 1; // UFFD_USER_MODE_ONLY

// include/uapi/linux/userfaultfd.h, which older distributions' headers lack.
constexpr std::uint64_t wp_hugetlbfs_shmem = 1 << 12;
constexpr std::uint64_t wp_unpopulated = 1 << 13;
constexpr std::uint64_t poison = 1 << 14;
constexpr std::uint64_t wp_async = 1 << 15;
constexpr std::uint64_t minor_shmem = 1 << 10;

/// The embedder's userfaultfd, and what it does with a region.
class Holder {
public:
  explicit Holder(const Region& region) : start_(reinterpret_cast<std::uintptr_t>(region.host_address())) {}

  /// Why not, errno; 0 when the region is held.
  [[nodiscard]] int hold(std::uint64_t features, std::uint64_t mode, std::uint64_t held = bytes) {
    fd_ = test::Descriptor(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | user_mode_only)));
    if (!fd_.is_open()) return errno;
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = features;
    uffdio_register request{};
    request.range = {.start = start_, .len = held};
    request.mode = mode;
    if (ioctl(fd_.number(), UFFDIO_API, &api) != 0 || ioctl(fd_.number(), UFFDIO_REGISTER, &request) != 0) return errno;
    return 0;
  }
  [[nodiscard]] int protect(std::uint64_t first, std::uint64_t pages) const {
    uffdio_writeprotect request{};
    request.range = {.start = start_ + first * page_size, .len = pages * page_size};
    request.mode = UFFDIO_WRITEPROTECT_MODE_WP;
    return ioctl(fd_.number(), UFFDIO_WRITEPROTECT, &request) == 0 ? 0 : errno;
  }
  /// UFFDIO_POISON (Linux 6.6): an entry that makes an access a SIGBUS.
  [[nodiscard]] int poison_page(std::uint64_t page) const {
    struct {
      uffdio_range range;
      std::uint64_t mode;
      std::int64_t updated;
    } request{.range = {.start = start_ + page * page_size, .len = page_size}, .mode = 0, .updated = 0};
    return ioctl(fd_.number(), _IOWR(UFFDIO, 0x08, request), &request) == 0 ? 0 : errno;
  }

  /// The one of a child, when one is forked (UFFD_EVENT_FORK); -1 when `over` can be read and there was none.
  [[nodiscard]] int childs_userfaultfd(int over) const {
    std::array<pollfd, 2> wait{{{fd_.number(), POLLIN, 0}, {over, POLLIN, 0}}};
    uffd_msg message{};
    if (poll(wait.data(), wait.size(), -1) < 1 || (wait[0].revents & POLLIN) == 0 ||
        read(fd_.number(), &message, sizeof message) != sizeof message)
      return -1;
    return message.event == UFFD_EVENT_FORK ? static_cast<int>(message.arg.fork.ufd) : -1;
  }

private:
  std::uintptr_t start_;
  test::Descriptor fd_;
};

/// Protects all that has an entry: 0, or errno.
int protect_by_scan(const Region& region) {
  struct {
    std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    std::uint64_t inverted, all_of, any_of, told;
  } scan{}; // struct pm_scan_arg (include/uapi/linux/fs.h, Linux 6.7)
  const test::Descriptor pagemap(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  scan.size = sizeof scan;
  scan.flags = 3; // PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
  scan.start = reinterpret_cast<std::uintptr_t>(region.host_address());
  scan.end = scan.start + region.bytes();
  scan.any_of = scan.told = 1 << 3 | 1 << 4; // PAGE_IS_PRESENT | PAGE_IS_SWAPPED
  return ioctl(pagemap.number(), _IOWR('f', 16, scan), &scan) >= 0 ? 0 : errno;
}

std::vector<std::uint64_t> pages_of(const PageSet& set) {
  std::vector<std::uint64_t> pages;
  for (const PageRange& range : set.ranges())
    for (std::uint64_t page = range.first().value(); page < range.first().value() + range.count(); ++page)
      pages.push_back(page);
  return pages;
}

using Pages = std::vector<std::uint64_t>;

class OwnWriteProtection : public testing::TestWithParam<EvidenceSource> {
protected:
  void SetUp() override {
    if (!test::machine_facts().userfaultfd) GTEST_SKIP() << "this kernel, or this process, has no userfaultfd";
    if (!test::machine_facts().entry_kinds) GTEST_SKIP() << "not privileged: the kinds of entries are not shown";
    region.emplace(*Region::anonymous(GuestAddress(0), bytes));
    // One store would bring in more than the page that is written.
    madvise(region->host_address(), bytes, MADV_NOHUGEPAGE);
    memory.replace(*MemoryMap::make({*region}));
    holder.emplace(*region);
  }
  /// All of it protected, the pages that are absent too; skips where this kernel has none of that.
  void protect_all() {
    if (const int refused = holder->hold(wp_async | wp_unpopulated, UFFDIO_REGISTER_MODE_WP))
      GTEST_SKIP() << "asynchronous write protection of absent pages (Linux 6.7): errno " << refused;
    ASSERT_EQ(holder->protect(0, count), 0);
  }
  void write(std::uint64_t page) const {
    ASSERT_TRUE(memory.write_value(GuestAddress(page * page_size), std::uint64_t{1}));
  }
  [[nodiscard]] Survey survey(bool with_content = false) const {
    SurveyOptions options;
    options.source = GetParam();
    if (with_content) options.content_check = ContentCheckOptions{};
    Survey found = memory.survey(options);
    EXPECT_NE(found.regions.front().evidence, Evidence::none);
    return found;
  }
  [[nodiscard]] Pages touched() const { return pages_of(survey().touched); }

  std::optional<Region> region;
  GuestMemory memory;
  std::optional<Holder> holder;
  test::Descriptor childs;
};

INSTANTIATE_TEST_SUITE_P(Sources, OwnWriteProtection,
                         testing::Values(EvidenceSource::automatic, EvidenceSource::legacy), [](const auto& info) {
                           return info.param == EvidenceSource::automatic ? "automatic" : "legacy";
                         });

TEST_P(OwnWriteProtection, HidesNoUntouchedPages) {
  protect_all();
  if (IsSkipped() || HasFatalFailure()) return;
  EXPECT_EQ(touched(), Pages{});
  write(5);
  write(700);
  write(4095);
  EXPECT_EQ(touched(), (Pages{5, 700, 4095}));
  EXPECT_EQ(pages_of(survey(true).touched), (Pages{5, 700, 4095}));
  // Written, and protected again; and what was populated before.
  ASSERT_EQ(holder->protect(0, count), 0);
  EXPECT_EQ(touched(), (Pages{5, 700, 4095}));
}

TEST_P(OwnWriteProtection, OfADiscardedPageIsNoData) {
  write(8);
  protect_all();
  if (IsSkipped() || HasFatalFailure()) return;
  EXPECT_EQ(touched(), (Pages{8}));
  ASSERT_TRUE(memory.discard(*PageRange::make(PageNumber(8), 1)));
  EXPECT_EQ(touched(), Pages{});
  ASSERT_EQ(holder->protect(0, count), 0);
  EXPECT_EQ(touched(), Pages{});
}

TEST_P(OwnWriteProtection, WithAHandlerHidesNoneEither) {
  if (const int refused = holder->hold(wp_unpopulated, UFFDIO_REGISTER_MODE_WP))
    GTEST_SKIP() << "write protection of absent pages (Linux 6.4): errno " << refused;
  write(9);
  ASSERT_EQ(holder->protect(0, count), 0);
  EXPECT_EQ(touched(), (Pages{9}));
}

// The kernel has one kind of entry for both.
TEST_P(OwnWriteProtection, IsToldFromPoison) {
  if (const int refused = holder->hold(poison, UFFDIO_REGISTER_MODE_MISSING))
    GTEST_SKIP() << "UFFDIO_POISON (Linux 6.6): errno " << refused;
  for (const std::uint64_t page : Pages{3, 40})
    ASSERT_EQ(holder->poison_page(page), 0);
  // The entries stay when the registration goes.
  holder.emplace(*region);
  protect_all();
  if (IsSkipped() || HasFatalFailure()) return;
  EXPECT_EQ(touched(), (Pages{3, 40}));
  // Protection by the other way there is marks those entries too.
  ASSERT_EQ(protect_by_scan(*region), 0);
  EXPECT_EQ(touched(), (Pages{3, 40}));
}

TEST_P(OwnWriteProtection, IsToldFromWhatIsSwappedOut) {
  const auto swap = test::SwapSpace::take();
  if (!swap) GTEST_SKIP() << swap.error();
  Pages written;
  for (std::uint64_t page = 0; page < 64; ++page)
    written.push_back(page * 3);
  for (const std::uint64_t page : written)
    write(page);
  protect_all();
  if (IsSkipped() || HasFatalFailure()) return;
  // Of the pages that were written: markers look swapped out too.
  const auto swapped = [&] {
    const std::vector<bool> out = test::swapped_pages(region->host_address(), bytes);
    return std::ranges::count_if(written, [&](std::uint64_t page) { return out[page]; });
  };
  // The kernel leaves alone what is on some CPU's list just now.
  for (int i = 0; i < 100 && swapped() < std::ssize(written); ++i)
    if (madvise(region->host_address(), bytes, MADV_PAGEOUT) != 0) GTEST_SKIP() << "MADV_PAGEOUT: errno " << errno;
  if (swapped() == 0) GTEST_SKIP() << "the kernel swaps nothing out";
  EXPECT_EQ(touched(), written);
  EXPECT_EQ(pages_of(survey(true).touched), written);
}

/// What a forked child finds of its copy, before it writes page 17 and after.
bool child_tells(const GuestMemory& memory, EvidenceSource source) {
  const auto touched = [&] { return pages_of(memory.survey({.leave_out = {}, .source = source}).touched); };
  return touched() == Pages{6} && memory.write_value(GuestAddress(17 * page_size), std::uint64_t{1}) &&
         touched() == Pages{6, 17};
}

TEST_P(OwnWriteProtection, EndsInAForkedChild) {
  protect_all();
  if (IsSkipped() || HasFatalFailure()) return;
  write(6);
  const pid_t child = fork();
  if (child == 0) _exit(child_tells(memory, GetParam()) ? 0 : 1);
  ASSERT_GT(child, 0) << "fork: errno " << errno;
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_P(OwnWriteProtection, HidesNoneInAForkedChildThatHasItToo) {
  if (const int refused = holder->hold(wp_async | wp_unpopulated | UFFD_FEATURE_EVENT_FORK, UFFDIO_REGISTER_MODE_WP))
    GTEST_SKIP() << "asynchronous write protection, and word of forks: errno " << refused;
  ASSERT_EQ(holder->protect(0, count), 0);
  write(6);
  const test::Descriptor over(eventfd(0, EFD_CLOEXEC));
  ASSERT_TRUE(over.is_open());
  // fork waits until the event is read; if it fails, there is none. What a thread needs to begin, a sanitizer holds
  // in fork.
  std::latch has_begun(1);
  std::thread reader([&] {
    has_begun.count_down();
    childs = test::Descriptor(holder->childs_userfaultfd(over.number()));
  });
  has_begun.wait();
  const pid_t child = fork();
  const int refused = errno;
  if (child == 0) _exit(child_tells(memory, GetParam()) ? 0 : 1);
  EXPECT_EQ(eventfd_write(over.number(), 1), 0);
  reader.join();
  ASSERT_GT(child, 0) << "fork: errno " << refused;
  EXPECT_TRUE(childs.is_open());
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

// Each way to have someone else fill the memory.
TEST(OwnUserfaultfd, ThatFillsMemoryMakesAllOfItTouched) {
  if (!test::machine_facts().userfaultfd) GTEST_SKIP() << "this kernel, or this process, has no userfaultfd";
  const Region anonymous = *Region::anonymous(GuestAddress(0), bytes);
  Holder missing(anonymous);
  ASSERT_EQ(missing.hold(0, UFFDIO_REGISTER_MODE_MISSING), 0);
  EXPECT_TRUE(GuestMemory(*MemoryMap::make({anonymous})).survey().zeroed().empty());

  const Region shared = *Region::memfd(GuestAddress(0), bytes);
  Holder minor(shared);
  if (const int refused = minor.hold(minor_shmem, UFFDIO_REGISTER_MODE_MINOR))
    GTEST_SKIP() << "minor faults of shared memory (Linux 5.14): errno " << refused;
  EXPECT_TRUE(GuestMemory(*MemoryMap::make({shared})).survey().zeroed().empty());
}

// Without markers: what is absent stays so, and counts as untouched, to whoever asks.
TEST(OwnUserfaultfd, ThatProtectsOnlyWhatIsThereHidesNothing) {
  const Region region = *Region::anonymous(GuestAddress(0), bytes);
  madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
  Holder holder(region);
  if (const int refused = holder.hold(0, UFFDIO_REGISTER_MODE_WP))
    GTEST_SKIP() << "write protection by userfaultfd: errno " << refused;
  GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_TRUE(memory.write_value(GuestAddress(7 * page_size), std::uint64_t{1}));
  ASSERT_EQ(holder.protect(0, count), 0);
  EXPECT_EQ(pages_of(memory.survey().touched), (Pages{7}));
}

// A private mapping of a file in memory: where there is no page of its own, the file tells.
TEST(OwnUserfaultfd, OverAPrivateFileHidesNoneOfItsHoles) {
  if (!test::machine_facts().entry_kinds) GTEST_SKIP() << "not privileged: the kinds of entries are not shown";
  const test::Descriptor file(memfd_create("snapshot", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(file.number(), bytes), 0);
  ASSERT_EQ(pwrite(file.number(), "data", 4, 20 * page_size), 4);
  const Region region = *Region::private_file(GuestAddress(0), bytes, file.number(), 0);
  madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
  Holder holder(region);
  if (const int refused = holder.hold(wp_async | wp_unpopulated | wp_hugetlbfs_shmem, UFFDIO_REGISTER_MODE_WP))
    GTEST_SKIP() << "asynchronous write protection (Linux 6.7): errno " << refused;
  ASSERT_EQ(holder.protect(0, count), 0);
  GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_TRUE(memory.write_value(GuestAddress(7 * page_size), std::uint64_t{1}));
  ASSERT_EQ(holder.protect(0, count), 0);
  EXPECT_EQ(pages_of(memory.survey().touched), (Pages{7, 20}));
}

// Of huge pages the kernel does not tell protection of no page from a protected page that it is moving.
TEST(OwnUserfaultfd, OverHugePagesMakesWhatItProtectsTouched) {
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << "no asynchronous write protection (Linux 6.7)";
  const auto pool = test::HugePagePool::take(8);
  if (!pool) GTEST_SKIP() << pool.error();
  constexpr std::uint64_t huge_pages = huge / page_size;
  for (const Backing backing : {Backing::hugetlb, Backing::hugetlb_memfd}) {
    const auto region = backing == Backing::hugetlb
                            ? Region::hugetlb(GuestAddress(0), 4 * huge, HugePageSize::two_mib)
                            : Region::hugetlb_memfd(GuestAddress(0), 4 * huge, HugePageSize::two_mib);
    ASSERT_TRUE(region) << region.error().message();
    GuestMemory memory(*MemoryMap::make({*region}));
    ASSERT_TRUE(memory.write_value(GuestAddress(huge), std::uint64_t{1}));
    const std::uint64_t features = wp_hugetlbfs_shmem;
    {
      Holder holder(*region);
      ASSERT_EQ(holder.hold(features | wp_async, UFFDIO_REGISTER_MODE_WP, 4 * huge), 0);
      ASSERT_EQ(holder.protect(0, huge_pages), 0);
      const Survey survey = memory.survey();
      EXPECT_NE(survey.regions[0].evidence, Evidence::none) << to_string(backing);
      EXPECT_EQ(survey.touched.page_count(), 2 * huge_pages) << to_string(backing);
      EXPECT_TRUE(survey.touched.contains(*PageRange::make(PageNumber(0), 2 * huge_pages))) << to_string(backing);
    }
    // With a handler.
    Holder holder(*region);
    ASSERT_EQ(holder.hold(features, UFFDIO_REGISTER_MODE_WP, 4 * huge), 0);
    const Survey survey = memory.survey();
    EXPECT_TRUE(survey.zeroed().empty()) << to_string(backing);
    ASSERT_TRUE(survey.regions[0].error) << to_string(backing);
    EXPECT_EQ(survey.regions[0].error->os_error, EBUSY) << survey.regions[0].error->message();
  }
}

} // namespace
