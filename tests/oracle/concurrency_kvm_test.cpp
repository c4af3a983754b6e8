#include "guest.hpp"

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

class UnderAVcpu : public testing::TestWithParam<std::tuple<bool, EvidenceSource>> {};

TEST_P(UnderAVcpu, NothingThatItStoredIsReported) {
  const auto [is_memfd, source] = GetParam();
  auto guest = Guest::start();
  if (!guest) GTEST_SKIP() << "no usable KVM: " << guest.error();
  constexpr std::uint64_t bytes = pages * page_size;
  const Region region = is_memfd ? *Region::memfd(GuestAddress(0), bytes) : *Region::anonymous(GuestAddress(0), bytes);
  const Region progress_region = *Region::anonymous(GuestAddress(bytes), page_size);
  madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
  const GuestMemory memory(*MemoryMap::make({region, progress_region}));
  const std::array slots = {GuestSlot{.first_page = 0, .pages = pages, .host = region.host_address()},
                            GuestSlot{.first_page = pages, .pages = 1, .host = progress_region.host_address()}};
  const auto set = guest->set_memory(slots);
  ASSERT_TRUE(set) << set.error();

  // The guest's own words, which it writes with plain stores: x86 keeps their order.
  auto* const word = static_cast<std::uint32_t*>(progress_region.host_address());
  const std::atomic_ref<std::uint32_t> progress(*word);
  std::string trouble;
  std::jthread vcpu([&] {
    if (const auto ran = guest->store_and_publish(0, pages, bytes); !ran) trouble = ran.error();
    progress.store(pages, std::memory_order_release); // also if it stopped early
  });
  std::uint64_t stored = 0;
  std::uint64_t looks = 0;
  do {
    stored = progress.load(std::memory_order_acquire);
    const Survey survey = memory.survey({.leave_out = {}, .source = source});
    for (std::uint64_t page = 0; page < stored; ++page)
      ASSERT_FALSE(survey.zeroed.contains(PageNumber(page))) << "page " << page << " of " << stored << " stored";
    ++looks;
  } while (stored < pages);
  vcpu.join();
  EXPECT_EQ(trouble, "");
  EXPECT_GT(looks, 1U);
  EXPECT_TRUE(memory.survey({.leave_out = {}, .source = source}).zeroed.empty());
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
