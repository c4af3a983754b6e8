#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fcntl.h>
#include <functional>
#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <ostream>
#include <poll.h>
#include <span>
#include <string>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"
#include "support/temporary_file.hpp"

import cppvmm.guest_memory;

// Whatever became of the memory: what the next survey reports reads zero, and no access to it is a signal.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t bytes = 8 * mib;
constexpr std::uint64_t count = bytes / page_size;
constexpr std::uint64_t written = count * 3 / 4; // the rest is never touched
constexpr auto filling = std::byte{0xAA};

// Younger than the headers here.
constexpr int advice_guard_install = 102; // MADV_GUARD_INSTALL, Linux 6.13; of files 6.15
struct PoisonRequest {
  uffdio_range range;
  std::uint64_t mode;
  std::int64_t updated;
};
constexpr unsigned long poison_request = _IOWR(UFFDIO, 0x08, PoisonRequest); // UFFDIO_POISON, Linux 6.6
constexpr std::uint64_t poison_feature = 1 << 14;

PageRange pages(std::uint64_t first, std::uint64_t number) { return *PageRange::make(PageNumber(first), number); }

struct Kind {
  const char* name;
  Backing backing;
  bool is_adopted;
};

constexpr Kind kinds[] = {
    {"anonymous", Backing::anonymous, false},
    {"memfd", Backing::memfd, false},
    {"hugetlb", Backing::hugetlb, false},
    {"hugetlb_memfd", Backing::hugetlb_memfd, false},
    {"private_file", Backing::private_file, false},
    {"adopted_anonymous", Backing::anonymous, true},
    {"adopted_memfd", Backing::memfd, true},
    {"adopted_shared_anonymous", Backing::shared_anonymous, true},
    {"adopted_hugetlb", Backing::hugetlb, true},
    {"adopted_hugetlb_memfd", Backing::hugetlb_memfd, true},
    {"adopted_private_file", Backing::private_file, true},
    {"adopted_shared_file", Backing::shared_file, true},
};

void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }

/// What a survey may go by beside the kernel's books.
enum class Look { books, content, watch, log };
constexpr Look looks[] = {Look::books, Look::content, Look::watch, Look::log};
constexpr const char* look_names[] = {"books", "content", "watch", "log"};

