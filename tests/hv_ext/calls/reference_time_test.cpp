#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <optional>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

// The guest's time where it is not KVM's: reference counter, reference TSC page, frequencies.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr HvTimeSource source{.tsc_hz = 2'500'000'000, .apic_hz = 1'000'000'000};
constexpr std::uint64_t ticks = 250; // of that TSC in 100 ns
constexpr std::array code = {std::byte{0xE6}, std::byte{0xE4}, std::byte{0xC3}};
constexpr std::array all_msrs = {hv_msr_time_ref_count, hv_msr_reference_tsc, hv_msr_tsc_frequency,
                                 hv_msr_apic_frequency};

TEST(TscScale, CountsUnitsOf100Nanoseconds) {
  for (const std::uint64_t hz : {10'000'001ULL, 24'000'000ULL, 2'500'000'000ULL, 5'999'999'999ULL}) {
    const auto scale = HvTscScale::of(hz);
    ASSERT_TRUE(scale);
    for (const std::uint64_t seconds : {0ULL, 1ULL, 60ULL, 86'400ULL, 2'000'000'000ULL}) {
      const std::uint64_t time = scale->time_at(seconds * hz);
      // The scale is rounded down: by less than one part in 2^63 / 10^7.
      EXPECT_LE(time, seconds * 10'000'000);
      EXPECT_GE(time + 1 + seconds / 1000, seconds * 10'000'000) << hz << ' ' << seconds;
    }
  }
}

TEST(TscScale, HasNoNumberForASlowTsc) {
  EXPECT_FALSE(HvTscScale::of(0));
  EXPECT_FALSE(HvTscScale::of(10'000'000));
  EXPECT_TRUE(HvTscScale::of(10'000'001));
}

TEST(TscScale, GoesThroughAnyPoint) {
  const HvTscScale scale = *HvTscScale::of(source.tsc_hz);
  for (const std::uint64_t tsc : {std::uint64_t{0}, std::uint64_t{1} << 40, UINT64_MAX})
    for (const std::uint64_t time : {std::uint64_t{0}, std::uint64_t{77}, UINT64_MAX / 2}) {
      const HvTscScale moved = scale.through(tsc, time);
      EXPECT_EQ(moved.time_at(tsc), time);
      EXPECT_EQ(moved.scale, scale.scale);
    }
}

/// What a guest makes of the page.
struct TimePage {
  std::uint32_t sequence;
  std::uint32_t reserved;
  std::uint64_t scale;
  std::int64_t offset;

  [[nodiscard]] std::uint64_t time_at(std::uint64_t tsc) const {
    __extension__ using Wide = unsigned __int128;
    return static_cast<std::uint64_t>(Wide{tsc} * scale >> 64) + static_cast<std::uint64_t>(offset);
  }
};

class Time : public testing::Test {
protected:
  GuestMemory memory{*MemoryMap::make(
      {*Region::memfd(GuestAddress(0), mib), *Region::memfd(GuestAddress(2 * mib), mib, RegionKind::rom)})};
  HypervInterface hyperv{memory, code};

  [[nodiscard]] TimePage page_at(std::uint64_t address) const {
    return *memory.read_value<TimePage>(GuestAddress(address));
  }
  [[nodiscard]] static std::uint64_t time(const HypervInterface& of, std::uint64_t tsc, std::uint32_t vp = 0) {
    return of.read_msr(vp, hv_msr_time_ref_count, tsc).value_or(UINT64_MAX);
  }
};

TEST_F(Time, IsNotThereUnlessItIsGiven) {
  for (const std::uint32_t msr : all_msrs) {
    EXPECT_EQ(hyperv.read_msr(0, msr), std::nullopt);
    EXPECT_FALSE(hyperv.write_msr(msr, 0x1001));
  }
  EXPECT_TRUE(memory.survey().touched.empty());
  EXPECT_EQ(hyperv.state(5), HvState{});
}

TEST_F(Time, IsGivenOnce) {
  ASSERT_TRUE(hyperv.set_time(source));
  EXPECT_TRUE(hyperv.set_time(source)) << "by each vCPU";
  for (const HvTimeSource& other :
       {HvTimeSource{.tsc_hz = 10'000'000, .apic_hz = 1}, HvTimeSource{.tsc_hz = 3'000'000'000}}) {
    const auto refused = hyperv.set_time(other);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, HvErrc::invalid_options);
    EXPECT_EQ(refused.error().value, other.tsc_hz);
  }
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_tsc_frequency), source.tsc_hz);
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_apic_frequency), source.apic_hz);
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_reference_tsc), 0U);
  for (const std::uint32_t msr : {hv_msr_time_ref_count, hv_msr_tsc_frequency, hv_msr_apic_frequency})
    EXPECT_FALSE(hyperv.write_msr(msr, 0)) << "read-only";
}

