#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <gtest/gtest.h>
#include <new>
#include <span>
#include <utility>
#include <vector>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint16_t own_simple = 0x8020;
constexpr std::uint16_t own_rep = 0x8021;
constexpr std::uint16_t own_of_another_range = 0x0123;

constexpr std::uint64_t reps(std::uint64_t count, std::uint64_t start = 0) { return count << 32 | start << 48; }

/// An embedder's calls: each remembers what it was given.
class OwnCalls : public testing::Test {
protected:
  OwnCalls()
      : memory(*MemoryMap::make(
            {*Region::anonymous(GuestAddress(0), mib), *Region::anonymous(GuestAddress(mib), mib, RegionKind::rom)})) {}

  HvCallRow row(std::uint16_t code, HvCallKind kind) {
    return {.code = code,
            .kind = kind,
            .input_bytes = 16,
            .input_bytes_per_rep = static_cast<std::uint16_t>(kind == HvCallKind::rep ? 8 : 0),
            .output_bytes = 8,
            .output_bytes_per_rep = static_cast<std::uint16_t>(kind == HvCallKind::rep ? 16 : 0),
            .capability = std::uint64_t{1} << (code & 63),
            .handler = [this](const HvCheckedCall& call) {
              seen.assign(call.input.begin(), call.input.end());
              control = call.control.value;
              output = call.output;
              return answer;
            }};
  }
  ExtendedHypercalls make() {
    return *ExtendedHypercalls::create(memory,
                                       {.calls = {row(own_simple, HvCallKind::simple), row(own_rep, HvCallKind::rep),
                                                  row(own_of_another_range, HvCallKind::simple)},
                                        .capabilities = std::uint64_t{1} << 63});
  }

  GuestMemory memory;
  HvCallAnswer answer;
  std::vector<std::byte> seen;
  std::uint64_t control = 0;
  GuestAddress output{0};
};

TEST_F(OwnCalls, AreOfferedBesideOurs) {
  auto hypercalls = make();
  ASSERT_EQ(hypercalls.handle({.control = 0x8001, .output = GuestAddress(8)}), 0U);
  const std::uint64_t bits = *memory.read_value<std::uint64_t>(GuestAddress(8));
  EXPECT_EQ(bits, std::uint64_t{1} | std::uint64_t{1} << 63 | std::uint64_t{1} << (own_simple & 63) |
                      std::uint64_t{1} << (own_rep & 63) | std::uint64_t{1} << (own_of_another_range & 63));
  std::vector<std::uint16_t> codes;
  for (const HvCallRow& each : hypercalls.table().rows())
    codes.push_back(each.code);
  EXPECT_EQ(codes, (std::vector<std::uint16_t>{own_of_another_range, 0x8001, 0x8002, own_simple, own_rep}));
}

TEST_F(OwnCalls, GetACopyOfTheirInput) {
  auto hypercalls = make();
  for (std::uint64_t i = 0; i < 3; ++i)
    ASSERT_TRUE(memory.write_value(GuestAddress(0x1FE8 + i * 8), 0x1111 * (i + 1)));
  answer.status = HvStatus::operation_denied;
  // 16 bytes, which end with their page.
  EXPECT_EQ(hypercalls.handle({.control = own_simple, .input = GuestAddress(0x1FF0), .output = GuestAddress(0x3FF8)}),
            hv_result(HvStatus::operation_denied));
  ASSERT_EQ(seen.size(), 16U);
  EXPECT_EQ(seen[0], std::byte{0x22});
  EXPECT_EQ(seen[8], std::byte{0x33});
  EXPECT_EQ(output, GuestAddress(0x3FF8));
  ASSERT_EQ(hypercalls.handle({.control = own_of_another_range}), hv_result(HvStatus::operation_denied));
  EXPECT_EQ(control, own_of_another_range);
}

