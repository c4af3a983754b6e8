#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <gtest/gtest.h>
#include <optional>
#include <span>
#include <thread>
#include <variant>
#include <vector>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t query = 0x8001;
constexpr std::uint64_t boot_zeroed = 0x8002;

/// RAM below 4 MiB, a hole for MMIO, ROM at 8 MiB, and the last page of the guest-physical space.
class Calls : public testing::Test {
protected:
  Calls() {
    Region low = *Region::memfd(GuestAddress(0), 4 * mib);
    memory.replace(*MemoryMap::make({low, *Region::memfd(GuestAddress(8 * mib), mib, RegionKind::rom),
                                     *Region::memfd(GuestAddress(guest_space_end - page_size), page_size)}));
  }

  HypercallResult call(ExtendedHypercalls& hypercalls, std::uint64_t control, std::uint64_t output, unsigned cpl = 0) {
    return hypercalls.handle({.control = control, .output = GuestAddress(output), .cpl = cpl});
  }

  struct Range {
    std::uint64_t first;
    std::uint64_t count;
    friend bool operator==(const Range&, const Range&) = default;
  };
  std::vector<Range> answer_at(std::uint64_t output) {
    std::vector<Range> ranges;
    const auto count = *memory.read_value<std::uint64_t>(GuestAddress(output));
    for (std::uint64_t i = 0; i < std::min<std::uint64_t>(count, 255); ++i)
      ranges.push_back(*memory.read_value<Range>(GuestAddress(output + 8 + i * 16)));
    return ranges;
  }

  GuestMemory memory;
};

TEST_F(Calls, TellsItsCapabilities) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  EXPECT_EQ(call(hypercalls, query, 0xFF8), 0U);
  EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0xFF8)), 1U);

  auto without = *ExtendedHypercalls::create(memory, {.boot_zeroed_memory = false});
  EXPECT_EQ(call(without, query, 0xFF8), 0U);
  EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0xFF8)), 0U);
  EXPECT_EQ(call(without, boot_zeroed, 0), hv_result(HvStatus::invalid_hypercall_code));
}

TEST_F(Calls, RefusesOptionsThatContradictEachOther) {
  const auto refused = ExtendedHypercalls::create(memory, {.extended_hypercalls = false, .boot_zeroed_memory = true});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HvErrc::invalid_options);
}

// KVM forwards HvCallPostMessage and HvCallSignalEvent too, to a VMM that has VMBus.
TEST_F(Calls, HandBackWhatIsNotTheirs) {
  for (const bool extended : {true, false}) {
    auto hypercalls =
        *ExtendedHypercalls::create(memory, {.extended_hypercalls = extended, .boot_zeroed_memory = extended});
    const HypercallResult not_ours(std::unexpect, HvNoResult::not_ours);
    for (const unsigned code : {0x0000U, 0x0002U, 0x0008U, 0x005CU, 0x005DU, 0x8000U, 0x8042U, 0xFFFFU})
      for (const std::uint64_t more : {std::uint64_t{0}, std::uint64_t{1} << 16, ~std::uint64_t{0xFFFF}})
        EXPECT_EQ(call(hypercalls, code | more, UINT64_MAX), not_ours) << std::hex << code << ' ' << more;
    EXPECT_EQ(hypercalls.counts().other, 8U * 3);
  }
  EXPECT_TRUE(memory.survey().touched.empty());
}

// Windows calls 0x8001 whether or not it is offered.
TEST_F(Calls, DeniesAllExtendedCallsWhenOff) {
  auto hypercalls = *ExtendedHypercalls::create(memory, {.extended_hypercalls = false, .boot_zeroed_memory = false});
  for (std::uint64_t code = 0x8001; code <= 0x8041; ++code)
    EXPECT_EQ(call(hypercalls, code, 0), hv_result(HvStatus::access_denied));
  EXPECT_TRUE(memory.survey().touched.empty());
}