TEST_F(Time, HasNoFrequenciesWithoutTheApics) {
  ASSERT_TRUE(hyperv.set_time({.tsc_hz = source.tsc_hz}));
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_tsc_frequency), std::nullopt);
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_apic_frequency), std::nullopt);
  EXPECT_TRUE(hyperv.read_msr(0, hv_msr_time_ref_count, 1));
}

// TLFS: strictly increasing, over all VPs.
TEST_F(Time, NeverGoesBackNorStandsStill) {
  ASSERT_TRUE(hyperv.set_time(source));
  EXPECT_EQ(time(hyperv, 1000 * ticks + 10), 1000U);
  EXPECT_EQ(time(hyperv, 1000 * ticks + 10), 1001U) << "the same TSC";
  EXPECT_EQ(time(hyperv, 7, 1), 1002U) << "a vCPU whose TSC is behind";
  EXPECT_EQ(time(hyperv, 5000 * ticks + 10), 5000U);
  EXPECT_EQ(time(hyperv, UINT64_MAX) >> 50, UINT64_MAX / ticks >> 50);
}

TEST_F(Time, IsInThePageToo) {
  ASSERT_TRUE(hyperv.set_time(source));
  ASSERT_TRUE(memory.write_value(GuestAddress(0x4000), std::uint64_t{0x1234}));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_reference_tsc, 0x4001)) << "needs no OS ID";
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_reference_tsc), 0x4001U);
  EXPECT_EQ(hyperv.reference_tsc_page(), PageNumber(4));
  EXPECT_NE(page_at(0x4000).sequence, 0U);
  for (const std::uint64_t tsc : {std::uint64_t{1000}, std::uint64_t{1} << 33, std::uint64_t{1} << 50})
    EXPECT_EQ(time(hyperv, tsc), page_at(0x4000).time_at(tsc));

  // What it covered comes back.
  ASSERT_TRUE(hyperv.write_msr(hv_msr_reference_tsc, 0x6001));
  EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x4000)), 0x1234U);
  EXPECT_NE(page_at(0x6000).sequence, 0U);
  ASSERT_TRUE(hyperv.write_msr(hv_msr_reference_tsc, 0x6000));
  EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x6008)), 0U);
  EXPECT_EQ(hyperv.reference_tsc_page(), std::nullopt);

  EXPECT_FALSE(hyperv.write_msr(hv_msr_reference_tsc, 2 * mib | 1)) << "ROM";
  EXPECT_FALSE(hyperv.write_msr(hv_msr_reference_tsc, UINT64_MAX));
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_reference_tsc), 0x6000U);
}

// What the one covers would come back as what the other has put there.
TEST_F(Time, HasNoPageWhereTheHypercallPageIs) {
  ASSERT_TRUE(hyperv.set_time(source));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x4001));
  EXPECT_FALSE(hyperv.write_msr(hv_msr_reference_tsc, 0x4001));
  EXPECT_EQ(hyperv.reference_tsc_page(), std::nullopt);
  ASSERT_TRUE(hyperv.write_msr(hv_msr_reference_tsc, 0x5001));
  EXPECT_FALSE(hyperv.write_msr(hv_msr_hypercall, 0x5001));
  EXPECT_EQ(hyperv.hypercall_page(), PageNumber(4));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0));
  EXPECT_TRUE(hyperv.write_msr(hv_msr_reference_tsc, 0x4001));
}

TEST_F(Time, IsThatOfTheTscAgainAfterAReset) {
  ASSERT_TRUE(hyperv.set_time(source));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_reference_tsc, 0x4001));
  EXPECT_EQ(time(hyperv, 1000 * ticks + 10), 1000U);
  hyperv.reset();
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_reference_tsc), 0U);
  EXPECT_EQ(hyperv.reference_tsc_page(), std::nullopt);
  EXPECT_EQ(time(hyperv, 2000 * ticks + 10), 2000U);
  EXPECT_GT(time(hyperv, UINT64_MAX), 1U << 30) << "a guest's own doing";
  hyperv.reset();
  EXPECT_EQ(time(hyperv, 5 * ticks + 10), 5U) << "the TSC was reset too";
}

