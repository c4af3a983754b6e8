#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <sys/mman.h>
#include <vector>

#include <gtest/gtest.h>

#include "../support/bare_guest.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_ext;
import cppvmm.vcpu;

using namespace cppvmm;
using namespace cppvmm::test;

namespace {

constexpr std::uint64_t mib = 1 << 20;

/// A guest whose 2 MiB of memory are all present before it runs, so that the host's page tables tell nothing.
class DirtyLogTest : public BareGuestTest {
protected:
  void SetUp() override {
    BareGuestTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    for (std::size_t at = 0; at < memory.size(); at += page_size)
      static_cast<volatile std::byte*>(memory.data())[at] = memory.data()[at];
    region.emplace(*Region::adopt(GuestAddress(0), {memory.data(), memory.size(), Backing::anonymous, -1, 0}));
    guest_memory.replace(*MemoryMap::make({*region}));
    ASSERT_TRUE(guest_memory.survey().zeroed.empty());
  }

  [[nodiscard]] MemorySlot slot() const { return {.bytes = memory.size(), .host_address = memory.data()}; }

  /// Pages that hold a byte other than zero, read one by one.
  [[nodiscard]] std::set<std::uint64_t> data_pages() const {
    std::set<std::uint64_t> result;
    for (std::size_t at = 0; at < memory.size(); ++at)
      if (static_cast<volatile std::byte*>(memory.data())[at] != std::byte{}) {
        result.insert(at / page_size);
        at |= page_size - 1;
      }
    return result;
  }
  void expect_sound(const Survey& survey) const {
    for (const std::uint64_t page : data_pages())
      EXPECT_FALSE(survey.zeroed.contains(PageNumber(page))) << page;
  }

  std::optional<Region> region;
  GuestMemory guest_memory;
};

TEST_F(DirtyLogTest, ThatIsCompleteTellsTheGuestsStoresByPage) {
  Vcpu vcpu = make_vcpu();
  Code code;
  // mov [0x50008], al; mov [0x90000], al; each followed by an exit
  load(code.raw({0x88, 0x04, 0x25}).value(0x50008).out(0x10).raw({0x88, 0x04, 0x25}).value(0x90000).out(0x10).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto log = DirtyLog::start(*vm, guest_memory, {slot()}, {.complete = true});
  ASSERT_TRUE(log) << log.error().message();

  // What the test has put there; all else is known to be zero.
  Survey survey = guest_memory.survey();
  expect_sound(survey);
  EXPECT_EQ(survey.touched.page_count(), data_pages().size());
  EXPECT_TRUE(survey.zeroed.contains(PageNumber(0x50)));

  ASSERT_RUN(IoOut, first, vcpu);
  survey = guest_memory.survey();
  expect_sound(survey);
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x50)), Toucher::guest);
  EXPECT_TRUE(survey.zeroed.contains(PageNumber(0x51)));
  EXPECT_TRUE(survey.zeroed.contains(PageNumber(0x90)));

  ASSERT_TRUE(guest_memory.write_value(GuestAddress(0xA0000), std::uint32_t{0}));
  ASSERT_RUN(IoOut, second, vcpu);
  survey = guest_memory.survey();
  expect_sound(survey);
  for (const std::uint64_t page : {0x50U, 0x90U}) {
    EXPECT_TRUE(survey.touched.contains(PageNumber(page))) << page;
    EXPECT_EQ(survey.touched_map().at(PageNumber(page)), Toucher::guest) << page;
  }
  EXPECT_EQ(survey.touched_map().at(PageNumber(0xA0)), Toucher::host);
  EXPECT_GT(survey.zeroed.page_count(), memory.size() / page_size - 24);

  ASSERT_TRUE(log->stop());
  EXPECT_TRUE(guest_memory.survey().zeroed.empty());
  ASSERT_TRUE(log->stop()) << "the second time does nothing";
  ASSERT_RUN(Hlt, end, vcpu);
}