TEST_F(Calls, ReportsAllRamButWhatItTouched) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  ASSERT_TRUE(memory.write_value(GuestAddress(0x1000), std::uint8_t{1}));
  // Pages 0 and 2 (the answer) to 0x3FF, and the page at the end of the space.
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x3000), 0U);
  EXPECT_EQ(answer_at(0x3000), (std::vector<Range>{{4, 0x3FC}, {0, 1}, {2, 1}, {(guest_space_end >> 12) - 1, 1}}));
}

// With 8-byte alignment and no page crossing, 0xFF8 bytes start at page offset 0 or 8.
TEST_F(Calls, TakesBothOffsetsThatFitAPage) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x5008), 0U);
  EXPECT_EQ(answer_at(0x5008), (std::vector<Range>{{6, 0x3FA}, {0, 5}, {(guest_space_end >> 12) - 1, 1}}));
  EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x5000)), 0U);
  EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x6000)), 0U);
}

// The page reads zero until the answer is in it, so that only the call itself can know.
TEST_F(Calls, NeverReportsTheAnswersOwnPage) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  for (const std::uint64_t output :
       {std::uint64_t{0}, 0x7008 + 0 * mib, 2 * mib, 4 * mib - 0x1000, guest_space_end - 0x1000}) {
    ASSERT_EQ(call(hypercalls, boot_zeroed, output), 0U);
    for (const auto& range : answer_at(output))
      EXPECT_FALSE(output >> 12 >= range.first && (output >> 12) - range.first < range.count);
  }
}

TEST_F(Calls, NamesTheLargest255Ranges) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  // Every second page, so that 512 ranges of one page are left; then three larger ones.
  for (std::uint64_t page = 0; page < 1024; page += 2)
    ASSERT_TRUE(memory.write_value(GuestAddress(page << 12), std::uint8_t{1}));
  ASSERT_TRUE(memory.add_region(*Region::memfd(GuestAddress(16 * mib), 3 * page_size)));
  ASSERT_TRUE(memory.add_region(*Region::memfd(GuestAddress(32 * mib), 5 * page_size)));
  ASSERT_EQ(call(hypercalls, boot_zeroed, 0), 0U);
  const auto ranges = answer_at(0);
  ASSERT_EQ(ranges.size(), 255U);
  EXPECT_EQ(ranges[0], (Range{32 * mib >> 12, 5}));
  EXPECT_EQ(ranges[1], (Range{16 * mib >> 12, 3}));
  EXPECT_EQ(ranges[2], (Range{1, 1}));
}

TEST_F(Calls, TellsTheEmbedderWhatItAnswered) {
  std::size_t ranges = 0;
  std::uint64_t zeroed_pages = 0;
  std::uint64_t count_in_guest = 0;
  auto hypercalls = *ExtendedHypercalls::create(memory, {.on_boot_zeroed = [&](const BootZeroedAnswer& answer) {
                                                  ranges = answer.ranges.size();
                                                  zeroed_pages = answer.zeroed().page_count();
                                                  count_in_guest = *memory.read_value<std::uint64_t>(answer.output);
                                                }});
  ASSERT_EQ(call(hypercalls, boot_zeroed, 0x2000), 0U);
  EXPECT_NE(ranges, 0U);
  EXPECT_EQ(count_in_guest, ranges);
  EXPECT_EQ(zeroed_pages, 1024U); // 1025 pages of RAM but the answer's own
  EXPECT_EQ(hypercalls.counts().get_boot_zeroed_memory, 1U);
  EXPECT_EQ(hypercalls.counts().query_capabilities, 0U);
}

// The next answer goes by it, whatever was answered before.
TEST_F(Calls, AreAnsweredByTheSurveyThatIsSet) {
  auto hypercalls =
      *ExtendedHypercalls::create(memory, {.survey = {.leave_out = PageSet(*PageRange::make(PageNumber(0), 1024))}});
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x3000), 0U);
  EXPECT_EQ(answer_at(0x3000), (std::vector<Range>{{(guest_space_end >> 12) - 1, 1}}));
  hypercalls.set_survey({.leave_out = PageSet(*PageRange::make(PageNumber(8), 1016))});
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x3000), 0U);
  EXPECT_EQ(answer_at(0x3000), (std::vector<Range>{{4, 4}, {0, 3}, {(guest_space_end >> 12) - 1, 1}}));
}

