#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <string>
#include <vector>
import cppvmm.hv_calls;

using namespace cppvmm;

namespace {

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

/// As a VMM shows them that has all of KVM's Hyper-V (Linux arch/x86/kvm/hyperv.c, kvm_get_hv_cpuid).
std::vector<HvCpuidLeaf> full() {
  return {{.function = 0x4000'0000, .eax = 0x4000'000A, .ebx = 0x7263'694D, .ecx = 0x666F'736F, .edx = 0x7648'2074},
          {.function = 0x4000'0001, .eax = 0x3123'7648},
          {.function = 0x4000'0002, .eax = 0x3839, .ebx = 0xA'0000},
          {.function = 0x4000'0003, .eax = 0xAAFF, .ebx = 0x30, .edx = 0x8'0510},
          {.function = 0x4000'0004, .eax = 0xC2C, .ebx = 0xFFF},
          {.function = 0x4000'0005, .eax = 1024, .ebx = 64},
          {.function = 0x4000'000A, .eax = 0x2'0000}};
}

HvCpuidLeaf& leaf(std::vector<HvCpuidLeaf>& leaves, std::uint32_t function) {
  return *std::ranges::find(leaves, function, &HvCpuidLeaf::function);
}

TEST(AddToHvCpuid, AddsOneBitAndLeavesTheRest) {
  const auto added = add_to_hv_cpuid(full(), {});
  ASSERT_TRUE(added) << added.error().message();
  auto expected = full();
  leaf(expected, hv_cpuid_features).ebx |= 1U << 20;
  EXPECT_EQ(*added, expected);
  // What has it stays as it is.
  EXPECT_EQ(add_to_hv_cpuid(expected, {}), expected);
}

TEST(AddToHvCpuid, AddsNothingThatIsNotOffered) {
  EXPECT_EQ(add_to_hv_cpuid(full(), {.extended_hypercalls = false, .boot_zeroed_memory = false}), full());
}

TEST(AddToHvCpuid, AddsToTheMinimalSetToo) {
  const auto minimal = hv_cpuid_leaves({});
  const std::vector leaves(minimal.begin(), minimal.end());
  EXPECT_EQ(add_to_hv_cpuid(leaves, {}), leaves);
}

TEST(AddToHvCpuid, SaysWhichLeafContradicts) {
  const auto refused_by = [](std::uint32_t function, auto change) {
    auto leaves = full();
    change(leaves);
    const auto added = add_to_hv_cpuid(leaves, {});
    EXPECT_FALSE(added);
    if (added) return;
    EXPECT_EQ(added.error().code, HvErrc::invalid_cpuid);
    EXPECT_EQ(added.error().value, function) << added.error().message();
  };
  const auto without = [](std::uint32_t function) {
    return [=](std::vector<HvCpuidLeaf>& leaves) {
      std::erase_if(leaves, [=](const HvCpuidLeaf& each) { return each.function == function; });
    };
  };
  for (const std::uint32_t function : {hv_cpuid_vendor, hv_cpuid_interface, hv_cpuid_features})
    refused_by(function, without(function));
  refused_by(hv_cpuid_interface, [](auto& leaves) { leaves.clear(); });
  // KVM's own, which has no interface leaf of Hyper-V's.
  refused_by(hv_cpuid_interface, [](auto& leaves) { leaf(leaves, hv_cpuid_interface).eax = 0x0100'7EFB; });
  refused_by(hv_cpuid_vendor, [](auto& leaves) { leaf(leaves, hv_cpuid_vendor).eax = hv_cpuid_recommendations; });
  refused_by(hv_cpuid_vendor, [](auto& leaves) { leaf(leaves, hv_cpuid_vendor).ebx = 0x756E'694C; }); // "Linu"
  refused_by(hv_cpuid_features, [](auto& leaves) { leaf(leaves, hv_cpuid_features).eax &= ~(1U << 5); });
  refused_by(hv_cpuid_features, [](auto& leaves) { leaf(leaves, hv_cpuid_features).eax &= ~(1U << 6); });
  refused_by(hv_cpuid_features, [](auto& leaves) { leaf(leaves, hv_cpuid_features).ebx |= 1U | 1U << 12; });
}

} // namespace