TEST_F(OwnCalls, OfRepsGetTheListAndSayHowFarTheyCame) {
  auto hypercalls = make();
  answer = {.status = HvStatus::operation_denied, .reps_completed = 2};
  EXPECT_EQ(hypercalls.handle({.control = own_rep | reps(3, 1), .input = GuestAddress(0x2000)}),
            hv_result(HvStatus::operation_denied, 2));
  EXPECT_EQ(seen.size(), 16U + 3 * 8);
  EXPECT_EQ(control, own_rep | reps(3, 1));
}

TEST_F(OwnCalls, ThatDoNotFitTheirRowNeverReachTheirHandler) {
  auto hypercalls = make();
  const auto status = [&](const HvCall& call) {
    const auto result = hypercalls.handle(call);
    return result ? static_cast<HvStatus>(*result) : HvStatus::success;
  };
  const GuestAddress fine(0);
  using enum HvStatus;
  const std::pair<HvCall, HvStatus> bad[] = {
      {{.control = own_simple | reps(1)}, invalid_hypercall_input},
      {{.control = own_simple | reps(0, 1)}, invalid_hypercall_input},
      {{.control = own_simple | 1 << 17}, invalid_hypercall_input},
      {{.control = own_simple | 1 << 16}, invalid_parameter},
      {{.control = own_of_another_range | 1 << 27}, invalid_hypercall_input},
      {{.control = own_rep}, invalid_hypercall_input},
      {{.control = own_rep | reps(1, 1)}, invalid_hypercall_input},
      {{.control = own_rep | reps(0xFFF, 0xFFF)}, invalid_hypercall_input},
      {{.control = own_simple, .input = GuestAddress(4)}, invalid_alignment},
      {{.control = own_simple, .input = GuestAddress(0xFF8)}, invalid_alignment},
      {{.control = own_simple, .input = GuestAddress(guest_space_end)}, invalid_alignment},
      {{.control = own_simple, .output = GuestAddress(0xFFC)}, invalid_alignment},
      {{.control = own_rep | reps(256)}, invalid_alignment},                              // 8 + 16 * 256 bytes
      {{.control = own_rep | reps(2), .output = GuestAddress(0xFE0)}, invalid_alignment}, // 8 + 16 * 2
      {{.control = own_rep | reps(2), .input = GuestAddress(0xFE8)}, invalid_alignment},  // 16 + 8 * 2
      {{.control = own_rep | reps(0xFFF)}, invalid_alignment},
      {{.control = own_simple, .input = GuestAddress(2 * mib)}, invalid_parameter},
      {{.control = own_simple, .output = GuestAddress(2 * mib)}, invalid_parameter},
      {{.control = own_simple, .output = GuestAddress(mib)}, invalid_parameter}, // ROM
  };
  for (const auto& [call, expected] : bad) {
    EXPECT_EQ(status(call), expected) << std::hex << call.control << ' ' << call.input.value();
    EXPECT_EQ(control, 0U);
  }
  // Input may come from ROM, and a list may fill its page.
  EXPECT_EQ(status({.control = own_simple, .input = GuestAddress(mib)}), success);
  EXPECT_EQ(status({.control = own_rep | reps(255), .input = fine}), success);
  EXPECT_EQ(seen.size(), 16U + 255 * 8);
}

// A rep caller that is told of success and of no reps calls again for ever (TLFS: success means all of them).
TEST_F(OwnCalls, OfRepsThatSucceedAreDoneWhole) {
  auto hypercalls = make();
  EXPECT_EQ(hypercalls.handle({.control = own_rep | reps(3, 1)}), hv_result(HvStatus::success, 3));
  answer.reps_completed = 9;
  EXPECT_EQ(hypercalls.handle({.control = own_simple}), hv_result(HvStatus::success, 0));
}

// KVM forwards HvCallSignalEvent whose parameters are in registers.
TEST_F(OwnCalls, ThatAreFastAndNotExtendedAreHandedBack) {
  auto hypercalls = make();
  EXPECT_EQ(hypercalls.handle({.control = own_of_another_range | 1 << 16}),
            HypercallResult(std::unexpect, HvNoResult::not_ours));
  EXPECT_EQ(control, 0U);
}