TEST_F(Calls, OfferBootZeroedMemoryOrNotUntilTheGuestHasAsked) {
  for (const std::uint64_t first : {query, boot_zeroed}) {
    auto hypercalls = *ExtendedHypercalls::create(memory, {.boot_zeroed_memory = false});
    EXPECT_FALSE(hypercalls.offers_boot_zeroed_memory());
    ASSERT_TRUE(hypercalls.offer_boot_zeroed_memory(true));
    ASSERT_TRUE(hypercalls.offer_boot_zeroed_memory(false));
    // Calls that say nothing of it.
    EXPECT_EQ(call(hypercalls, 0x8003, 0), hv_result(HvStatus::invalid_hypercall_code));
    ASSERT_TRUE(hypercalls.offer_boot_zeroed_memory(true));
    EXPECT_TRUE(hypercalls.offers_boot_zeroed_memory());

    EXPECT_EQ(call(hypercalls, first, 0x1000), 0U);
    const auto late = hypercalls.offer_boot_zeroed_memory(false);
    ASSERT_FALSE(late);
    EXPECT_EQ(late.error().code, HvErrc::too_late);
    EXPECT_EQ(call(hypercalls, query, 0x1000), 0U);
    EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x1000)), 1U);
    EXPECT_EQ(call(hypercalls, boot_zeroed, 0x1000), 0U);

    hypercalls.reset();
    ASSERT_TRUE(hypercalls.offer_boot_zeroed_memory(false));
    EXPECT_EQ(call(hypercalls, query, 0x1000), 0U);
    EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x1000)), 0U);
    EXPECT_EQ(call(hypercalls, boot_zeroed, 0x1000), hv_result(HvStatus::invalid_hypercall_code));
  }
}

TEST_F(Calls, AreNotOfferedWhereTheyCannotBe) {
  auto off = *ExtendedHypercalls::create(memory, {.extended_hypercalls = false, .boot_zeroed_memory = false});
  auto theirs =
      *ExtendedHypercalls::create(memory, {.boot_zeroed_memory = false, .calls = {boot_zeroed_memory_row(memory, {})}});
  for (ExtendedHypercalls* hypercalls : {&off, &theirs}) {
    const auto refused = hypercalls->offer_boot_zeroed_memory(true);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, HvErrc::invalid_options);
  }
  EXPECT_FALSE(off.offers_boot_zeroed_memory());
  EXPECT_TRUE(theirs.offers_boot_zeroed_memory());
  EXPECT_EQ(call(theirs, query, 0x1000), 0U);
  EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0x1000)), 1U);
}

TEST_F(Calls, LeavesOutWhatTheEmbedderKeeps) {
  HvOptions options;
  options.survey.leave_out.add(*PageRange::make(PageNumber(0x10), 0x10));
  auto hypercalls = *ExtendedHypercalls::create(memory, options);
  ASSERT_EQ(call(hypercalls, boot_zeroed, 0), 0U);
  EXPECT_EQ(answer_at(0), (std::vector<Range>{{0x20, 0x3E0}, {1, 0xF}, {(guest_space_end >> 12) - 1, 1}}));
}

TEST_F(Calls, LeavesOutTheHypercallPage) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  hypercalls.set_hypercall_page(PageNumber(0x10));
  ASSERT_EQ(call(hypercalls, boot_zeroed, 0), 0U);
  EXPECT_EQ(answer_at(0), (std::vector<Range>{{0x11, 0x3EF}, {1, 0xF}, {(guest_space_end >> 12) - 1, 1}}));
  // A page number that no guest has is no trouble.
  hypercalls.set_hypercall_page(PageNumber(UINT64_MAX));
  ASSERT_EQ(call(hypercalls, boot_zeroed, 0), 0U);
}

