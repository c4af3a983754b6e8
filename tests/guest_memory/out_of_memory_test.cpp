#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <dirent.h>
#include <fcntl.h>
#include <fstream>
#include <functional>
#include <gtest/gtest.h>
#include <malloc.h>
#include <memory>
#include <new>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"
#include "support/huge_pages.hpp"
#include "support/machine_facts.hpp"
#include "support/temporary_file.hpp"

import cppvmm.guest_memory;

// A process that has no memory left: a guest can ask again and again, so each call that throws must leave nothing
// behind. Every allocation of a call is failed in its turn.

namespace {

/// How many more allocations of this thread succeed; negative: all.
thread_local long allocations_left = -1;

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (allocations_left == 0) return nullptr;
  if (allocations_left > 0) --allocations_left;
  return alignment <= __STDCPP_DEFAULT_NEW_ALIGNMENT__
             ? std::malloc(bytes != 0 ? bytes : 1)
             : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* const memory = allocate(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

} // namespace

void* operator new(std::size_t bytes) { return allocate_or_throw(bytes, 1); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, 1); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

/// What a process can use up.
struct Held {
  std::size_t descriptors = 0;
  std::size_t mappings = 0;
  friend bool operator==(const Held&, const Held&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Held& held) {
    return out << held.descriptors << " descriptors, " << held.mappings << " mappings";
  }
};

Held held_now() {
  Held held;
  DIR* const folder = opendir("/proc/self/fd");
  EXPECT_NE(folder, nullptr) << errno;
  while (folder != nullptr && readdir(folder) != nullptr)
    ++held.descriptors;
  if (folder != nullptr) closedir(folder);
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    ++held.mappings;
  return held;
}

/// Bytes that malloc has given out and not got back.
std::size_t heap_now() {
  const struct mallinfo2 heap = mallinfo2();
  return heap.uordblks + heap.hblkhd;
}

/// Does `call` again and again, with one allocation more each time, until it does not run out. How often it did.
long fail_each_allocation(const std::function<void()>& call) {
  constexpr long most = 100'000;
  for (long allowed = 0; allowed < most; ++allowed) {
    bool ran_out = false;
    allocations_left = allowed;
    try {
      call();
    } catch (const std::bad_alloc&) {
      ran_out = true;
    }
    allocations_left = -1;
    if (!ran_out) return allowed;
  }
  ADD_FAILURE() << "it never came to an end";
  return most;
}

/// The same, and that nothing is left of it; the first time around, for what is made once in a process.
void expect_nothing_left(const std::function<void()>& call) {
  EXPECT_GT(fail_each_allocation(call), 0);
  const Held before = held_now();
  const std::size_t heap = heap_now();
  EXPECT_GT(fail_each_allocation(call), 0);
  EXPECT_EQ(held_now(), before);
  // What is freed is kept for the next time, but not without bound.
  for (int i = 0; i < 5; ++i)
    EXPECT_GT(fail_each_allocation(call), 0);
  EXPECT_LE(heap_now(), heap + 4096);
}

struct Kind {
  const char* name;
  Backing backing;
  EvidenceSource source = EvidenceSource::automatic;
};

void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }

constexpr Kind kinds[] = {
    {"anonymous", Backing::anonymous},
    {"anonymous_legacy", Backing::anonymous, EvidenceSource::legacy},
    {"memfd", Backing::memfd},
    {"memfd_legacy", Backing::memfd, EvidenceSource::legacy},
    {"shared_anonymous", Backing::shared_anonymous},
    {"hugetlb", Backing::hugetlb},
    {"hugetlb_memfd", Backing::hugetlb_memfd},
    {"private_file", Backing::private_file},
    {"shared_file", Backing::shared_file},
};

/// 4 MiB of each kind, with data in page 5 and, where pages are of 4 KiB, in every eighth of the second half.
class OutOfMemory : public testing::TestWithParam<Kind> {
protected:
  static constexpr std::uint64_t bytes = 4 * mib;
  static constexpr std::uint64_t count = bytes / page_size;

