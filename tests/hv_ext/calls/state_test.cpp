#include <array>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <gtest/gtest.h>
#include <random>
#include <span>
#include <vector>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

// A saved Hyper-V state as bytes, which may come from anywhere.

using namespace cppvmm;

namespace {

HvState with_page() {
  HvState state{.guest_os_id = 0x8100'0000'0000'0001, .hypercall = 0x1234'5001, .hypercall_page_covers = HvPage{}};
  for (std::size_t i = 0; i < page_size; ++i)
    (*state.hypercall_page_covers)[i] = static_cast<std::byte>(i * 7);
  return state;
}

HvState with_time(bool is_hypercall_page_there) {
  HvState state = is_hypercall_page_there ? with_page() : HvState{};
  state.reference_tsc = 0x9'8765'4001;
  state.reference_tsc_page_covers.emplace().fill(std::byte{0x5A});
  state.reference_tsc_sequence = 0xFFFF'FFFF;
  state.tsc = 0x1111'2222'3333'4444;
  state.reference_time = 0x2AAA'BBBB'CCCC'DDDD;
  return state;
}

const std::array states = {HvState{},
                           HvState{.guest_os_id = 5, .hypercall = 0},
                           HvState{.guest_os_id = 0, .hypercall = 2},
                           HvState{.guest_os_id = 1, .hypercall = 0x7003},
                           with_page(),
                           with_time(false),
                           with_time(true)};

TEST(HvStateBytes, GiveBackWhatWasSaved) {
  for (const HvState& state : states) {
    const auto bytes = to_bytes(state);
    EXPECT_LE(bytes.size(), 8256U);
    const auto found = hv_state_from_bytes(bytes);
    ASSERT_TRUE(found) << found.error().message();
    EXPECT_EQ(*found, state);
  }
}

TEST(HvStateBytes, HaveAFormatThatStays) {
  const auto bytes = to_bytes({.guest_os_id = 0x0102'0304'0506'0708,
                               .hypercall = 0x1100'2201,
                               .reference_tsc = 0x3300'4401,
                               .reference_tsc_sequence = 5,
                               .tsc = 0x6600,
                               .reference_time = 0x7700});
  constexpr std::array<unsigned char, 64> expected = {
      'c', 'p', 'p', 'v', 'm', 'm', 'H', 'v', 2,    0,    0,    0,    0, 0, 0, 0, // signature, version, pages
      8,   7,   6,   5,   4,   3,   2,   1,   0x01, 0x22, 0x00, 0x11, 0, 0, 0, 0, 0x01, 0x44, 0x00, 0x33, 0, 0, 0, 0,
      5,   0,   0,   0,   0,   0,   0,   0,   0,    0x66, 0,    0,    0, 0, 0, 0, 0,    0x77, 0,    0,    0, 0, 0, 0};
  ASSERT_EQ(bytes.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i)
    EXPECT_EQ(static_cast<unsigned char>(bytes[i]), expected[i]) << i;
}

TEST(HvStateBytes, OfAnotherLengthAreRefused) {
  for (const HvState& state : states) {
    auto bytes = to_bytes(state);
    for (std::size_t size = 0; size < bytes.size(); ++size) {
      const auto found = hv_state_from_bytes(std::span(bytes).first(size));
      ASSERT_FALSE(found) << size;
      EXPECT_EQ(found.error().code, HvErrc::invalid_state);
    }
    bytes.push_back(std::byte{0});
    EXPECT_FALSE(hv_state_from_bytes(bytes));
  }
}

TEST(HvStateBytes, OfAnotherVersionAreRefusedByItsNumber) {
  auto bytes = to_bytes(with_page());
  bytes[8] = std::byte{3};
  const auto found = hv_state_from_bytes(bytes);
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().value, 3U);
}

TEST(HvStateBytes, ThatNoGuestCanHaveSetUpAreRefused) {
  for (const HvState& state :
       {HvState{.guest_os_id = 0, .hypercall = 1},
        HvState{.guest_os_id = 1, .hypercall = 0, .hypercall_page_covers = HvPage{}}, HvState{.reference_tsc = 0x1001},
        HvState{.reference_tsc = 0x1000},
        HvState{.guest_os_id = 1, .hypercall = 0x1001, .reference_tsc = 0x1001, .reference_tsc_sequence = 1},
        HvState{.reference_tsc_sequence = 1, .reference_time = std::uint64_t{1} << 63},
        HvState{.reference_tsc_page_covers = HvPage{}, .reference_tsc_sequence = 1}})
    EXPECT_FALSE(hv_state_from_bytes(to_bytes(state)));
}

// Whatever a byte is changed to: refused, or a state that has the same bytes.
TEST(HvStateBytes, AreWhatTheySayOrRefused) {
  std::mt19937_64 random(1);
  for (const HvState& state : states) {
    const auto bytes = to_bytes(state);
    for (int i = 0; i < 2000; ++i) {
      auto changed = bytes;
      changed[random() % changed.size()] = static_cast<std::byte>(random());
      if (const auto found = hv_state_from_bytes(changed)) EXPECT_EQ(to_bytes(*found), changed);
    }
  }
}

TEST(HvErrors, IsThrownWithItsMessage) {
  const HvError error{.code = HvErrc::invalid_state, .operation = "restore", .value = 7};
  EXPECT_EQ(value_or_throw(std::expected<int, HvError>(5)), 5);
  value_or_throw(std::expected<void, HvError>());
  try {
    value_or_throw(std::expected<void, HvError>(std::unexpected(error)));
    FAIL() << "nothing was thrown";
  } catch (const HvException& thrown) {
    EXPECT_EQ(thrown.what(), error.message());
    EXPECT_EQ(thrown.error(), error);
  }
}

} // namespace
