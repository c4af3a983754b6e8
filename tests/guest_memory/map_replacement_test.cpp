#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <iterator>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <memory>
#include <optional>
#include <poll.h>
#include <span>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "support/descriptor.hpp"

import cppvmm.guest_memory;

// Maps that are replaced while others access them: no access meets one that is gone, and each goes with its last one.

using namespace cppvmm;

namespace {

#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
constexpr int replacements = 100'000;
#else
constexpr int replacements = 1'000'000;
#endif

constexpr std::uint64_t bytes = 64 << 10;
constexpr GuestAddress start{0x10000};

/// Memory that holds one word everywhere that is read here.
Region filled(std::uint64_t word) {
  const Region region = *Region::anonymous(start, bytes);
  const MemoryMap map = *MemoryMap::make({region});
  for (const std::uint64_t at : {std::uint64_t{0}, bytes - 16})
    for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{8}})
      EXPECT_TRUE(map.write_value(GuestAddress(start.value() + at + offset), word));
  return region;
}

TEST(ReplacedMap, IsReadWholeByAllWhoBeganInTime) {
  constexpr std::array<std::uint64_t, 2> words = {0x1111'1111'1111'1111, 0x2222'2222'2222'2222};
  GuestMemory memory(*MemoryMap::make({filled(words[0])}));
  std::atomic<bool> is_over = false;
  std::atomic<std::uint64_t> reads = 0;
  std::atomic<std::uint64_t> wrong = 0;
  std::vector<std::jthread> readers;
  for (int i = 0; i < 3; ++i)
    readers.emplace_back([&] {
      std::uint64_t own = 0;
      while (!is_over.load(std::memory_order_relaxed)) {
        // Two words of one access are of one map.
        std::array<std::uint64_t, 2> pair{};
        const bool is_read =
            memory.read(GuestAddress(start.value() + bytes - 16), std::as_writable_bytes(std::span(pair))).has_value();
        if (!is_read || pair[0] != pair[1] || (pair[0] != words[0] && pair[0] != words[1])) ++wrong;
        ++own;
      }
      reads += own;
    });
  std::array<Region, 2> regions = {filled(words[0]), filled(words[1])};
  for (int i = 0; i < replacements; ++i) {
    const std::size_t which = static_cast<std::size_t>(i) % 2;
    // Memory is unmapped, too, and other memory comes to its place.
    if (i % 512 == 0) regions[which] = filled(words[which]);
    memory.replace(*MemoryMap::make({regions[which]}));
  }
  is_over = true;
  readers.clear();
  EXPECT_EQ(wrong, 0U);
  EXPECT_GT(reads, 0U);
  std::printf("%d maps, %llu reads\n", replacements, static_cast<unsigned long long>(reads.load()));
}

/// Removes a region that others access, and waits until nobody does: so many times.
void remove_under_writers(int times) {
  GuestMemory memory(*MemoryMap::make({filled(1)}));
  std::atomic<bool> is_over = false;
  std::vector<std::jthread> writers;
  for (int i = 0; i < 3; ++i)
    writers.emplace_back([&] {
      while (!is_over.load(std::memory_order_relaxed))
        static_cast<void>(memory.write_value(start, std::uint64_t{3}));
    });
  for (int i = 0; i < times; ++i) {
    const auto use = memory.remove_region(start);
    ASSERT_TRUE(use);
    // It goes with whoever reads it last, though nobody changes the map again.
    use->wait();
    ASSERT_TRUE(memory.add_region(filled(1)));
  }
  is_over = true;
}

TEST(ReplacedMap, IsGoneWhenNobodyReadsIt) { remove_under_writers(5000); }

