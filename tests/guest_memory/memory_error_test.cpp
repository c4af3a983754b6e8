#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <string>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#include <utility>

#include "support/descriptor.hpp"
#include "support/huge_pages.hpp"
#include "support/locked_memory.hpp"
#include "support/machine_facts.hpp"
#include "support/temporary_file.hpp"

import cppvmm.guest_memory;

// Pages that the machine has lost to a memory error. It loses them for good, so that this is for the lab's alone.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t bytes = 8 * mib;
constexpr std::uint64_t count = bytes / page_size;

PageRange pages(std::uint64_t first, std::uint64_t number) { return *PageRange::make(PageNumber(first), number); }

struct Kind {
  const char* name;
  Backing backing;
};

constexpr Kind kinds[] = {
    {"anonymous", Backing::anonymous},       {"memfd", Backing::memfd},
    {"hugetlb", Backing::hugetlb},           {"hugetlb_memfd", Backing::hugetlb_memfd},
    {"private_file", Backing::private_file}, {"shared_anonymous", Backing::shared_anonymous},
    {"shared_file", Backing::shared_file},
};

void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }

class MemoryErrorOf : public testing::TestWithParam<Kind> {
protected:
  void SetUp() override {
    const char* const lab = std::getenv("CPPVMM_LAB");
    if (lab == nullptr || *lab == 0) GTEST_SKIP() << "only the lab's machines may lose memory";
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
    for (std::uint64_t page = 0; page < count; ++page)
      *reinterpret_cast<volatile char*>(host(page)) = 1;
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
      own =
          mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (is_file() ? 0 : MAP_ANONYMOUS), file.number(), 0);
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
  [[nodiscard]] char* host(std::uint64_t page) const {
    return static_cast<char*>(region->host_address()) + page * page_size;
  }
  /// The kernel tells whoever has the page mapped, by the signal that an access will be met with.
  [[nodiscard]] bool lose(std::uint64_t page) const {
    struct sigaction ignoring{};
    struct sigaction before{};
    ignoring.sa_handler = [](int) {};
    if (sigaction(SIGBUS, &ignoring, &before) != 0) return false;
    const bool is_lost = madvise(host(page), page_size, MADV_HWPOISON) == 0;
    return sigaction(SIGBUS, &before, nullptr) == 0 && is_lost;
  }
  /// What is there, as the kernel reads it: an error where a load would be a SIGBUS.
  [[nodiscard]] std::optional<char> byte_of(std::uint64_t page) const {
    char byte = 0;
    const iovec into{&byte, 1};
    const iovec from{host(page), 1};
    if (process_vm_readv(getpid(), &into, 1, &from, 1, 0) != 1) return std::nullopt;
    return byte;
  }
  void expect_reported_pages_read_zero() const {
    const PageSet zeroed = memory.survey().zeroed();
    std::uint64_t unreadable = 0;
    for (std::uint64_t page = 0; page < count; ++page)
      if (zeroed.contains(PageNumber(page)) && byte_of(page) != 0) ++unreadable;
    EXPECT_EQ(unreadable, 0U) << "of " << zeroed.page_count() << " reported pages";
  }

  std::optional<test::HugePagePool> pool;
  test::Descriptor file;
  void* own = nullptr;
  std::optional<Region> region;
  GuestMemory memory;
};

INSTANTIATE_TEST_SUITE_P(Kinds, MemoryErrorOf, testing::ValuesIn(kinds),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(MemoryErrorOf, IsGoneAfterADiscard) {
  if (backing() == Backing::hugetlb && !test::machine_facts().hugetlb_dontneed)
    GTEST_SKIP() << "this kernel discards no huge pages of private memory";
  if (!lose(700)) GTEST_SKIP() << "no page of this memory can be lost: errno " << errno;
  EXPECT_FALSE(byte_of(700));
  expect_reported_pages_read_zero();
  const auto done = memory.discard(pages(512, 1024));
  ASSERT_TRUE(done) << done.error().message();
  for (const std::uint64_t page : {512U, 700U, 1535U})
    EXPECT_EQ(byte_of(page), std::optional<char>(0)) << page;
  expect_reported_pages_read_zero();
}

TEST_P(MemoryErrorOf, InAPartOfAHugePageIsNoDeadlyStore) {
  if (!lose(700)) GTEST_SKIP() << "no page of this memory can be lost: errno " << errno;
  // What cannot be discarded as a whole is cleared, and the lost page must not be stored to.
  const auto done = memory.discard(pages(600, 200));
  if (!done) EXPECT_EQ(done.error().os_error, EHWPOISON) << done.error().message();
  if (done) EXPECT_EQ(byte_of(700), std::optional<char>(0));
  expect_reported_pages_read_zero();
}

TEST_P(MemoryErrorOf, IsNoDeadlyStoreInLockedMemory) {
  if (!test::lock_memory(region->host_address(), bytes)) GTEST_SKIP() << "mlock2: errno " << errno;
  if (!lose(700)) GTEST_SKIP() << "no page of this memory can be lost: errno " << errno;
  const auto done = memory.discard(pages(512, 1024));
  if (!done) EXPECT_EQ(done.error().os_error, EHWPOISON) << done.error().message();
  if (done) EXPECT_EQ(byte_of(700), std::optional<char>(0));
  expect_reported_pages_read_zero();
}

TEST_P(MemoryErrorOf, IsGoneAfterAReset) {
  if (backing() == Backing::hugetlb && !test::machine_facts().hugetlb_dontneed)
    GTEST_SKIP() << "this kernel discards no huge pages of private memory";
  if (!lose(700)) GTEST_SKIP() << "no page of this memory can be lost: errno " << errno;
  const auto done = memory.reset();
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(byte_of(700), std::optional<char>(0));
  expect_reported_pages_read_zero();
}

// The watch protects the entry of a lost page as it does others, and it is never written.
TEST_P(MemoryErrorOf, IsNotReportedBehindAWriteWatch) {
  if (is_file()) GTEST_SKIP() << "files are not watched";
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << "no asynchronous write protection (Linux 6.7)";
  const auto emptied = memory.reset();
  ASSERT_TRUE(emptied) << emptied.error().message();
  *reinterpret_cast<volatile char*>(host(700)) = 0;
  if (!lose(700)) GTEST_SKIP() << "no page of this memory can be lost: errno " << errno;
  const auto armed = memory.arm_write_watch(GuestAddress(0),
                                            {.baseline = Baseline::promise, .written_through_this_mapping_only = true});
  ASSERT_TRUE(armed) << armed.error().message();
  expect_reported_pages_read_zero();
  EXPECT_FALSE(memory.survey().zeroed().contains(PageNumber(700)));
}

} // namespace