// Its page reads zero until the answer is there.
TEST_F(OwnCalls, MayBeOurRowWhichLeavesItsOutputOut) {
  auto hypercalls =
      *ExtendedHypercalls::create(memory, {.boot_zeroed_memory = false, .calls = {boot_zeroed_memory_row(memory, {})}});
  ASSERT_EQ(hypercalls.handle({.control = 0x8002, .output = GuestAddress(0x4000)}), 0U);
  const auto count = *memory.read_value<std::uint64_t>(GuestAddress(0x4000));
  ASSERT_EQ(count, 2U);
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto range = *memory.read_value<std::array<std::uint64_t, 2>>(GuestAddress(0x4008 + i * 16));
    EXPECT_FALSE(4 >= range[0] && 4 < range[0] + range[1]);
  }
}

// As ours, whose page must not be reported while an answer is on its way to it.
TEST_F(OwnCalls, KeepTheirOutputOutOfAnswers) {
  HvCallRow asking = row(own_simple, HvCallKind::simple);
  ExtendedHypercalls* self = nullptr;
  asking.handler = [&](const HvCheckedCall&) {
    EXPECT_EQ(self->handle({.control = 0x8002, .output = GuestAddress(0x8000)}), 0U);
    return HvCallAnswer{};
  };
  auto hypercalls = *ExtendedHypercalls::create(memory, {.calls = {asking}});
  self = &hypercalls;
  ASSERT_EQ(hypercalls.handle({.control = own_simple, .input = GuestAddress(0x1000), .output = GuestAddress(0x4000)}),
            0U);
  const auto count = *memory.read_value<std::uint64_t>(GuestAddress(0x8000));
  ASSERT_GE(count, 3U); // one more where a page that was only read counts as touched
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto range = *memory.read_value<std::array<std::uint64_t, 2>>(GuestAddress(0x8008 + i * 16));
    EXPECT_FALSE(4 >= range[0] && 4 < range[0] + range[1]);
  }
}

TEST_F(OwnCalls, ThatRunOutOfMemorySaySo) {
  HvCallRow failing = row(own_simple, HvCallKind::simple);
  failing.handler = [](const HvCheckedCall&) -> HvCallAnswer { throw std::bad_alloc(); };
  auto hypercalls = *ExtendedHypercalls::create(memory, {.calls = {failing}});
  EXPECT_EQ(hypercalls.handle({.control = own_simple}), hv_result(HvStatus::insufficient_memory));
}

TEST_F(OwnCalls, AreRefusedWhereTheyMakeNoSense) {
  const auto refused = [&](std::vector<HvCallRow> calls) {
    const auto made = ExtendedHypercalls::create(memory, {.calls = std::move(calls)});
    return made ? HvError{} : made.error();
  };
  HvCallRow twice = row(own_simple, HvCallKind::simple);
  HvError error = refused({twice, row(own_rep, HvCallKind::rep), twice});
  EXPECT_EQ(error.code, HvErrc::invalid_options);
  EXPECT_EQ(error.value, own_simple);
  EXPECT_NE(error.message().find("0x8020"), std::string::npos) << error.message();
  EXPECT_EQ(refused({row(0x8002, HvCallKind::simple)}).value, 0x8002U);
  HvCallRow silent = row(own_simple, HvCallKind::simple);
  silent.handler = nullptr;
  EXPECT_EQ(refused({silent}).value, own_simple);
  HvCallRow large = row(own_simple, HvCallKind::simple);
  large.output_bytes = page_size + 8;
  EXPECT_EQ(refused({large}).value, own_simple);
  HvCallRow listed = row(own_simple, HvCallKind::simple);
  listed.input_bytes_per_rep = 8;
  EXPECT_EQ(refused({listed}).value, own_simple);
}

} // namespace
