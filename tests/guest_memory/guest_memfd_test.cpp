#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <optional>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "support/descriptor.hpp"
#include "support/machine_facts.hpp"

import cppvmm.guest_memory;

// Guest memory in a guest_memfd that the VMM can map: what it holds is in its page cache, whoever wrote it.

using namespace cppvmm;

namespace {

constexpr std::uint64_t bytes = 4 << 20;
constexpr std::uint64_t count = bytes / page_size;

// include/uapi/linux/kvm.h (Linux 6.8 and 6.18), which the headers of older distributions lack.
struct CreateGuestMemfd {
  std::uint64_t size;
  std::uint64_t flags;
  std::array<std::uint64_t, 6> reserved;
};
constexpr unsigned long create_guest_memfd = _IOWR(KVMIO, 0xd4, CreateGuestMemfd);
constexpr std::uint64_t flag_mmap = 1 << 0;
constexpr std::uint64_t flag_init_shared = 1 << 1;

struct MemoryRegion2 {
  std::uint32_t slot;
  std::uint32_t flags;
  std::uint64_t guest_address;
  std::uint64_t size;
  std::uint64_t host_address;
  std::uint64_t offset;
  std::uint32_t guest_memfd;
  std::uint32_t reserved;
  std::array<std::uint64_t, 14> more;
};
constexpr unsigned long set_memory_region2 = _IOW(KVMIO, 0x49, MemoryRegion2);
constexpr std::uint32_t region_has_guest_memfd = 1 << 2;

PageSet pages(std::initializer_list<std::uint64_t> numbers) {
  PageSet set;
  for (const std::uint64_t number : numbers)
    set.add(*PageRange::make(PageNumber(number), 1));
  return set;
}

class GuestMemfd : public testing::Test {
protected:
  void SetUp() override {
    if (const auto missing = test::kvm_missing(); !missing.empty()) GTEST_SKIP() << missing;
    kvm = test::Descriptor(open("/dev/kvm", O_RDWR | O_CLOEXEC));
    vm = test::Descriptor(ioctl(kvm.number(), KVM_CREATE_VM, 0));
    ASSERT_TRUE(vm.is_open()) << errno;
    CreateGuestMemfd request{.size = bytes, .flags = flag_mmap | flag_init_shared, .reserved = {}};
    file = test::Descriptor(ioctl(vm.number(), create_guest_memfd, &request));
    if (!file.is_open()) GTEST_SKIP() << "this KVM has no guest_memfd that can be mapped";
    own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.number(), 0);
    ASSERT_NE(own, MAP_FAILED);
  }
  void TearDown() override {
    if (own != nullptr) munmap(own, bytes);
  }

  [[nodiscard]] MemoryResult<Region> adopt(Backing backing, int fd) const {
    return Region::adopt(GuestAddress(0), {own, bytes, backing, fd, 0});
  }
  [[nodiscard]] volatile char& at(std::uint64_t page) const {
    return static_cast<volatile char*>(own)[page * page_size];
  }

  test::Descriptor kvm;
  test::Descriptor vm;
  test::Descriptor file;
  void* own = nullptr;
};

TEST_F(GuestMemfd, IsTouchedWhereItsPageCacheHasPages) {
  const auto region = adopt(Backing::guest_memfd, file.number());
  ASSERT_TRUE(region) << region.error().message();
  GuestMemory memory(*MemoryMap::make({*region}));
  EXPECT_TRUE(memory.survey().touched.empty());
  for (const std::uint64_t page : {std::uint64_t{0}, std::uint64_t{7}, count - 1})
    at(page) = 1;
  ASSERT_EQ(fallocate(file.number(), FALLOC_FL_KEEP_SIZE, 9 * page_size, page_size), 0);
  for (const auto source : {EvidenceSource::automatic, EvidenceSource::legacy}) {
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    EXPECT_EQ(survey.touched, pages({0, 7, 9, count - 1}));
    EXPECT_EQ(survey.regions[0].evidence, Evidence::page_cache);
  }
  // What is dropped from the page tables is still in the page cache.
  ASSERT_EQ(madvise(own, bytes, MADV_DONTNEED), 0);
  EXPECT_EQ(memory.survey().touched, pages({0, 7, 9, count - 1}));

  const auto discarded = memory.discard(pages({7, 8}));
  ASSERT_TRUE(discarded) << discarded.error().message();
  EXPECT_EQ(discarded->freed_pages, 2U);
  EXPECT_EQ(memory.survey().touched, pages({0, 9, count - 1}));
  EXPECT_EQ(at(7), 0);
}

