#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <optional>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::array code = {std::byte{0xE6}, std::byte{0xE4}, std::byte{0xC3}};

class Interface : public testing::Test {
protected:
  GuestMemory memory{*MemoryMap::make(
      {*Region::memfd(GuestAddress(0), mib), *Region::memfd(GuestAddress(2 * mib), mib, RegionKind::rom)})};
  HypervInterface hyperv{memory, code};

  [[nodiscard]] bool holds_code(std::uint64_t address) const {
    std::array<std::byte, 4> found{};
    return memory.read(GuestAddress(address), found) && std::memcmp(found.data(), code.data(), 3) == 0 &&
           found[3] == std::byte{0xCC};
  }
};

TEST_F(Interface, StartsDisabled) {
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_guest_os_id), 0U);
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_hypercall), 0U);
  EXPECT_EQ(hyperv.read_msr(7, hv_msr_vp_index), 7U);
  EXPECT_EQ(hyperv.hypercall_page(), std::nullopt);
}

TEST_F(Interface, EnablesThePageOnceTheGuestSaidWhoItIs) {
  EXPECT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_hypercall), 0U);
  EXPECT_FALSE(holds_code(0x3000));
  EXPECT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 0x8100'0000'0000'0000));
  EXPECT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_hypercall), 0x3001U);
  EXPECT_EQ(hyperv.hypercall_page(), PageNumber(3));
  EXPECT_TRUE(holds_code(0x3000));
}

TEST_F(Interface, MovesThePageAndNeverReportsEither) {
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x5001));
  EXPECT_TRUE(holds_code(0x5000));
  EXPECT_EQ(hyperv.hypercall_page(), PageNumber(5));
  const Survey survey = memory.survey();
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(3)));
  EXPECT_FALSE(survey.zeroed().contains(PageNumber(5)));
}

// However often a guest moves it: nothing is kept of where the page has been.
TEST_F(Interface, KeepsNothingOfAPageThatMovedAway) {
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  for (std::uint64_t page = 0; page < mib; page += page_size)
    ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, page | 1));
  EXPECT_TRUE(memory.marks().empty());
}

TEST_F(Interface, DisablesThePage) {
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3000));
  EXPECT_EQ(hyperv.hypercall_page(), std::nullopt);
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 0));
  EXPECT_EQ(hyperv.hypercall_page(), std::nullopt);
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_hypercall).value() & 1, 0U);
}

/// A page full of `value`.
HvPage filled(unsigned char value) {
  HvPage page;
  page.fill(std::byte{value});
  return page;
}

class Overlay : public Interface {
protected:
  void SetUp() override {
    for (const std::uint64_t page : {3U, 5U})
      ASSERT_TRUE(memory.write(GuestAddress(page * page_size), filled(static_cast<unsigned char>(page))));
    ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
    ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  }
  [[nodiscard]] bool holds(std::uint64_t page, const HvPage& content) const {
    HvPage found;
    return memory.read(GuestAddress(page * page_size), found) && found == content;
  }
};

TEST_F(Overlay, GivesBackWhatItCoveredWhenItMoves) {
  EXPECT_TRUE(holds_code(0x3000));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x5001));
  EXPECT_TRUE(holds(3, filled(3)));
  EXPECT_TRUE(holds_code(0x5000));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  EXPECT_TRUE(holds(5, filled(5)));
  EXPECT_TRUE(holds_code(0x3000));
}

TEST_F(Overlay, GivesItBackWhenItIsDisabled) {
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3000));
  EXPECT_TRUE(holds(3, filled(3)));
  // What the guest has there now is what comes back next.
  ASSERT_TRUE(memory.write(GuestAddress(0x3000), filled(9)));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 0));
  EXPECT_TRUE(holds(3, filled(9)));
}

// As a balloon does it: the page is the guest's no more, and reads zero when it comes back.
TEST_F(Overlay, GivesNothingBackToAPageThatWasDiscarded) {
  ASSERT_TRUE(memory.discard(PageSet(*PageRange::make(PageNumber(3), 1))));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0));
  EXPECT_TRUE(holds(3, HvPage{}));
}

TEST_F(Overlay, StaysWhereItIsWhenItIsEnabledTwice) {
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  EXPECT_TRUE(holds_code(0x3000));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3000));
  EXPECT_TRUE(holds(3, filled(3)));
}

TEST_F(Overlay, StaysWhereItIsWhenItCannotMove) {
  EXPECT_FALSE(hyperv.write_msr(hv_msr_hypercall, 2 * mib | 1)) << "read-only memory";
  EXPECT_TRUE(holds_code(0x3000));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3000));
  EXPECT_TRUE(holds(3, filled(3)));
}

TEST_F(Overlay, IsForgottenByAReset) {
  hyperv.reset();
  ASSERT_TRUE(memory.write(GuestAddress(0x3000), filled(9)));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x5001));
  EXPECT_TRUE(holds(3, filled(9)));
}

