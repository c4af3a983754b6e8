#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <optional>
#include <string>
import cppvmm.guest_memory;
import cppvmm.hv_ext;

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

TEST(HvCpuid, ShowsAHypervisorThatLinuxAndWindowsKnow) {
  const auto leaves = hv_cpuid_leaves({});
  std::string vendor(12, ' ');
  std::memcpy(vendor.data(), &leaves[0].ebx, 12);
  EXPECT_EQ(vendor, "Microsoft Hv");
  EXPECT_EQ(leaves[0].eax, 0x4000'0006U);
  for (std::uint32_t i = 0; i < leaves.size(); ++i)
    EXPECT_EQ(leaves[i].function, 0x4000'0000U + i);
  EXPECT_EQ(std::memcmp(&leaves[1].eax, "Hv#1", 4), 0);
  EXPECT_EQ(leaves[3].eax, 1U << 5 | 1U << 6);
  EXPECT_EQ(leaves[3].ebx, 1U << 20);
  EXPECT_EQ(leaves[4].ebx, 0xFFFF'FFFFU);
  EXPECT_EQ(hv_cpuid_leaves({.extended_hypercalls = false, .boot_zeroed_memory = false})[3].ebx, 0U);
}

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
  EXPECT_FALSE(survey.zeroed.contains(PageNumber(3)));
  EXPECT_FALSE(survey.zeroed.contains(PageNumber(5)));
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