/// Has membarrier(2) refused from now on: whether it is.
bool refuse_membarrier() {
  sock_filter steps[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_membarrier, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{.len = std::size(steps), .filter = steps};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

/// In a forked child, whose exit status tells: 0.
template <class Work>
void expect_in_child(Work work) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(work());
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(ReplacedMap, IsGoneToWhereThereIsNoMembarrier) {
  expect_in_child([] {
    if (!refuse_membarrier()) return 2;
    remove_under_writers(2000);
    return testing::Test::HasFailure() ? 1 : 0;
  });
}

// What was allowed when the memory was made, and is refused now, keeps what is replaced.
TEST(ReplacedMap, StaysWhileMembarrierIsRefused) {
  expect_in_child([] {
    GuestMemory memory(*MemoryMap::make({filled(1)}));
    if (memory.read_value<std::uint64_t>(start).value_or(0) != 1 || !refuse_membarrier()) return 2;
    const auto use = memory.remove_region(start);
    if (!use || use->is_over()) return 3;
    return memory.add_region(filled(2)) && memory.read_value<std::uint64_t>(start).value_or(0) == 2 ? 0 : 4;
  });
}

/// In memory that is known to be small pages without that.
Region of_16_pages() {
  Region region = *Region::anonymous(start, 16 * page_size);
  static_cast<void>(region.set_huge_pages(HugePages::never)); // unavailable where there are none
  return region;
}

// What was marked meanwhile could not all be seen.
TEST(Marks, AreOfAllRamWhileMembarrierIsRefused) {
  expect_in_child([] {
    GuestMemory memory(*MemoryMap::make({of_16_pages()}));
    const PageRange page = *PageRange::make(start.page(), 1);
    if (memory.survey().zeroed().page_count() != 16 || !refuse_membarrier()) return 2;
    if (memory.survey().zeroed().page_count() != 16) return 3;
    memory.mark_touched(page, Toucher::device);
    const Survey survey = memory.survey();
    if (!survey.zeroed().empty() || survey.regions[0].zeroed_pages != 0 || !survey.regions[0].error) return 4;
    if (!memory.marks().pages().contains(*PageRange::make(start.page(), 16))) return 6;
    return survey.regions[0].error->os_error == EPERM ? 0 : 5;
  });
}

TEST(Marks, AreExactWhereThereWasNoMembarrier) {
  expect_in_child([] {
    if (!refuse_membarrier()) return 2;
    GuestMemory memory(*MemoryMap::make({of_16_pages()}));
    const PageRange page = *PageRange::make(start.page(), 1);
    // By the whole way, and by the quick one.
    for (int i = 0; i < 2; ++i) {
      memory.mark_touched(page, Toucher::device);
      if (memory.survey().touched != PageSet(page)) return 3;
      memory.clear_marks(page);
      if (!memory.survey().touched.empty()) return 4;
    }
    return 0;
  });
}

/// A userfaultfd of the test's, over memory that is missing.
class Handler {
public:
  [[nodiscard]] int hold(void* at, std::uint64_t size) {
    constexpr int user_mode_only = 1;
    fd_ = test::Descriptor(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | user_mode_only)));
    if (!fd_.is_open()) return errno;
    uffdio_api api{};
    api.api = UFFD_API;
    uffdio_register request{};
    request.range = {.start = reinterpret_cast<std::uintptr_t>(at), .len = size};
    request.mode = UFFDIO_REGISTER_MODE_MISSING;
    return ioctl(fd_.number(), UFFDIO_API, &api) == 0 && ioctl(fd_.number(), UFFDIO_REGISTER, &request) == 0 ? 0
                                                                                                             : errno;
  }
  /// Waits until somebody does.
  [[nodiscard]] std::uint64_t faulting() const {
    pollfd wait{.fd = fd_.number(), .events = POLLIN, .revents = 0};
    uffd_msg message{};
    while (poll(&wait, 1, -1) != 1 || read(fd_.number(), &message, sizeof message) != sizeof message) {
    }
    return message.arg.pagefault.address / page_size * page_size;
  }
  [[nodiscard]] int bring_zeros(std::uint64_t at) const {
    uffdio_zeropage request{};
    request.range = {.start = at, .len = page_size};
    return ioctl(fd_.number(), UFFDIO_ZEROPAGE, &request) == 0 ? 0 : errno;
  }

private:
  test::Descriptor fd_;
};

TEST(ReplacedMap, StaysForAnAccessThatIsHeldUp) {
  std::optional<Region> region = *Region::anonymous(start, bytes);
  Handler handler;
  if (const int refused = handler.hold(region->host_address(), bytes))
    GTEST_SKIP() << "no userfaultfd for missing pages: errno " << refused;
  GuestMemory memory(*MemoryMap::make({*region}));
  region.reset();
  std::optional<std::uint64_t> value;
  std::jthread reader([&] {
    if (const auto read = memory.read_value<std::uint64_t>(start)) value = *read;
  });
  const std::uint64_t page = handler.faulting();
  const auto use = memory.remove_region(start);
  ASSERT_TRUE(use);
  EXPECT_FALSE(use->is_over());
  // Nor do other changes take it away, or other accesses.
  ASSERT_TRUE(memory.add_region(filled(7)));
  EXPECT_EQ(memory.read_value<std::uint64_t>(start).value_or(0), 7U);
  EXPECT_FALSE(use->is_over());
  EXPECT_EQ(handler.bring_zeros(page), 0);
  use->wait();
  reader.join();
  EXPECT_EQ(value, 0U);
}

TEST(ReplacedMap, IsReplacedInAForkedChildToo) {
  GuestMemory memory(*MemoryMap::make({filled(1)}));
  EXPECT_EQ(memory.read_value<std::uint64_t>(start).value_or(0), 1U);
  expect_in_child([&] {
    const auto use = memory.remove_region(start);
    const bool is_right = use && use->is_over() && memory.add_region(filled(2)) &&
                          memory.read_value<std::uint64_t>(start).value_or(0) == 2;
    return is_right ? 0 : 1;
  });
  EXPECT_EQ(memory.read_value<std::uint64_t>(start).value_or(0), 1U);
}

/// Accesses memory when its thread ends.
struct AccessAtEnd {
  const GuestMemory* memory = nullptr;
  std::atomic<std::uint64_t>* read = nullptr;
  ~AccessAtEnd() {
    if (memory != nullptr) *read = memory->read_value<std::uint64_t>(start).value_or(0);
  }
};
thread_local AccessAtEnd access_at_end;

TEST(ReplacedMap, IsReadAtAThreadsEnd) {
  GuestMemory memory(*MemoryMap::make({filled(5)}));
  std::atomic<std::uint64_t> read = 0;
  std::jthread([&] {
    // Made before the first access, so that it goes after what the library has of the thread.
    access_at_end.memory = &memory;
    access_at_end.read = &read;
    EXPECT_EQ(memory.read_value<std::uint64_t>(start).value_or(0), 5U);
  }).join();
  EXPECT_EQ(read, 5U);
  const auto use = memory.remove_region(start);
  ASSERT_TRUE(use);
  EXPECT_TRUE(use->is_over());
}

} // namespace
