#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <linux/kvm.h>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "support/bare_guest.hpp"

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
    ASSERT_TRUE(guest_memory.survey().zeroed().empty());
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
      EXPECT_FALSE(survey.zeroed().contains(PageNumber(page))) << page;
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
  EXPECT_TRUE(survey.zeroed().contains(PageNumber(0x50)));

  ASSERT_RUN(IoOut, first, vcpu);
  survey = guest_memory.survey();
  expect_sound(survey);
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x50)), Toucher::guest);
  EXPECT_TRUE(survey.zeroed().contains(PageNumber(0x51)));
  EXPECT_TRUE(survey.zeroed().contains(PageNumber(0x90)));

  ASSERT_TRUE(guest_memory.write_value(GuestAddress(0xA0000), std::uint32_t{0}));
  ASSERT_RUN(IoOut, second, vcpu);
  survey = guest_memory.survey();
  expect_sound(survey);
  for (const std::uint64_t page : {0x50U, 0x90U}) {
    EXPECT_TRUE(survey.touched.contains(PageNumber(page))) << page;
    EXPECT_EQ(survey.touched_map().at(PageNumber(page)), Toucher::guest) << page;
  }
  EXPECT_EQ(survey.touched_map().at(PageNumber(0xA0)), Toucher::host);
  EXPECT_GT(survey.zeroed().page_count(), memory.size() / page_size - 24);

  ASSERT_TRUE(log->stop());
  EXPECT_TRUE(guest_memory.survey().zeroed().empty());
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
  EXPECT_TRUE(survey.zeroed().empty());
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
    EXPECT_EQ(log.error().code, HypervErrc::invalid_options);
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
  EXPECT_EQ(second.error().code, HypervErrc::memory);
  ASSERT_RUN(Hlt, end, vcpu);
  const Survey survey = guest_memory.survey();
  expect_sound(survey);
  ASSERT_TRUE(survey.regions[0].log);
  EXPECT_FALSE(survey.regions[0].log->error) << survey.regions[0].log->error->message();
  EXPECT_EQ(survey.touched_map().at(PageNumber(0x50)), Toucher::guest);
  EXPECT_TRUE(survey.zeroed().contains(PageNumber(0x51)));
}

/// One that the VMM has for itself too, of the guest's memory.
class SharedDirtyLog : public DirtyLogTest {
protected:
  /// A guest that stores to page 0x50, exits, stores to page 0x90, exits; and a complete log.
  void start(Vcpu& vcpu, const MemorySlot& logged) {
    load(
        Code().raw({0x88, 0x04, 0x25}).value(0x50008).out(0x10).raw({0x88, 0x04, 0x25}).value(0x90000).out(0x10).hlt());
    ASSERT_KVM_OK(start_long_mode(vcpu));
    ASSERT_KVM_OK(vm->set_memory_slot(logged));
    auto started = DirtyLog::start(*vm, guest_memory, {logged}, {.complete = true});
    ASSERT_TRUE(started) << started.error().message();
    log.emplace(std::move(*started));
  }
  [[nodiscard]] MemorySlot own_slot() const {
    MemorySlot own = slot();
    own.log_dirty = true;
    return own;
  }
  [[nodiscard]] std::set<std::uint64_t> read() {
    std::vector<std::uint64_t> bitmap(memory.size() / page_size / 64);
    const auto got = log->read(0, bitmap);
    EXPECT_TRUE(got) << got.error().message();
    return pages_of(bitmap);
  }
  [[nodiscard]] static std::set<std::uint64_t> pages_of(std::span<const std::uint64_t> bitmap) {
    std::set<std::uint64_t> pages;
    for (std::size_t page = 0; page < bitmap.size() * 64; ++page)
      if ((bitmap[page / 64] >> page % 64 & 1) != 0) pages.insert(page);
    return pages;
  }
  void expect_guest_wrote(std::initializer_list<std::uint64_t> pages) const {
    const Survey survey = guest_memory.survey();
    expect_sound(survey);
    for (const std::uint64_t page : pages) {
      ASSERT_TRUE(survey.touched.contains(PageNumber(page))) << page;
      EXPECT_EQ(survey.touched_map().at(PageNumber(page)), Toucher::guest) << page;
    }
  }

  std::optional<DirtyLog> log;
};

// KVM tells of each write once.
TEST_F(SharedDirtyLog, TellsTheVmmAndSurveysOfEachWrite) {
  Vcpu vcpu = make_vcpu();
  ASSERT_NO_FATAL_FAILURE(start(vcpu, own_slot()));

  ASSERT_RUN(IoOut, first, vcpu);
  expect_guest_wrote({0x50});
  EXPECT_TRUE(read().contains(0x50)) << "a survey had it before";
  EXPECT_FALSE(read().contains(0x50)) << "once";

  ASSERT_RUN(IoOut, second, vcpu);
  EXPECT_TRUE(read().contains(0x90));
  expect_guest_wrote({0x50, 0x90});

  std::vector<std::uint64_t> small(memory.size() / page_size / 64 - 1);
  for (const auto& refused : {log->read(0, small), log->read(7, small)}) {
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, HypervErrc::invalid_options);
  }
}