// As the hypercall page.
TEST_F(Calls, LeaveTheReferenceTscPageOutAndRefuseItAsTheirOutput) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  hypercalls.set_reference_tsc_page(PageNumber(0x10));
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x10000), hv_result(HvStatus::invalid_parameter));
  ASSERT_EQ(call(hypercalls, boot_zeroed, 0), 0U);
  EXPECT_EQ(answer_at(0), (std::vector<Range>{{0x11, 0x3EF}, {1, 0xF}, {(guest_space_end >> 12) - 1, 1}}));
}

// It holds code that the guest may run and not write (TLFS "Establishing the Hypercall Interface").
TEST_F(Calls, RefuseTheHypercallPageAsTheirOutput) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  hypercalls.set_hypercall_page(PageNumber(0x10));
  EXPECT_EQ(call(hypercalls, query, 0x10000), hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(call(hypercalls, query, 0x10FF8), hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x10000), hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x10008), hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x10010), hv_result(HvStatus::invalid_alignment));
  EXPECT_TRUE(memory.survey().touched.empty());
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0xF000), 0U);
  EXPECT_EQ(call(hypercalls, query, 0x11000), 0U);
  hypercalls.set_hypercall_page(std::nullopt);
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x10000), 0U);
}

// Neither call has input: whatever is in the register, TLFS has it ignored.
TEST_F(Calls, IgnoreTheInputAddress) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  const std::array inputs = {std::uint64_t{0}, std::uint64_t{1},          5 * mib,  8 * mib, std::uint64_t{0xFF9},
                             guest_space_end,  std::uint64_t{UINT64_MAX}, mib * mib};
  for (const std::uint64_t input : inputs)
    for (const std::uint64_t control : {query, boot_zeroed})
      EXPECT_EQ(hypercalls.handle({.control = control, .input = GuestAddress(input), .output = GuestAddress(0x1000)}),
                0U)
          << std::hex << input;
}

struct BadCall {
  const char* what;
  std::uint64_t control;
  std::uint64_t output;
  unsigned cpl;
  std::optional<HvStatus> status; // nothing: #UD
};

void PrintTo(const BadCall& call, std::ostream* out) { *out << call.what; }

class BadCalls : public Calls, public testing::WithParamInterface<BadCall> {};

TEST_P(BadCalls, GetTheirStatusAndNothingIsWritten) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  const BadCall& bad = GetParam();
  const HypercallResult result = call(hypercalls, bad.control, bad.output, bad.cpl);
  if (bad.status)
    EXPECT_EQ(result, hv_result(*bad.status));
  else
    EXPECT_EQ(result, HypercallResult(std::unexpect, HvNoResult::undefined_opcode));
  EXPECT_TRUE(memory.survey().touched.empty());
  std::vector<std::byte> rom(mib);
  ASSERT_TRUE(memory.read(GuestAddress(8 * mib), rom));
  EXPECT_TRUE(std::ranges::all_of(rom, [](std::byte byte) { return byte == std::byte{}; }));
}

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }
using enum HvStatus;