// With a slower TSC the time at its zero is negative.
TEST_F(Time, GoesOnFromWhereItWasHoweverTheTscIsSet) {
  ASSERT_TRUE(hyperv.set_time(source));
  const std::uint64_t then = 4000 * ticks + 10;
  HypervInterface other(memory, code);
  ASSERT_TRUE(other.set_time({.tsc_hz = source.tsc_hz / 2}));
  ASSERT_TRUE(other.restore(hyperv.state(then)));
  EXPECT_EQ(time(other, 0), 4001U);
  EXPECT_EQ(time(other, 0), 4002U);
  EXPECT_EQ(time(other, then + 1000 * ticks), 6000U);
  EXPECT_TRUE(hyperv.restore(other.state(0))) << "whatever a guest sets its TSC to";
}

TEST_F(Time, GoesOnInAnotherVmByItsTsc) {
  ASSERT_TRUE(hyperv.set_time(source));
  ASSERT_TRUE(memory.write_value(GuestAddress(0x4000), std::uint64_t{0x1234}));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_reference_tsc, 0x4001));
  EXPECT_EQ(time(hyperv, 1000 * ticks + 10), 1000U);
  const std::uint64_t then = 4000 * ticks + 10;
  const HvState saved = *hv_state_from_bytes(to_bytes(hyperv.state(then)));
  EXPECT_EQ(saved.reference_time, 4000U);
  const std::uint32_t sequence = page_at(0x4000).sequence;

  for (const std::uint64_t hz : {source.tsc_hz, 2 * source.tsc_hz}) {
    HypervInterface other(memory, code);
    ASSERT_TRUE(other.set_time({.tsc_hz = hz}));
    ASSERT_TRUE(other.restore(saved));
    EXPECT_EQ(time(other, then), 4001U);
    EXPECT_EQ(page_at(0x4000).time_at(then), 4000U);
    const std::uint64_t second_later = page_at(0x4000).time_at(then + hz);
    EXPECT_GE(second_later, 4000U + 9'999'999);
    EXPECT_LE(second_later, 4000U + 10'000'000);
    EXPECT_NE(page_at(0x4000).sequence, sequence);
    EXPECT_NE(page_at(0x4000).sequence, 0U);
    // What the page covers went with it.
    ASSERT_TRUE(other.write_msr(hv_msr_reference_tsc, 0));
    EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x4000)), 0x1234U);
  }
}

TEST_F(Time, ThatCannotBeRestoredLeavesNothingSetUp) {
  const HvState saved{.guest_os_id = 1,
                      .hypercall = 0x3001,
                      .reference_tsc = 2 * mib | 1,
                      .reference_tsc_sequence = 1,
                      .reference_time = UINT64_MAX / 2};
  for (const bool has_time : {false, true}) {
    HypervInterface other(memory, code);
    if (has_time) ASSERT_TRUE(other.set_time(source));
    const auto refused = other.restore(saved);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, HvErrc::invalid_state);
    EXPECT_EQ(refused.error().value, has_time ? 2 * mib / page_size : 1);
    EXPECT_EQ(other.read_msr(0, hv_msr_guest_os_id), 0U);
    EXPECT_EQ(other.hypercall_page(), std::nullopt);
    if (has_time) EXPECT_EQ(time(other, 1000 * ticks + 10), 1000U);
  }
}

// Sequence 0 says that the page tells nothing.
TEST_F(Time, NeverHasSequenceZero) {
  ASSERT_TRUE(hyperv.set_time(source));
  for (const std::uint32_t sequence : {1U, 0x7FFF'FFFFU, 0xFFFF'FFFDU, 0xFFFF'FFFEU, 0xFFFF'FFFFU}) {
    ASSERT_TRUE(hyperv.restore({.reference_tsc = 0x4001, .reference_tsc_sequence = sequence}));
    EXPECT_NE(page_at(0x4000).sequence, 0U);
    EXPECT_NE(page_at(0x4000).sequence, sequence);
  }
}

TEST(TimeCpuid, SaysWhatThereIs) {
  const auto features = [](const HvTimeSource& time) { return hv_cpuid_leaves({}, time)[3]; };
  EXPECT_EQ(features({}).eax, 1U << 5 | 1U << 6);
  EXPECT_EQ(features({}).edx, 0U);
  EXPECT_EQ(features({.tsc_hz = source.tsc_hz}).eax, 1U << 1 | 1U << 5 | 1U << 6 | 1U << 9);
  EXPECT_EQ(features({.tsc_hz = source.tsc_hz}).edx, 0U);
  EXPECT_EQ(features(source).eax, 1U << 1 | 1U << 5 | 1U << 6 | 1U << 9 | 1U << 11);
  EXPECT_EQ(features(source).edx, 1U << 8);
}

} // namespace