  void SetUp() override {
    if (is_hugetlb()) {
      auto taken = test::HugePagePool::take();
      if (!taken) GTEST_SKIP() << taken.error();
      pool.emplace(std::move(*taken));
    }
    if (is_file()) {
      const auto made = test::temporary_file();
      ASSERT_TRUE(made) << made.error();
      file = test::Descriptor(*made);
      ASSERT_EQ(ftruncate(file.number(), bytes), 0);
      const test::FileFacts facts = test::file_facts(file.number());
      if (!facts.tell_the_truth()) GTEST_SKIP() << "files here do not tell the truth";
      if (backing() == Backing::shared_file && facts.in_memory) GTEST_SKIP() << "files here are of a memfd's kind";
    }
    auto made = make();
    ASSERT_TRUE(made) << made.error().message();
    region.emplace(*made);
    memory.replace(*MemoryMap::make({*region}));
    madvise(region->host_address(), bytes, MADV_NOHUGEPAGE);
    store(5);
    for (std::uint64_t page = count / 2; page < count && !is_hugetlb(); page += 8)
      store(page);
  }
  void TearDown() override {
    memory.replace({});
    region.reset();
    if (own != nullptr) munmap(own, bytes);
  }

  MemoryResult<Region> make() {
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
    case Backing::private_file:
      return Region::private_file(start, bytes, file.number(), 0);
    default:
      if (own == nullptr)
        own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (is_file() ? 0 : MAP_ANONYMOUS), file.number(),
                   0);
      EXPECT_NE(own, MAP_FAILED);
      return Region::adopt(start, {own, bytes, backing(), file.number(), 0});
    }
  }

  [[nodiscard]] static Backing backing() { return GetParam().backing; }
  [[nodiscard]] static bool is_hugetlb() {
    return backing() == Backing::hugetlb || backing() == Backing::hugetlb_memfd;
  }
  [[nodiscard]] static bool is_file() {
    return backing() == Backing::private_file || backing() == Backing::shared_file;
  }
  void store(std::uint64_t page) const { static_cast<volatile char*>(region->host_address())[page * page_size] = 1; }
  [[nodiscard]] SurveyOptions options() const { return {.leave_out = {}, .source = GetParam().source}; }

  std::optional<test::HugePagePool> pool;
  test::Descriptor file;
  void* own = nullptr;
  std::optional<Region> region;
  GuestMemory memory;
};

INSTANTIATE_TEST_SUITE_P(Kinds, OutOfMemory, testing::ValuesIn(kinds),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(OutOfMemory, ASurveyLeavesNothingBehindAndTheNextIsRight) {
  const PageSet touched = memory.survey(options()).touched;
  EXPECT_TRUE(touched.contains(PageNumber(5)));
  expect_nothing_left([this] { static_cast<void>(memory.survey(options())); });
  EXPECT_EQ(memory.survey(options()).touched, touched);
}

TEST_P(OutOfMemory, ALookAtTheContentLeavesNothingBehind) {
  SurveyOptions looking = options();
  // Tasks are run by the caller itself, and the executor may run out too.
  looking.content_check = ContentCheckOptions{.executor = [](const std::function<void()>& task) { task(); }};
  const PageSet touched = memory.survey(looking).touched;
  EXPECT_TRUE(touched.contains(PageNumber(5)));
  expect_nothing_left([&] { static_cast<void>(memory.survey(looking)); });
  EXPECT_EQ(memory.survey(looking).touched, touched);
}

TEST_P(OutOfMemory, AWatchThatCouldNotBeArmedLeavesNothingBehind) {
  const WriteWatchOptions promise{.written_through_this_mapping_only = true};
  if (!memory.arm_write_watch(GuestAddress(0), promise)) GTEST_SKIP() << "this memory, or kernel, has no write watch";
  memory.disarm_write_watch(GuestAddress(0));
  expect_nothing_left([&] {
    static_cast<void>(memory.arm_write_watch(GuestAddress(0), promise));
    memory.disarm_write_watch(GuestAddress(0));
  });
  EXPECT_FALSE(memory.survey(options()).zeroed.contains(PageNumber(5)));
}

TEST_P(OutOfMemory, ARegionThatCouldNotBeMadeLeavesNothingBehind) {
  expect_nothing_left([this] { static_cast<void>(make()); });
}

TEST_P(OutOfMemory, ADiscardLeavesNothingBehind) {
  if (backing() == Backing::hugetlb && !test::machine_facts().hugetlb_dontneed)
    GTEST_SKIP() << "this kernel discards no huge pages of private memory";
  expect_nothing_left([this] { static_cast<void>(memory.discard(pages(0, 512))); });
  EXPECT_EQ(*memory.read_value<char>(GuestAddress(5 * page_size)), 0);
}

} // namespace