/// Brings in 0xAA where anything is missing, as a handler that was told nothing does.
class Filler {
public:
  Filler(void* host, std::uint64_t unit) : unit_(unit), data_(unit, filling) {
    fd_ = test::Descriptor(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
    stop_ = test::Descriptor(eventfd(0, EFD_CLOEXEC));
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS;
    uffdio_register request{};
    request.range = {.start = reinterpret_cast<std::uintptr_t>(host), .len = bytes};
    request.mode = UFFDIO_REGISTER_MODE_MISSING;
    is_registered_ = fd_.is_open() && stop_.is_open() && ioctl(fd_.number(), UFFDIO_API, &api) == 0 &&
                     ioctl(fd_.number(), UFFDIO_REGISTER, &request) == 0;
    if (is_registered_) thread_ = std::thread([this] { serve(); });
  }
  Filler(const Filler&) = delete;
  Filler& operator=(const Filler&) = delete;
  ~Filler() {
    const std::uint64_t one = 1;
    if (!thread_.joinable()) return;
    EXPECT_EQ(write(stop_.number(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
    thread_.join();
  }
  [[nodiscard]] bool is_registered() const { return is_registered_; }

private:
  void serve() {
    std::array<pollfd, 2> wait{{{fd_.number(), POLLIN, 0}, {stop_.number(), POLLIN, 0}}};
    for (;;) {
      if (poll(wait.data(), wait.size(), -1) < 0 || wait[1].revents != 0) return;
      uffd_msg message{};
      if (read(fd_.number(), &message, sizeof message) != sizeof message) continue;
      if (message.event != UFFD_EVENT_PAGEFAULT) continue;
      uffdio_copy copy{};
      copy.dst = message.arg.pagefault.address & ~(unit_ - 1);
      copy.src = reinterpret_cast<std::uintptr_t>(data_.data());
      copy.len = unit_;
      while (ioctl(fd_.number(), UFFDIO_COPY, &copy) != 0 && errno == EAGAIN)
        copy.copy = 0;
    }
  }

  std::uint64_t unit_;
  std::vector<std::byte> data_;
  test::Descriptor fd_;
  test::Descriptor stop_;
  bool is_registered_ = false;
  std::thread thread_;
};

/// A userfaultfd of the embedder's that holds the memory and does nothing.
test::Descriptor held(void* host, std::uint64_t mode, std::uint64_t features) {
  test::Descriptor fd(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = features;
  uffdio_register request{};
  request.range = {.start = reinterpret_cast<std::uintptr_t>(host), .len = bytes};
  request.mode = mode;
  if (!fd.is_open() || ioctl(fd.number(), UFFDIO_API, &api) != 0 || ioctl(fd.number(), UFFDIO_REGISTER, &request) != 0)
    return test::Descriptor();
  return fd;
}

class ZeroMeansZero : public testing::TestWithParam<Kind> {
protected:
  void SetUp() override {
    if (!is_hugetlb()) return;
    if (backing() == Backing::hugetlb && !test::machine_facts().hugetlb_dontneed)
      GTEST_SKIP() << "this kernel discards no huge pages of private memory";
    auto taken = test::HugePagePool::take();
    if (!taken) GTEST_SKIP() << taken.error();
    pool.emplace(std::move(*taken));
  }
  void TearDown() override { unmake(); }

  void unmake() {
    memory.end_write_log();
    memory.replace({});
    region.reset();
    if (own != nullptr) munmap(own, bytes);
    own = nullptr;
    file = test::Descriptor();
  }

  MemoryResult<Region> make_own() {
    const GuestAddress start(0);
    switch (backing()) {
    case Backing::anonymous:
      return Region::anonymous(start, bytes);
    case Backing::memfd:
      return Region::memfd(start, bytes);
    case Backing::hugetlb:
      return Region::hugetlb(start, bytes, HugePageSize::two_mib);
    case Backing::hugetlb_memfd:
      return Region::hugetlb_memfd(start, bytes, HugePageSize::two_mib);
    default:
      return Region::private_file(start, bytes, file.number(), 0);
    }
  }
  MemoryResult<Region> make_adopted() {
    const bool is_private =
        backing() == Backing::anonymous || backing() == Backing::hugetlb || backing() == Backing::private_file;
    int flags = is_private ? MAP_PRIVATE : MAP_SHARED;
    if (!file.is_open()) flags |= MAP_ANONYMOUS;
    if (backing() == Backing::hugetlb) flags |= MAP_HUGETLB;
    own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file.number(), 0);
    EXPECT_NE(own, MAP_FAILED);
    return Region::adopt(GuestAddress(0), {own, bytes, backing(), file.number(), 0});
  }

  /// The memory anew, three quarters of it filled while what the look needs is on. False where that cannot be had.
  [[nodiscard]] bool make(Look look) {
    unmake();
    if (backing() == Backing::private_file || backing() == Backing::shared_file) {
      const auto made = test::temporary_file();
      if (!made) return false;
      file = test::Descriptor(*made);
      if (ftruncate(file.number(), bytes) != 0) return false;
      const test::FileFacts facts = test::file_facts(file.number());
      if (!facts.tell_the_truth() || (backing() == Backing::shared_file && facts.in_memory)) return false;
    } else if (GetParam().is_adopted && (backing() == Backing::memfd || backing() == Backing::hugetlb_memfd)) {
      file = test::Descriptor(memfd_create("adopted", MFD_CLOEXEC | (backing() == Backing::memfd ? 0U : MFD_HUGETLB)));
      if (ftruncate(file.number(), bytes) != 0) return false;
    }
    auto made = GetParam().is_adopted ? make_adopted() : make_own();
    if (!made) return false;
    region.emplace(*made);
    if (!is_hugetlb()) madvise(region->host_address(), bytes, MADV_NOHUGEPAGE);
    memory.replace(*MemoryMap::make({*region}));
    if (look == Look::watch && !memory.arm_write_watch(GuestAddress(0), {.written_through_this_mapping_only = true}))
      return false;
    // Of all that was written, which is what went through the accessors.
    const WriteLog nothing{.collect = [](PageRange, std::span<std::uint64_t>) { return MemoryResult<void>(); }};
    if (look == Look::log && !memory.begin_write_log(nothing, {.complete = true})) return false;
    return memory.write(GuestAddress(0), std::vector<std::byte>(written * page_size, filling)).has_value();
  }

  [[nodiscard]] static Backing backing() { return GetParam().backing; }
  [[nodiscard]] static bool is_hugetlb() {
    return backing() == Backing::hugetlb || backing() == Backing::hugetlb_memfd;
  }
  [[nodiscard]] static bool is_shared() {
    return backing() != Backing::anonymous && backing() != Backing::hugetlb && backing() != Backing::private_file;
  }
  [[nodiscard]] std::byte* host(std::uint64_t page) const {
    return static_cast<std::byte*>(region->host_address()) + page * page_size;
  }

  /// Reads as the kernel does, for which there is no signal: a page of data, or none.
  [[nodiscard]] bool reads_zero(std::uint64_t page) const {
    std::array<std::byte, page_size> data;
    const iovec into{data.data(), data.size()};
    const iovec from{host(page), data.size()};
    if (process_vm_readv(getpid(), &into, 1, &from, 1, 0) != static_cast<ssize_t>(page_size)) return false;
    return data == std::array<std::byte, page_size>{};
  }
  PageSet surveyed(Look look) const {
    SurveyOptions options;
    if (look == Look::content) options.content_check.emplace();
    return memory.survey(options).zeroed();
  }
  /// Twice, for the first has brought in what it read.
  void expect_reported_pages_read_zero(Look look) const {
    for (int time = 0; time < 2; ++time) {
      const PageSet zeroed = surveyed(look);
      std::uint64_t wrong = 0;
      for (const PageRange& range : zeroed.ranges())
        for (std::uint64_t page = range.first().value(); page < range.end().value(); ++page)
          if (!reads_zero(page)) ++wrong;
      ASSERT_EQ(wrong, 0U) << "of " << zeroed.page_count() << " reported pages, by "
                           << look_names[static_cast<int>(look)];
      for (const PageRange& range : zeroed.ranges())
        ASSERT_EQ(memory.read_value<std::uint64_t>(range.start_address()), 0U);
    }
  }
  /// For each look: what becomes of the memory, then the survey. `act` returns whether it was done.
  void each_look(const std::function<bool()>& act) {
    int done = 0;
    for (const Look look : looks) {
      if (!make(look) || !act()) continue;
      ++done;
      expect_reported_pages_read_zero(look);
      if (HasFatalFailure()) return;
    }
    if (done == 0) GTEST_SKIP() << "this memory, or this kernel, has no such thing";
  }
  /// Without the library's help.
  [[nodiscard]] bool discard_ourselves(std::uint64_t first, std::uint64_t number) const {
    return madvise(host(first), number * page_size, is_shared() ? MADV_REMOVE : MADV_DONTNEED) == 0;
  }

  std::optional<test::HugePagePool> pool;
  test::Descriptor file;
  void* own = nullptr;
  std::optional<Region> region;
  GuestMemory memory;
};

INSTANTIATE_TEST_SUITE_P(Kinds, ZeroMeansZero, testing::ValuesIn(kinds),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(ZeroMeansZero, AfterADiscardOfAll) {
  each_look([&] { return memory.discard(pages(0, count)).has_value(); });
}

TEST_P(ZeroMeansZero, AfterABalloonTookEverySecondPage) {
  each_look([&] {
    PageSet balloon;
    for (std::uint64_t page = 101; page < written; page += 2)
      balloon.add(pages(page, 1));
    return memory.discard(balloon).has_value();
  });
}

TEST_P(ZeroMeansZero, AfterPartsOfHugePagesWereDiscarded) {
  each_look([&] { return memory.discard(pages(100, 1300)).has_value(); });
}

TEST_P(ZeroMeansZero, AfterAResetThatKeepsSome) {
  each_look([&] { return memory.reset(PageSet(pages(700, 5))).has_value(); });
}

TEST_P(ZeroMeansZero, AfterTheEmbedderDiscardedItself) {
  each_look([&] { return discard_ourselves(512, 512); });
}

TEST_P(ZeroMeansZero, AfterAHoleWasPunchedThroughTheFile) {
  each_look([&] {
    return file.is_open() && is_shared() &&
           fallocate(file.number(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 512 * page_size, 512 * page_size) == 0;
  });
}

TEST_P(ZeroMeansZero, AfterItWasGivenUp) {
  each_look([&] { return madvise(host(512), 512 * page_size, MADV_FREE) == 0; });
}

TEST_P(ZeroMeansZero, AfterItWasColdAndPagedOut) {
  const auto swap = test::SwapSpace::take();
  if (!swap) GTEST_SKIP() << swap.error();
  each_look([&] {
    return madvise(host(0), bytes, MADV_COLD) == 0 && madvise(host(0), bytes, MADV_PAGEOUT) == 0 &&
           memory.discard(pages(512, 300)).has_value();
  });
}

TEST_P(ZeroMeansZero, BehindGuardPages) {
  each_look([&] {
    // Over memory with data, and over memory that nobody touched.
    return madvise(host(600), 20 * page_size, advice_guard_install) == 0 &&
           madvise(host(written + 100), 20 * page_size, advice_guard_install) == 0;
  });
}

TEST_P(ZeroMeansZero, BehindPoisonMarkers) {
  each_look([&] {
    // What is poisoned has to be missing, and stays poisoned when the userfaultfd is gone.
    if (!memory.discard(pages(512, 512))) return false;
    const auto fd = held(host(0), UFFDIO_REGISTER_MODE_MISSING,
                         poison_feature | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS);
    if (!fd.is_open()) return false;
    for (const std::uint64_t first : {std::uint64_t{512}, written}) {
      PoisonRequest request{};
      request.range = {.start = reinterpret_cast<std::uintptr_t>(host(first)), .len = 512 * page_size};
      if (ioctl(fd.number(), poison_request, &request) != 0) return false;
    }
    return true;
  });
}

TEST_P(ZeroMeansZero, WhereAUserfaultfdFillsWhatIsMissing) {
  int done = 0;
  for (const Look look : looks) {
    if (!make(look)) continue;
    {
      const Filler filler(host(0), is_hugetlb() ? 2 * mib : page_size);
      if (!filler.is_registered()) continue; // the watch's own has it
      ++done;
      ASSERT_TRUE(discard_ourselves(512, 512));
      expect_reported_pages_read_zero(look);
      ASSERT_FALSE(HasFatalFailure());
    }
    expect_reported_pages_read_zero(look);
    ASSERT_FALSE(HasFatalFailure());
  }
  if (done == 0) GTEST_SKIP() << "no userfaultfd can have this memory here";
}

TEST_P(ZeroMeansZero, WhereAUserfaultfdHoldsItForWriteProtection) {
  each_look([&] {
    const auto fd = held(host(0), UFFDIO_REGISTER_MODE_WP, UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    if (!fd.is_open() || !memory.discard(pages(512, 512))) return false;
    uffdio_writeprotect protect{};
    protect.range = {.start = reinterpret_cast<std::uintptr_t>(host(0)), .len = bytes};
    protect.mode = UFFDIO_WRITEPROTECT_MODE_WP;
    if (ioctl(fd.number(), UFFDIO_WRITEPROTECT, &protect) != 0) return false;
    expect_reported_pages_read_zero(Look::books);
    return true;
  });
}

// It loses the memory for good, so that this is for the lab's machines alone.
TEST_P(ZeroMeansZero, AfterAMemoryErrorAndAHoleOfTheEmbedders) {
  const char* const lab = std::getenv("CPPVMM_LAB");
  if (lab == nullptr || *lab == 0) GTEST_SKIP() << "only the lab's machines may lose memory";
  struct sigaction ignoring{};
  struct sigaction before{};
  ignoring.sa_handler = [](int) {};
  ASSERT_EQ(sigaction(SIGBUS, &ignoring, &before), 0);
  each_look([&] {
    if (madvise(host(700), page_size, MADV_HWPOISON) != 0) return false;
    expect_reported_pages_read_zero(Look::books);
    return discard_ourselves(512, 512);
  });
  ASSERT_EQ(sigaction(SIGBUS, &before, nullptr), 0);
}

} // namespace