TEST_F(SharedDirtyLog, GoesOnWithoutSurveys) {
  Vcpu vcpu = make_vcpu();
  ASSERT_NO_FATAL_FAILURE(start(vcpu, own_slot()));
  ASSERT_RUN(IoOut, first, vcpu);
  expect_guest_wrote({0x50});
  ASSERT_TRUE(log->stop());
  ASSERT_RUN(IoOut, second, vcpu);
  // What surveys took; KVM's log is the VMM's, and that of the next.
  const std::set<std::uint64_t> taken = read();
  EXPECT_TRUE(taken.contains(0x50));
  EXPECT_FALSE(taken.contains(0x90));
  EXPECT_TRUE(read().empty());
  std::vector<std::uint64_t> bitmap(memory.size() / page_size / 64);
  EXPECT_FALSE(log->clear(0, 0, 64, bitmap));
  ASSERT_KVM_OK(vm->dirty_log(0, bitmap));
  EXPECT_TRUE(pages_of(bitmap).contains(0x90));
}

// What KVM logged may be lost with the read: all of the slot counts as written, for surveys and the VMM.
TEST_F(SharedDirtyLog, ThatCouldNotBeReadKnowsNothingAnyMore) {
  Vcpu vcpu = make_vcpu();
  ASSERT_NO_FATAL_FAILURE(start(vcpu, own_slot()));
  EXPECT_FALSE(guest_memory.survey().zeroed().empty());

  // Behind its back: KVM forgets what it has logged.
  ASSERT_RUN(IoOut, first, vcpu);
  ASSERT_KVM_OK(vm->set_memory_slot(slot()));
  std::vector<std::uint64_t> bitmap(memory.size() / page_size / 64);
  const auto failed = log->read(0, bitmap);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, HypervErrc::kvm);
  ASSERT_KVM_OK(vm->set_memory_slot(own_slot()));
  EXPECT_TRUE(guest_memory.survey().zeroed().empty());
  EXPECT_EQ(read().size(), memory.size() / page_size);
}

// Of a slot whose pages fill no whole words: a VMM goes by each bit that is set.
TEST_F(SharedDirtyLog, NamesNoPageBeyondTheSlot) {
  constexpr std::uint64_t pages = 500;
  MemorySlot own = own_slot();
  own.bytes = pages * page_size;
  ASSERT_KVM_OK(vm->remove_memory_slot(0));
  ASSERT_KVM_OK(vm->set_memory_slot(own));
  auto started = DirtyLog::start(*vm, guest_memory, {own});
  ASSERT_TRUE(started) << started.error().message();
  log.emplace(std::move(*started));
  EXPECT_TRUE(read().empty());

  own.log_dirty = false;
  ASSERT_KVM_OK(vm->set_memory_slot(own));
  std::vector<std::uint64_t> bitmap(memory.size() / page_size / 64);
  ASSERT_FALSE(log->read(0, bitmap));
  own.log_dirty = true;
  ASSERT_KVM_OK(vm->set_memory_slot(own));
  const std::set<std::uint64_t> all = read();
  EXPECT_EQ(all.size(), pages);
  EXPECT_EQ(*all.rbegin(), pages - 1);
}

// From two threads, as a migration and a vCPU that answers do.
TEST_F(SharedDirtyLog, IsReadWhileSurveysAreMade) {
  Vcpu vcpu = make_vcpu();
  ASSERT_NO_FATAL_FAILURE(start(vcpu, own_slot()));
  ASSERT_RUN(IoOut, first, vcpu);
  std::set<std::uint64_t> seen;
  std::thread migration([&] {
    for (int i = 0; i < 50; ++i)
      seen.merge(read());
  });
  for (int i = 0; i < 50; ++i)
    expect_guest_wrote({0x50});
  migration.join();
  seen.merge(read());
  EXPECT_TRUE(seen.contains(0x50));
}

