#include <cstddef>
#include <cstdint>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "support/bare_guest.hpp"

import cppvmm.guest_memory;
import cppvmm.vcpu;

using namespace cppvmm;
using namespace cppvmm::test;

namespace {

constexpr std::uint64_t page = 0x50000;

/// A guest that stores to a page, and then says again and again what it reads there.
class DiscardBehindAGuest : public BareGuestTest, public testing::WithParamInterface<Backing> {
protected:
  /// At 16 MiB, in a slot of its own; the guest's tables map it at the same address.
  static constexpr std::uint64_t start = 16 << 20;
  static constexpr std::uint64_t bytes = 2 << 20;

  void SetUp() override {
    BareGuestTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    const auto made = make();
    ASSERT_TRUE(made) << made.error().message();
    const auto set = made->set_huge_pages(HugePages::never);
    ASSERT_TRUE(set || set.error().code == MemoryErrc::unavailable) << set.error().message();
    guest_memory.replace(*MemoryMap::make({*made}));
    ASSERT_KVM_OK(
        vm->set_memory_slot({.slot = 1, .guest_address = start, .bytes = bytes, .host_address = made->host_address()}));
  }

  static MemoryResult<Region> make() {
    switch (GetParam()) {
    case Backing::memfd:
      return Region::memfd(GuestAddress(start), bytes);
    case Backing::private_file: {
      const int file = memfd_create("snapshot", MFD_CLOEXEC);
      EXPECT_EQ(ftruncate(file, bytes), 0);
      EXPECT_EQ(pwrite(file, "snapshot", 8, page), 8);
      auto region = Region::private_file(GuestAddress(start), bytes, file, 0);
      close(file);
      return region;
    }
    default:
      return Region::anonymous(GuestAddress(start), bytes);
    }
  }

  GuestMemory guest_memory;
};

INSTANTIATE_TEST_SUITE_P(Backings, DiscardBehindAGuest,
                         testing::Values(Backing::anonymous, Backing::memfd, Backing::private_file),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST_P(DiscardBehindAGuest, ReadsZeroThere) {
  Code code;
  code.mov_rbx(start + page).raw({0xC6, 0x03, 0x5A}); // mov byte [rbx], 0x5A
  for (int reads = 0; reads < 3; ++reads)
    code.raw({0x8A, 0x03}).out(0x10); // mov al, [rbx]
  load(code.hlt());
  Vcpu vcpu = make_vcpu();
  ASSERT_KVM_OK(start_long_mode(vcpu));

  const PageRange pages = *PageRange::covering(GuestAddress(start + page), 1);
  ASSERT_RUN(IoOut, before, vcpu);
  EXPECT_EQ(before.data[0], std::byte{0x5A});
  EXPECT_FALSE(guest_memory.survey().zeroed().contains(pages));

  ASSERT_TRUE(guest_memory.discard(pages));
  EXPECT_TRUE(guest_memory.survey().zeroed().contains(pages));
  ASSERT_RUN(IoOut, after, vcpu);
  EXPECT_EQ(after.data[0], std::byte{0});

  // What the host writes there is what the guest sees.
  ASSERT_TRUE(guest_memory.write_value(pages.start_address(), std::uint8_t{0x77}));
  ASSERT_RUN(IoOut, written, vcpu);
  EXPECT_EQ(written.data[0], std::byte{0x77});
  EXPECT_FALSE(guest_memory.survey().zeroed().contains(pages));
}

TEST_P(DiscardBehindAGuest, ReadsZeroWhateverIsReported) {
  constexpr std::uint64_t count = bytes / page_size;
  const Region region = guest_memory.snapshot()->regions().front();
  const auto host = [&](std::uint64_t at) { return static_cast<std::byte*>(region.host_address()) + at * page_size; };
  ASSERT_TRUE(guest_memory.write(region.start(), std::vector<std::byte>(count / 2 * page_size, std::byte{0xAA})));
  // A balloon of every second page, what the embedder discards itself, and what is swapped out where that can be.
  PageSet balloon;
  for (std::uint64_t at = 1; at < count / 8; at += 2)
    balloon.add(*PageRange::covering(GuestAddress(start + at * page_size), 1));
  ASSERT_TRUE(guest_memory.discard(balloon));
  if (GetParam() != Backing::private_file) {
    const int advice = GetParam() == Backing::memfd ? MADV_REMOVE : MADV_DONTNEED;
    ASSERT_EQ(madvise(host(count / 8), count / 8 * page_size, advice), 0);
  }
  static_cast<void>(madvise(host(0), bytes, MADV_PAGEOUT));

  const PageSet zeroed = guest_memory.survey().zeroed();
  ASSERT_FALSE(zeroed.empty());
  Code code;
  std::uint64_t reads = 0;
  for (const PageRange& range : zeroed.ranges())
    for (std::uint64_t at = range.first().value(); at < range.end().value(); at += 16, ++reads)
      code.mov_rbx(at * page_size).raw({0x8A, 0x03}).out(0x10);
  load(code.hlt());
  Vcpu vcpu = make_vcpu();
  ASSERT_KVM_OK(start_long_mode(vcpu));
  for (std::uint64_t read = 0; read < reads; ++read) {
    ASSERT_RUN(IoOut, value, vcpu);
    ASSERT_EQ(value.data[0], std::byte{0});
  }
}

} // namespace