TEST_F(DirtyLogTest, SeesTheGuestsPageWalks) {
  // Page tables in pages that read zero but for their entries cannot be told from untouched ones by content; here, ones
  // that nothing but the walk changes: their accessed bits.
  Vcpu vcpu = make_vcpu();
  load(Code().raw({0x90}).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto log = DirtyLog::start(*vm, guest_memory, {slot()}, {.complete = true});
  ASSERT_TRUE(log) << log.error().message();
  const auto entry = memory.read<std::uint64_t>(layout::pml4);
  ASSERT_RUN(Hlt, end, vcpu);
  if (memory.read<std::uint64_t>(layout::pml4) == entry) GTEST_SKIP() << "this KVM's walks set no accessed bits";
  const Survey survey = guest_memory.survey();
  expect_sound(survey);
  EXPECT_TRUE(survey.touched_map().at(PageNumber(layout::pml4 / page_size)).has(Toucher::guest));
}

TEST_F(DirtyLogTest, IsExactForStoresOfManyPages) {
  Vcpu vcpu = make_vcpu();
  // 64 pages from 1 MiB on, every third one: mov [rdi], al; add rdi, 0x3000; dec ecx; jnz
  Code code;
  code.raw({0x48, 0xBF})
      .value(mib)
      .mov_ecx(64)
      .raw({0x88, 0x07, 0x48, 0x81, 0xC7})
      .value(0x3000)
      .raw({0xFF, 0xC9, 0x75, 0xF3});
  load(code.hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto log = DirtyLog::start(*vm, guest_memory, {slot()}, {.complete = true});
  ASSERT_TRUE(log) << log.error().message();
  ASSERT_RUN(Hlt, end, vcpu);
  const Survey survey = guest_memory.survey();
  for (std::uint64_t page = 0; page < 64 * 3; ++page)
    EXPECT_EQ(survey.touched.contains(PageNumber(mib / page_size + page)), page % 3 == 0) << page;
}

TEST_F(DirtyLogTest, WithoutThePromiseOnlyTellsWhoWrote) {
  Vcpu vcpu = make_vcpu();
  Code code;
  load(code.raw({0x88, 0x04, 0x25}).value(0x50008).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto log = DirtyLog::start(*vm, guest_memory, {slot()});
  ASSERT_TRUE(log) << log.error().message();
  ASSERT_RUN(Hlt, end, vcpu);
  const Survey survey = guest_memory.survey();
  EXPECT_TRUE(survey.zeroed.empty());
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x50)), Toucher::guest);
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x51)), Toucher::unknown);
}

TEST_F(DirtyLogTest, ThatIsCompleteNeedsSlotsForAllOfRam) {
  MemorySlot elsewhere = slot();
  elsewhere.host_address = memory.data() + page_size;
  elsewhere.bytes -= page_size;
  MemorySlot half = slot();
  half.bytes /= 2;
  for (const std::vector<MemorySlot>& slots : {std::vector<MemorySlot>{}, {elsewhere}, {half}}) {
    const auto log = DirtyLog::start(*vm, guest_memory, slots, {.complete = true});
    ASSERT_FALSE(log);
    EXPECT_EQ(log.error().code, HvErrc::invalid_options);
  }
}

TEST_F(DirtyLogTest, IsOneAtATimeAndNotEndedByASecond) {
  Vcpu vcpu = make_vcpu();
  Code code;
  load(code.raw({0x88, 0x04, 0x25}).value(0x50008).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  auto log = DirtyLog::start(*vm, guest_memory, {slot()}, {.complete = true});
  ASSERT_TRUE(log) << log.error().message();
  const auto second = DirtyLog::start(*vm, guest_memory, {slot()});
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, HvErrc::memory);
  ASSERT_RUN(Hlt, end, vcpu);
  const Survey survey = guest_memory.survey();
  expect_sound(survey);
  ASSERT_TRUE(survey.regions[0].log);
  EXPECT_FALSE(survey.regions[0].log->error) << survey.regions[0].log->error->message();
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x50)), Toucher::guest);
  EXPECT_TRUE(survey.zeroed.contains(PageNumber(0x51)));
}

TEST_F(DirtyLogTest, EndsWhenTheHypercallsAnswerWasGiven) {
  std::optional<DirtyLog> log;
  HvOptions options;
  options.on_boot_zeroed = [&](const BootZeroedAnswer&) { EXPECT_TRUE(log->stop()); };
  auto hypercalls = ExtendedHypercalls::create(guest_memory, std::move(options));
  ASSERT_TRUE(hypercalls) << hypercalls.error().message();
  auto started = DirtyLog::start(*vm, guest_memory, {slot()}, {.complete = true});
  ASSERT_TRUE(started) << started.error().message();
  log.emplace(std::move(*started));
  EXPECT_EQ(*hypercalls->handle(0x8002, GuestAddress(0), GuestAddress(0x40000), 0), 0U);
  EXPECT_GT(memory.read<std::uint64_t>(0x40000), 0U);
  EXPECT_EQ(*hypercalls->handle(0x8002, GuestAddress(0), GuestAddress(0x40000), 0), 0U);
  EXPECT_EQ(memory.read<std::uint64_t>(0x40000), 0U) << "nothing is known any more";
}

} // namespace
