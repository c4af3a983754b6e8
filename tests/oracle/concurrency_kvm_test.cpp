#include "guest.hpp"
#include "support/machine_facts.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <tuple>

import cppvmm.guest_memory;

// A vCPU stores into page after page and publishes, in guest memory, how far it has come; surveys go on meanwhile.

using namespace cppvmm;
using namespace cppvmm::oracle;

namespace {

constexpr std::uint64_t pages = 1024;
constexpr std::uint32_t burst_pages = 64;
constexpr std::uint64_t bursts = pages / burst_pages;

class UnderAVcpu : public testing::TestWithParam<std::tuple<bool, EvidenceSource>> {};

TEST_P(UnderAVcpu, NothingThatItStoredIsReported) {
  const auto [is_memfd, source] = GetParam();
  if (const std::string why = test::kvm_missing(); !why.empty()) GTEST_SKIP() << "no usable KVM: " << why;
  auto guest = Guest::start();
  ASSERT_TRUE(guest) << guest.error();
  constexpr std::uint64_t bytes = pages * page_size;
  const Region region = is_memfd ? *Region::memfd(GuestAddress(0), bytes) : *Region::anonymous(GuestAddress(0), bytes);
  const Region progress_region = *Region::anonymous(GuestAddress(bytes), page_size);
  madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
  const GuestMemory memory(*MemoryMap::make({region, progress_region}));
  const std::array slots = {GuestSlot{.first_page = 0, .pages = pages, .host = region.host_address()},
                            GuestSlot{.first_page = pages, .pages = 1, .host = progress_region.host_address()}};
  const auto set = guest->set_memory(slots);
  ASSERT_TRUE(set) << set.error();

  // Each burst of stores counts itself in a word of its own, which the guest writes with plain stores: x86 keeps their
  // order.
  auto* const words = static_cast<std::uint32_t*>(progress_region.host_address());
  const auto stored_pages = [&] {
    std::uint64_t sum = 0;
    for (std::uint64_t burst = 0; burst < bursts; ++burst)
      sum += std::atomic_ref(words[burst]).load(std::memory_order_acquire);
    return sum;
  };
  std::atomic<std::uint64_t> allowed = 0;
  std::atomic<bool> done = false;
  std::string trouble;
  std::jthread vcpu([&] {
    for (std::uint64_t burst = 0; burst < bursts && trouble.empty(); ++burst) {
      while (burst >= allowed.load(std::memory_order_acquire))
        std::this_thread::yield();
      const std::uint64_t at = burst * burst_pages * page_size;
      if (const auto ran = guest->store_and_publish(at, burst_pages, bytes + 4 * burst); !ran) trouble = ran.error();
    }
    done.store(true, std::memory_order_release);
  });
  std::uint64_t wrong = 0;
  bool was_done = false;
  while (!was_done) {
    allowed.fetch_add(1, std::memory_order_release);
    was_done = done.load(std::memory_order_acquire);
    const std::uint64_t stored = stored_pages();
    const PageSet zeroed = memory.survey({.leave_out = {}, .source = source}).zeroed();
    for (std::uint64_t page = 0; page < stored; ++page)
      wrong += zeroed.contains(PageNumber(page)) ? 1 : 0;
  }
  vcpu.join();
  EXPECT_EQ(trouble, "");
  EXPECT_EQ(wrong, 0U) << "pages that were stored and reported";
  EXPECT_EQ(stored_pages(), pages);
}

std::string name_of(const testing::TestParamInfo<std::tuple<bool, EvidenceSource>>& info) {
  const auto [is_memfd, source] = info.param;
  return std::string(is_memfd ? "memfd" : "anonymous") + (source == EvidenceSource::automatic ? "_newest" : "_legacy");
}

INSTANTIATE_TEST_SUITE_P(Surveys, UnderAVcpu,
                         testing::Combine(testing::Bool(),
                                          testing::Values(EvidenceSource::automatic, EvidenceSource::legacy)),
                         name_of);

} // namespace