// Each for both calls where it can be: `query` writes 8 bytes, `boot_zeroed` 0xFF8.
INSTANTIATE_TEST_SUITE_P(
    Control, BadCalls,
    testing::Values(
        BadCall{"heat hint, which is not offered", 0x8003, 0, 0, invalid_hypercall_code},
        BadCall{"last extended call", 0x8041, 0, 0, invalid_hypercall_code},
        BadCall{"query, fast", query | bit(16), 0, 0, invalid_parameter},
        BadCall{"boot zeroed, fast", boot_zeroed | bit(16), 0, 0, invalid_parameter},
        BadCall{"query, rep count", query | bit(32), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, rep count", boot_zeroed | bit(32), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, highest rep count bit", boot_zeroed | bit(43), 0, 0, invalid_hypercall_input},
        BadCall{"query, rep start", query | bit(48), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, rep start", boot_zeroed | bit(59), 0, 0, invalid_hypercall_input},
        BadCall{"query, variable header", query | bit(17), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, variable header", boot_zeroed | bit(26), 0, 0, invalid_hypercall_input},
        BadCall{"heat hint, fast", 0x8003 | bit(16), 0, 0, invalid_parameter},
        BadCall{"heat hint, nested", 0x8003 | bit(31), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, fast and nested", boot_zeroed | bit(16) | bit(31), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, nested", boot_zeroed | bit(31), 0, 0, invalid_hypercall_input},
        BadCall{"query, reserved bit 27", query | bit(27), 0, 0, invalid_hypercall_input},
        BadCall{"query, reserved bit 30", query | bit(30), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, reserved bit 44", boot_zeroed | bit(44), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, reserved bit 47", boot_zeroed | bit(47), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, reserved bit 60", boot_zeroed | bit(60), 0, 0, invalid_hypercall_input},
        BadCall{"boot zeroed, reserved bit 63", boot_zeroed | bit(63), 0, 0, invalid_hypercall_input},
        BadCall{"all ones but the code", UINT64_MAX << 16 | query, UINT64_MAX, 0, invalid_hypercall_input}));

INSTANTIATE_TEST_SUITE_P(
    Output, BadCalls,
    testing::Values(BadCall{"query, misaligned by 4", query, 4, 0, invalid_alignment},
                    BadCall{"query, misaligned by 1", query, 0x1001, 0, invalid_alignment},
                    BadCall{"boot zeroed, misaligned", boot_zeroed, 4, 0, invalid_alignment},
                    BadCall{"boot zeroed, over the page's end", boot_zeroed, 0x10, 0, invalid_alignment},
                    BadCall{"boot zeroed, far over the page's end", boot_zeroed, 0x1FF8, 0, invalid_alignment},
                    BadCall{"query, over the page's end", query, 0xFFC, 0, invalid_alignment},
                    BadCall{"query, MMIO hole", query, 5 * mib, 0, invalid_parameter},
                    BadCall{"boot zeroed, MMIO hole", boot_zeroed, 5 * mib, 0, invalid_parameter},
                    BadCall{"boot zeroed, just past RAM", boot_zeroed, 4 * mib, 0, invalid_parameter},
                    BadCall{"query, ROM", query, 8 * mib, 0, invalid_parameter},
                    BadCall{"boot zeroed, ROM", boot_zeroed, 8 * mib, 0, invalid_parameter},
                    BadCall{"boot zeroed, unbacked below 2^52", boot_zeroed, guest_space_end - 0x2000, 0,
                            invalid_parameter},
                    BadCall{"query, beyond the guest-physical space", query, guest_space_end, 0, invalid_alignment},
                    BadCall{"boot zeroed, beyond the space", boot_zeroed, guest_space_end, 0, invalid_alignment},
                    BadCall{"query, wraps", query, UINT64_MAX - 7, 0, invalid_alignment},
                    BadCall{"boot zeroed, wraps", boot_zeroed, UINT64_MAX - 0xFF7, 0, invalid_alignment},
                    BadCall{"boot zeroed, sign bit", boot_zeroed, bit(63), 0, invalid_alignment}));

INSTANTIATE_TEST_SUITE_P(Privilege, BadCalls,
                         testing::Values(BadCall{"query from CPL 3", query, 0, 3, std::nullopt},
                                         BadCall{"boot zeroed from CPL 1", boot_zeroed, 0, 1, std::nullopt},
                                         BadCall{"unknown code from CPL 3", 0xFFFF, 0, 3, std::nullopt}));

// From many vCPUs at once: every answer is whole, and none names a page that holds another's finished answer, or that
// another's is about to be written to.
TEST_F(Calls, AnswersAllVcpusAtOnce) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  constexpr unsigned vcpus = 4;
  constexpr std::uint64_t rounds = 25;
  std::atomic<unsigned> ready = 0;
  std::vector<std::thread> threads;
  for (unsigned vcpu = 0; vcpu < vcpus; ++vcpu)
    threads.emplace_back([&, vcpu] {
      ++ready;
      while (ready < vcpus) {
      }
      for (std::uint64_t round = 0; round < rounds; ++round) {
        const std::uint64_t output = (vcpu * rounds + round) * page_size;
        EXPECT_EQ(call(hypercalls, boot_zeroed, output), 0U);
        for (const auto& range : answer_at(output))
          // What this vCPU has had answered before holds data.
          EXPECT_TRUE(range.first + range.count <= vcpu * rounds || range.first > vcpu * rounds + round);
      }
    });
  for (auto& thread : threads)
    thread.join();
  EXPECT_EQ(hypercalls.counts().get_boot_zeroed_memory, vcpus * rounds);
}

TEST_F(Calls, AreTraced) {
  std::vector<HvCallEnded> ended;
  std::vector<std::vector<PageRange>> answered;
  HvRangesAnswered last;
  HvOptions options;
  options.trace = [&](const HvTraceEvent& event) {
    if (const auto* const call = std::get_if<HvCallEnded>(&event)) ended.push_back(*call);
    if (const auto* const ranges = std::get_if<HvRangesAnswered>(&event)) {
      EXPECT_EQ(ended.size(), 1U) << "before the call's own event";
      answered.emplace_back(ranges->ranges.begin(), ranges->ranges.end());
      last = *ranges;
    }
  };
  bool is_told = false;
  options.on_boot_zeroed = [&](const BootZeroedAnswer& answer) {
    is_told = true;
    EXPECT_EQ(answered, (std::vector<std::vector<PageRange>>{answer.ranges}));
  };
  auto hypercalls = *ExtendedHypercalls::create(memory, options);
  EXPECT_EQ(call(hypercalls, query, 0x1000), 0U);
  EXPECT_EQ(hypercalls.handle({.control = boot_zeroed, .output = GuestAddress(0x2000), .vp_index = 7}), 0U);
  EXPECT_EQ(call(hypercalls, boot_zeroed, 0x2001), hv_result(HvStatus::invalid_alignment));
  EXPECT_FALSE(call(hypercalls, query, 0x1000, 3));
  EXPECT_FALSE(call(hypercalls, 0x005C, 0x1000));
  EXPECT_TRUE(is_told);
  ASSERT_EQ(answered.size(), 1U);
  EXPECT_EQ(last.output, GuestAddress(0x2000));
  EXPECT_EQ(last.ram_pages, 4 * mib / page_size + 1);
  EXPECT_EQ(last.zeroed_ranges, answered[0].size());
  std::uint64_t pages = 0;
  for (const PageRange& range : answered[0])
    pages += range.count();
  EXPECT_EQ(last.zeroed_pages, pages);
  ASSERT_EQ(ended.size(), 5U);
  EXPECT_EQ(ended[1].call.vp_index, 7U);
  EXPECT_EQ(ended[1].call.output, GuestAddress(0x2000));
  EXPECT_EQ(ended[1].result, 0U);
  EXPECT_GT(ended[1].took.count(), 0);
  EXPECT_EQ(ended[2].result, hv_result(HvStatus::invalid_alignment));
  EXPECT_FALSE(ended[3].result);
  EXPECT_EQ(ended[3].no_result, HvNoResult::undefined_opcode);
  EXPECT_EQ(ended[4].no_result, HvNoResult::not_ours);
}

// Whatever 64 bits a guest puts in three registers: an answer or a refusal, and memory is written on success alone.
TEST_F(Calls, SurvivesAnyRegisters) {
  auto hypercalls = *ExtendedHypercalls::create(memory);
  std::uint64_t state = 88172645463325252ULL;
  const auto random = [&] { // xorshift64: the same numbers everywhere
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  };
  for (int i = 0; i < 20'000; ++i) {
    const std::uint64_t control =
        i % 3 == 0 ? random() : (i % 3 == 1 ? query : boot_zeroed) | (random() & random() & random() & ~0xFFFFULL);
    const std::uint64_t output = random() >> (random() % 64);
    const bool was_zero = memory.read_value<std::uint64_t>(GuestAddress(output)).value_or(1) == 0;
    const auto result = hypercalls.handle({.control = control,
                                           .input = GuestAddress(random()),
                                           .output = GuestAddress(output),
                                           .cpl = random() % 4 == 0 ? 3U : 0U});
    if (was_zero && !(result && *result == 0)) EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(output)), 0U);
  }
}

} // namespace