TEST_F(Overlay, IsSavedAndRestored) {
  const HvState saved = hyperv.state();
  EXPECT_EQ(saved, (HvState{.guest_os_id = 1, .hypercall = 0x3001, .hypercall_page_covers = filled(3)}));

  // In another process's memory, which holds the page as it was saved, by an interface with other code.
  constexpr std::array other_code = {std::byte{0x0F}, std::byte{0x01}, std::byte{0xD9}, std::byte{0xC3}};
  HypervInterface restored(memory, other_code);
  const auto done = restored.restore(saved);
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(restored.state(), saved);
  EXPECT_EQ(restored.hypercall_page(), PageNumber(3));
  EXPECT_TRUE(restored.takes_hypercalls());
  std::array<std::byte, 4> found{};
  ASSERT_TRUE(memory.read(GuestAddress(0x3000), found));
  EXPECT_EQ(found, other_code);
  ASSERT_TRUE(restored.write_msr(hv_msr_guest_os_id, 0));
  EXPECT_TRUE(holds(3, filled(3)));
}

TEST_F(Overlay, OfAStateThatDoesNotSayWhatItCoversGivesNothingBack) {
  HypervInterface restored(memory, code);
  ASSERT_TRUE(restored.restore({.guest_os_id = 1, .hypercall = 0x5001}));
  ASSERT_TRUE(restored.write_msr(hv_msr_hypercall, 0));
  EXPECT_TRUE(holds_code(0x5000));
}

TEST_F(Overlay, OfAStateThatNoneCanHaveIsRefusedAndNothingIsSetUp) {
  for (const HvState& state :
       {HvState{.guest_os_id = 0, .hypercall = 0x3001},
        HvState{.guest_os_id = 1, .hypercall = 0x3000, .hypercall_page_covers = filled(1)},
        HvState{.guest_os_id = 1, .hypercall = 2 * mib | 1}, HvState{.guest_os_id = 1, .hypercall = UINT64_MAX}}) {
    HypervInterface other(memory, code);
    ASSERT_TRUE(other.restore(hyperv.state()));
    const auto done = other.restore(state);
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code, HvErrc::invalid_state) << done.error().message();
    EXPECT_EQ(other.state(), HvState{});
    EXPECT_TRUE(holds_code(0x3000)) << "what is in the guest's memory stays";
  }
}

TEST_F(Interface, LocksThePageUntilReset) {
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3003));
  EXPECT_FALSE(hyperv.write_msr(hv_msr_hypercall, 0x5001));
  EXPECT_FALSE(hyperv.write_msr(hv_msr_hypercall, 0));
  EXPECT_EQ(hyperv.hypercall_page(), PageNumber(3));
  EXPECT_FALSE(holds_code(0x5000));
  hyperv.reset();
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  EXPECT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x5001));
  EXPECT_TRUE(holds_code(0x5000));
}

TEST_F(Interface, TakesNoHypercallsBeforeTheGuestSaidWhoItIsNorAfterAReset) {
  EXPECT_FALSE(hyperv.takes_hypercalls());
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3003));
  EXPECT_TRUE(hyperv.takes_hypercalls());
  hyperv.reset();
  EXPECT_FALSE(hyperv.takes_hypercalls());
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_guest_os_id), 0U);
  EXPECT_EQ(hyperv.read_msr(0, hv_msr_hypercall), 0U);
  EXPECT_EQ(hyperv.hypercall_page(), std::nullopt);
  EXPECT_TRUE(holds_code(0x3000)) << "memory is the VMM's to discard";
}

TEST_F(Interface, RefusesAPageThatIsNotTheGuestsToWrite) {
  ASSERT_TRUE(hyperv.write_msr(hv_msr_guest_os_id, 1));
  ASSERT_TRUE(hyperv.write_msr(hv_msr_hypercall, 0x3001));
  for (const std::uint64_t page : {std::uint64_t{4} << 20, std::uint64_t{2} << 20, guest_space_end,
                                   std::uint64_t{UINT64_MAX} & ~std::uint64_t{0xFFF}, mib}) {
    EXPECT_FALSE(hyperv.write_msr(hv_msr_hypercall, page | 1)) << std::hex << page;
    EXPECT_EQ(hyperv.read_msr(0, hv_msr_hypercall), 0x3001U);
  }
}

TEST_F(Interface, GivesGeneralProtectionForTheRest) {
  EXPECT_FALSE(hyperv.write_msr(hv_msr_vp_index, 0));
  for (std::uint32_t msr = 0x4000'0003; msr < 0x4000'0200; ++msr) {
    EXPECT_EQ(hyperv.read_msr(0, msr), std::nullopt);
    EXPECT_FALSE(hyperv.write_msr(msr, 0));
  }
}

} // namespace