TEST_F(GuestMemfd, IsNotTakenForAnotherKind) {
  for (const Backing wrong : {Backing::memfd, Backing::shared_file, Backing::private_file, Backing::hugetlb_memfd}) {
    const auto region = adopt(wrong, file.number());
    ASSERT_FALSE(region) << to_string(wrong);
    EXPECT_EQ(region.error().code, MemoryErrc::wrong_nature) << to_string(wrong);
  }
  EXPECT_FALSE(adopt(Backing::shared_anonymous, -1));
  EXPECT_FALSE(adopt(Backing::anonymous, -1));

  const test::Descriptor memfd(memfd_create("[kvm-gmem]", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(memfd.number(), bytes), 0);
  EXPECT_FALSE(adopt(Backing::guest_memfd, memfd.number()));
  ASSERT_NE(mmap(own, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memfd.number(), 0), MAP_FAILED);
  EXPECT_FALSE(adopt(Backing::guest_memfd, memfd.number()));
  EXPECT_FALSE(adopt(Backing::guest_memfd, file.number()));
}

// Another one's file, and another part of it.
TEST_F(GuestMemfd, IsNotTakenForAnotherOne) {
  CreateGuestMemfd request{.size = 2 * bytes, .flags = flag_mmap | flag_init_shared, .reserved = {}};
  const test::Descriptor other(ioctl(vm.number(), create_guest_memfd, &request));
  ASSERT_TRUE(other.is_open()) << errno;
  EXPECT_FALSE(adopt(Backing::guest_memfd, other.number()));
  EXPECT_FALSE(Region::adopt(GuestAddress(0), {own, bytes / 2, Backing::guest_memfd, file.number(), bytes / 2}));
}

/// Runs code in real mode, at `page` of guest memory, until it halts.
std::optional<std::uint32_t> run(int kvm, int vm, std::uint64_t page) {
  const test::Descriptor vcpu(ioctl(vm, KVM_CREATE_VCPU, 0));
  const int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  if (!vcpu.is_open() || size <= 0) return std::nullopt;
  void* const shared =
      mmap(nullptr, static_cast<std::size_t>(size), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.number(), 0);
  if (shared == MAP_FAILED) return std::nullopt;
  kvm_sregs segments{};
  kvm_regs registers{};
  std::optional<std::uint32_t> reason;
  if (ioctl(vcpu.number(), KVM_GET_SREGS, &segments) == 0) {
    segments.cs.base = 0;
    segments.cs.selector = 0;
    registers.rip = page * page_size;
    registers.rflags = 2;
    if (ioctl(vcpu.number(), KVM_SET_SREGS, &segments) == 0 && ioctl(vcpu.number(), KVM_SET_REGS, &registers) == 0 &&
        ioctl(vcpu.number(), KVM_RUN, 0) == 0)
      reason = static_cast<kvm_run*>(shared)->exit_reason;
  }
  munmap(shared, static_cast<std::size_t>(size));
  return reason;
}

TEST_F(GuestMemfd, IsTouchedWhereTheGuestStores) {
  const auto region = adopt(Backing::guest_memfd, file.number());
  ASSERT_TRUE(region) << region.error().message();
  const GuestMemory memory(*MemoryMap::make({*region}));
  MemoryRegion2 slot{.slot = 0,
                     .flags = region_has_guest_memfd,
                     .guest_address = 0,
                     .size = bytes,
                     .host_address = reinterpret_cast<std::uintptr_t>(own),
                     .offset = 0,
                     .guest_memfd = static_cast<std::uint32_t>(file.number()),
                     .reserved = 0,
                     .more = {}};
  ASSERT_EQ(ioctl(vm.number(), set_memory_region2, &slot), 0) << errno;
  constexpr std::array<std::uint8_t, 6> code = {0xC6, 0x06, 0x34, 0x52, 0x01, 0xF4}; // mov byte [0x5234], 1; hlt
  std::memcpy(static_cast<std::byte*>(own) + page_size, code.data(), code.size());
  const auto reason = run(kvm.number(), vm.number(), 1);
  ASSERT_TRUE(reason) << errno;
  ASSERT_EQ(*reason, std::uint32_t{KVM_EXIT_HLT});
  // Here, nobody has looked at page 5.
  EXPECT_EQ(memory.survey().touched, pages({1, 5}));
  EXPECT_EQ(static_cast<volatile char*>(own)[0x5234], 1);
}

} // namespace