// A migration that begins and ends before the guest has asked.
TEST_F(SharedDirtyLog, BecomesTheVmmsTooAndCeasesToBe) {
  Vcpu vcpu = make_vcpu();
  ASSERT_NO_FATAL_FAILURE(start(vcpu, slot()));
  std::vector<std::uint64_t> bitmap(memory.size() / page_size / 64);
  ASSERT_RUN(IoOut, first, vcpu);
  EXPECT_FALSE(log->read(0, bitmap));
  ASSERT_TRUE(log->keep(0, true));
  EXPECT_FALSE(read().contains(0x50)) << "written before";
  ASSERT_RUN(IoOut, second, vcpu);
  EXPECT_TRUE(read().contains(0x90));
  expect_guest_wrote({0x50, 0x90});

  ASSERT_TRUE(log->keep(0, false));
  EXPECT_FALSE(log->read(0, bitmap));
  ASSERT_TRUE(log->stop());
  EXPECT_FALSE(vm->dirty_log(0, bitmap)) << "KVM's log is off";
  EXPECT_FALSE(log->keep(0, true));
}

TEST_F(SharedDirtyLog, IsClearedByHandAndKnownToSurveysStill) {
  if (!vm->capabilities().manual_dirty_log) GTEST_SKIP() << "this KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
  Vcpu vcpu = make_vcpu();
  ASSERT_KVM_OK(vm->enable_manual_dirty_log());
  ASSERT_NO_FATAL_FAILURE(start(vcpu, own_slot()));

  ASSERT_RUN(IoOut, first, vcpu);
  ASSERT_TRUE(read().contains(0x50));
  EXPECT_TRUE(read().contains(0x50)) << "until it is cleared";
  const auto pages = static_cast<std::uint32_t>(memory.size() / page_size);
  const std::vector<std::uint64_t> all(pages / 64, ~std::uint64_t{0});
  ASSERT_TRUE(log->clear(0, 0, pages, all));
  EXPECT_FALSE(read().contains(0x50));
  expect_guest_wrote({0x50});

  ASSERT_RUN(IoOut, second, vcpu);
  // Of other pages, and of those that were written since anyone read.
  ASSERT_TRUE(log->clear(0, 0, 64, all));
  EXPECT_TRUE(read().contains(0x90));
  expect_guest_wrote({0x50, 0x90});

  for (const auto& refused : {log->clear(0, 1, 64, all), log->clear(0, 64, pages, all), log->clear(0, 1 << 30, 64, all),
                              log->clear(0, 0, 128, std::span(all).first(1)), log->clear(7, 0, 64, all),
                              log->clear(0, 64, 10, all), log->clear(0, pages, 64, all)}) {
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, HypervErrc::invalid_options);
  }
}

// The VMM clears by what it read before; the guest may have written to more of these pages since.
TEST_F(SharedDirtyLog, IsClearedOnlyOfWhatWasSeen) {
  if (!vm->capabilities().manual_dirty_log) GTEST_SKIP() << "this KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
  Vcpu vcpu = make_vcpu();
  ASSERT_KVM_OK(vm->enable_manual_dirty_log());
  ASSERT_NO_FATAL_FAILURE(start(vcpu, own_slot()));
  const auto pages = static_cast<std::uint32_t>(memory.size() / page_size);
  const std::vector<std::uint64_t> all(pages / 64, ~std::uint64_t{0});
  ASSERT_RUN(IoOut, first, vcpu);
  ASSERT_TRUE(log->clear(0, 0, pages, all));
  ASSERT_RUN(IoOut, second, vcpu);
  ASSERT_TRUE(log->clear(0, 0x90 / 64 * 64, 64, all));
  expect_guest_wrote({0x50, 0x90});
}

// Nothing of it can be read by the log's calls then: better said at once than found out by an answer.
TEST_F(SharedDirtyLog, CannotBeHadBesideADirtyRing) {
  const auto most = vm->check_extension(KVM_CAP_DIRTY_LOG_RING);
  ASSERT_KVM_OK(most);
  if (*most == 0) GTEST_SKIP() << "this KVM has no KVM_CAP_DIRTY_LOG_RING";
  kvm_enable_cap ring{};
  ring.cap = KVM_CAP_DIRTY_LOG_RING;
  ring.args[0] = 65536;
  ASSERT_EQ(ioctl(vm->descriptor(), KVM_ENABLE_CAP, &ring), 0);
  const auto refused = DirtyLog::start(*vm, guest_memory, {slot()});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HypervErrc::kvm);
  // No log is left behind.
  EXPECT_TRUE(guest_memory.begin_write_log(
      {.collect = [](PageRange, std::span<std::uint64_t>) -> MemoryResult<void> { return {}; }}));
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
  EXPECT_EQ(*hypercalls->handle({.control = 0x8002, .output = GuestAddress(0x40000)}), 0U);
  EXPECT_GT(memory.read<std::uint64_t>(0x40000), 0U);
  EXPECT_EQ(*hypercalls->handle({.control = 0x8002, .output = GuestAddress(0x40000)}), 0U);
  EXPECT_EQ(memory.read<std::uint64_t>(0x40000), 0U) << "nothing is known any more";
}

} // namespace
