#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <variant>
#include <vector>

#include <expected>
#include <gtest/gtest.h>

#include "support/bare_guest.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_ext;
import cppvmm.vcpu;

using namespace cppvmm;
using namespace cppvmm::test;

namespace {

constexpr std::uint8_t answer_port = 0x10; // the guest's "look at RAX"
constexpr std::uint64_t hypercall_page = 0x20000;
constexpr std::uint64_t query_output = 0x30000;
constexpr std::uint64_t boot_zeroed_output = 0x40000;

/// wrmsr with EDX:EAX = value.
void wrmsr(Code& code, std::uint32_t msr, std::uint64_t value) {
  code.mov_ecx(msr)
      .mov_eax(static_cast<std::uint32_t>(value))
      .mov_edx(static_cast<std::uint32_t>(value >> 32))
      .raw({0x0F, 0x30});
}

/// A call through the hypercall page, then OUT, so that the VMM can look at the result.
void hypercall(Code& code, std::uint64_t control, std::uint64_t output, std::uint64_t page = hypercall_page) {
  code.raw({0x48, 0xB9}).value(control);                // mov rcx
  code.raw({0x31, 0xD2});                               // xor edx, edx
  code.raw({0x49, 0xB8}).value(output);                 // mov r8
  code.raw({0x48, 0xB8}).value(page).raw({0xFF, 0xD0}); // mov rax; call rax
  code.out(answer_port);
}

/// OUT with RAX = EDX:EAX.
void show_both(Code& code) { code.raw({0x48, 0xC1, 0xE2, 0x20, 0x48, 0x09, 0xD0}).out(answer_port); }
/// OUT with an MSR in RAX.
void show_msr(Code& code, std::uint32_t msr) { show_both(code.mov_ecx(msr).raw({0x0F, 0x32})); }

/// Sets the Hyper-V interface up.
Code introduction(std::uint64_t page = hypercall_page) {
  Code code;
  wrmsr(code, hv_msr_guest_os_id, 0x8100'0000'0000'0001);
  wrmsr(code, hv_msr_hypercall, page | 1);
  return code;
}

constexpr std::array transports = {HypercallTransport::kernel, HypercallTransport::split, HypercallTransport::user};

bool has_transport(HypercallTransport transport) {
  if (transport == HypercallTransport::kernel) return machine_facts().kvm_forwards;
  return transport == HypercallTransport::user || machine_facts().kvm_hyperv;
}

class HypervOver : public BareGuestTest, public testing::WithParamInterface<HypercallTransport> {
protected:
  // Before anything is written: all of the memory could be one huge page.
  HypervOver() { madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE); }

  void SetUp() override {
    BareGuestTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    if (GetParam() == HypercallTransport::kernel && !machine_facts().kvm_forwards)
      GTEST_SKIP() << "this KVM does not forward extended hypercalls";
    if (GetParam() == HypercallTransport::split && !machine_facts().kvm_hyperv)
      GTEST_SKIP() << "this KVM has no Hyper-V";
    auto region = Region::adopt(GuestAddress(0), {memory.data(), memory.size(), Backing::anonymous, -1, 0});
    ASSERT_TRUE(region) << region.error().message();
    guest_memory.replace(*MemoryMap::make({*region}));
  }

  void make(HvOptions options, HypercallTransport transport) {
    auto made = Hyperv::create(*vm, guest_memory, std::move(options), transport);
    ASSERT_TRUE(made) << made.error().message();
    hyperv.emplace(std::move(*made));
    auto created = vm->create_vcpu(0);
    ASSERT_TRUE(created) << created.error().message();
    vcpu.emplace(std::move(*created));
  }

  void start(const Code& code, HvOptions options = {}, bool has_full_set = false) {
    ASSERT_NO_FATAL_FAILURE(make(std::move(options), GetParam()));
    HypervCpuid shown{.with_time = with_time};
    if (has_full_set) {
      auto full = full_hv_cpuid(*vcpu);
      ASSERT_TRUE(full) << full.error().message();
      shown.leaves = std::move(*full);
    }
    const auto prepared = hyperv->prepare(*vcpu, *kvm->supported_cpuid(), shown);
    ASSERT_TRUE(prepared) << prepared.error().message();
    load(code);
    ASSERT_KVM_OK(start_long_mode(*vcpu));
  }

  /// As an embedder resets a machine in place, and starts `code` then.
  void reset(const Code& code) {
    // What the last exit left open would change the registers once more.
    vcpu->stop_handle().request_stop();
    ASSERT_RUN(Interrupted, interrupted, *vcpu);
    ASSERT_TRUE(interrupted.stop_requested);
    const auto done = hyperv->reset(*vcpu);
    ASSERT_TRUE(done) << done.error().message();
    write_guest_tables(memory);
    load(code);
    ended_by.reset();
    ASSERT_KVM_OK(start_long_mode(*vcpu));
  }

  /// RAX at each OUT to the answer port, until the guest halts or an exception handler reports its port.
  std::vector<std::uint64_t> run_to_end() {
    std::vector<std::uint64_t> answers;
    for (;;) {
      auto exit = run_on(*vcpu);
      if (!exit) {
        ADD_FAILURE() << exit.error().message();
        return answers;
      }
      const auto handled = hyperv->handle(*vcpu, *exit);
      if (!handled) {
        ADD_FAILURE() << handled.error().message();
        return answers;
      }
      if (*handled) continue;
      const auto* const out = std::get_if<IoOut>(&*exit);
      if (out == nullptr || out->port != answer_port) {
        ended_by = *exit;
        return answers;
      }
      answers.push_back(vcpu->registers()->rax);
    }
  }

  [[nodiscard]] bool ended_with(ExceptionVector vector) const {
    const auto* const out = ended_by ? std::get_if<IoOut>(&*ended_by) : nullptr;
    return out != nullptr && out->port == exception_port(vector);
  }

  GuestMemory guest_memory;
  std::optional<Hyperv> hyperv;
  std::optional<Vcpu> vcpu;
  std::optional<Exit> ended_by;
  bool with_time = true;
};

TEST_P(HypervOver, AnswersAGuestThatAsks) {
  Code code = introduction();
  hypercall(code, 0x8001, query_output);
  hypercall(code, 0x8002, boot_zeroed_output);
  start(code.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, 0}));
  ASSERT_TRUE(ended_by && std::holds_alternative<Hlt>(*ended_by));
  EXPECT_EQ(memory.read<std::uint64_t>(query_output), 1U);
  EXPECT_EQ(hyperv->hypercalls().counts().query_capabilities, 1U);
  EXPECT_EQ(hyperv->hypercalls().counts().get_boot_zeroed_memory, 1U);

  // Every reported page is zero, and the large rest of the memory is reported.
  const auto ranges = memory.read<std::uint64_t>(boot_zeroed_output);
  ASSERT_GT(ranges, 0U);
  ASSERT_LE(ranges, 255U);
  std::uint64_t reported = 0;
  for (std::uint64_t i = 0; i < ranges; ++i) {
    const auto first = memory.read<std::uint64_t>(boot_zeroed_output + 8 + 16 * i);
    const auto count = memory.read<std::uint64_t>(boot_zeroed_output + 16 + 16 * i);
    for (std::uint64_t page = first; page < first + count; ++page) {
      const auto bytes = memory.read<std::array<std::uint64_t, 512>>(page << 12);
      EXPECT_EQ(bytes, (std::array<std::uint64_t, 512>{})) << "page " << page;
      EXPECT_NE(page << 12, hypercall_page);
      EXPECT_NE(page << 12, boot_zeroed_output);
      EXPECT_NE(page << 12, query_output);
    }
    reported += count;
  }
  EXPECT_GT(reported, (memory.size() >> 12) - 16);
}

// The statuses that a guest meets are the same over each transport.
TEST_P(HypervOver, RefusesBadCallsAlike) {
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> calls = {
      {0x8001 | 1ULL << 16, 0}, // fast
      {0x8002 | 1ULL << 27, 0}, // reserved
      {0x8002 | 1ULL << 32, 0}, // rep count
      {0x8002 | 1ULL << 17, 0}, // variable header
      {0x8002, 0x10},           // over the page's end
      {0x8002, 0x4000'0000},    // no memory
      {0x8002, 1ULL << 62},     // beyond the guest-physical space
      {0x8002, hypercall_page}, // the guest's to run only
      {0x8001, hypercall_page + 0xFF8},
      {0x8003, 0},              // not offered
      {0x8003 | 1ULL << 16, 0}, // not offered, fast
      {0x8003 | 1ULL << 31, 0}, // not offered, nested
      {0x8002 | 1ULL << 16 | 1ULL << 31, 0},
  };
  Code code = introduction();
  for (const auto& [control, output] : calls)
    hypercall(code, control, output);
  start(code.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{5, 3, 3, 3, 4, 5, 4, 5, 5, 2, 5, 3, 3}));
}

// The next three ask for what Linux's own tests of KVM ask for (selftests hyperv_extended_hypercalls, hyperv_features).

TEST_P(HypervOver, TheGuestReadsWhatTheCallWrote) {
  constexpr std::uint64_t canary = 0x5A5A'5A5A'5A5A'5A5A;
  Code code = introduction();
  hypercall(code, 0x8001, query_output);
  for (const std::uint64_t at : {query_output - 8, query_output, query_output + 8})
    code.raw({0x48, 0xA1}).value(at).out(answer_port); // mov rax, [at]
  start(code.hlt());
  memory.write(query_output - 8, canary);
  memory.write(query_output, canary);
  memory.write(query_output + 8, canary);
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, canary, 1, canary}));
}

TEST_P(HypervOver, AFastExtendedCallIsAnInvalidParameter) {
  Code code = introduction();
  hypercall(code, 0x8001 | 1ULL << 16, query_output);
  hypercall(code, 0x8002 | 1ULL << 16, boot_zeroed_output);
  start(code.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{5, 5}));
  EXPECT_EQ(memory.read<std::uint64_t>(query_output), 0U);
  EXPECT_EQ(memory.read<std::uint64_t>(boot_zeroed_output), 0U);
}

TEST_P(HypervOver, DeniesWhatIsOff) {
  Code code = introduction();
  code.mov_eax(hv_cpuid_features).mov_ecx(0).raw({0x0F, 0xA2, 0x89, 0xD8}).out(answer_port); // cpuid; mov eax, ebx
  hypercall(code, 0x8001, query_output);
  hypercall(code, 0x8002, boot_zeroed_output);
  start(code.hlt(), {.extended_hypercalls = false, .boot_zeroed_memory = false});
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, 6, 6})) << "and bit 20 of 0x40000003.EBX is not there";
  EXPECT_EQ(memory.read<std::uint64_t>(query_output), 0U);
}

TEST_P(HypervOver, ShowsItsVpIndexAndMsrs) {
  Code code = introduction();
  show_msr(code, hv_msr_vp_index);
  show_msr(code, hv_msr_hypercall);
  show_msr(code, hv_msr_guest_os_id);
  start(code.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, hypercall_page | 1, 0x8100'0000'0000'0001}));
}

TEST_P(HypervOver, ShowsItsCpuidLeaves) {
  Code code;
  for (const std::uint32_t leaf : {1U, hv_cpuid_interface, hv_cpuid_features}) {
    code.mov_eax(leaf).mov_ecx(0).raw({0x0F, 0xA2}); // cpuid
    code.raw({0x89, static_cast<int>(leaf == 1                   ? 0xC8
                                     : leaf == hv_cpuid_features ? 0xD8
                                                                 : 0xC0)}); // mov eax, ecx/ebx/eax
    code.out(answer_port);
  }
  start(code.hlt());
  const auto answers = run_to_end();
  ASSERT_EQ(answers.size(), 3U);
  EXPECT_NE(answers[0] & 1U << 31, 0U);
  EXPECT_EQ(answers[1], 0x3123'7648U);
  EXPECT_EQ(answers[2], 1U << 20);
}

TEST_P(HypervOver, GivesGeneralProtectionForMsrsThatItDoesNotHave) {
  Code code = introduction();
  wrmsr(code, hv_msr_vp_index, 1);
  start(code.hlt());
  EXPECT_TRUE(run_to_end().empty());
  EXPECT_TRUE(ended_with(ExceptionVector::general_protection));
}

// The code of the first boot's hypercall page is there still, for nobody discards the memory.
TEST_P(HypervOver, ResetInPlaceTakesNoCallUntilTheGuestIntroducesItselfAgain) {
  constexpr std::uint64_t second_page = 0x50000;
  Code first = introduction();
  hypercall(first, 0x8001, query_output);
  start(first.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0}));
  EXPECT_EQ(memory.read<std::uint64_t>(query_output), 1U);
  const auto old_code = memory.read<std::uint64_t>(hypercall_page);
  EXPECT_NE(old_code, 0U);

  memory.write(query_output, std::uint64_t{0});
  Code uninvited;
  show_msr(uninvited, hv_msr_guest_os_id);
  show_msr(uninvited, hv_msr_hypercall);
  hypercall(uninvited, 0x8001, query_output);
  reset(uninvited.hlt());
  const auto answers = run_to_end();
  ASSERT_GE(answers.size(), 2U);
  EXPECT_EQ(answers[0], 0U);
  EXPECT_EQ(answers[1], 0U);
  EXPECT_EQ(memory.read<std::uint64_t>(hypercall_page), old_code);
  if (GetParam() != HypercallTransport::kernel) {
    EXPECT_TRUE(ended_with(ExceptionVector::invalid_opcode));
  } else {
    // KVM takes it for one of its own hypercalls, of a number that it does not have: -KVM_ENOSYS (linux/kvm_para.h).
    EXPECT_EQ(answers.back(), static_cast<std::uint64_t>(-1000));
  }
  EXPECT_EQ(hyperv->hypercalls().counts().query_capabilities, 1U) << "nobody was asked";
  EXPECT_EQ(memory.read<std::uint64_t>(query_output), 0U);

  Code second = introduction(second_page);
  hypercall(second, 0x8001, query_output, second_page);
  hypercall(second, 0x8002, boot_zeroed_output, second_page);
  show_msr(second, hv_msr_hypercall);
  reset(second.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, 0, second_page | 1}));
  EXPECT_EQ(memory.read<std::uint64_t>(query_output), 1U);
  EXPECT_EQ(hyperv->hypercalls().counts().query_capabilities, 2U);
  EXPECT_EQ(hyperv->hypercalls().counts().get_boot_zeroed_memory, 1U);
}

// The vCPU stopped between a hypercall's answer and the guest's next instruction.
TEST_P(HypervOver, ResetInPlaceDropsTheResultOfACallInProgress) {
  Code first = introduction();
  hypercall(first, 0x8001, query_output);
  start(first.hlt());
  for (;;) {
    const auto exit = run_on(*vcpu);
    ASSERT_TRUE(exit) << exit.error().message();
    const auto handled = hyperv->handle(*vcpu, *exit);
    ASSERT_TRUE(handled) << handled.error().message();
    ASSERT_TRUE(*handled) << exit_name(*exit);
    if (std::holds_alternative<Hypercall>(*exit)) break;
  }
  Code second;
  second.out(answer_port); // RAX as it was set
  show_msr(second, hv_msr_guest_os_id);
  reset(second.hlt());
  ASSERT_KVM_OK(vcpu->set_registers({.rax = 0x55, .rsp = layout::stack, .rip = layout::code}));
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0x55, 0}));
}

TEST_P(HypervOver, ResetInPlaceUnlocksTheHypercallPage) {
  Code first;
  wrmsr(first, hv_msr_guest_os_id, 1);
  wrmsr(first, hv_msr_hypercall, hypercall_page | 3);
  show_msr(first, hv_msr_hypercall);
  start(first.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{hypercall_page | 3}));
  Code second = introduction(0x50000);
  show_msr(second, hv_msr_hypercall);
  reset(second.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0x50001}));
}

// What it tells in the second boot is as much as in the first, once the first one's memory was discarded.
TEST_P(HypervOver, ResetInPlaceAnswersTheNextBootAsTheFirst) {
  Code code = introduction();
  hypercall(code, 0x8002, boot_zeroed_output);
  for (std::uint64_t page = 0x60; page < 0x80; ++page) // dirty it: mov [page], eax
    code.raw({0x48, 0xA3}).value(page << 12);
  std::vector<std::vector<PageRange>> ranges;
  start(code.hlt(), {.on_boot_zeroed = [&](const BootZeroedAnswer& answer) { ranges.push_back(answer.ranges); }});
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0}));
  const auto discarded = guest_memory.reset();
  ASSERT_TRUE(discarded) << discarded.error().message();
  reset(code);
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0}));
  ASSERT_EQ(ranges.size(), 2U);
  EXPECT_EQ(ranges[0], ranges[1]);
  std::uint64_t pages = 0;
  for (const auto& range : ranges[1])
    pages += range.count();
  EXPECT_GT(pages, (memory.size() >> 12) - 16);
}

// The guest makes one call and sees one result, however often its time was over.
TEST_P(HypervOver, AMemoryHeatHintGoesOnUntilItIsDone) {
  constexpr std::uint64_t list = 0x50000;
  constexpr std::uint64_t pages = 512;
  ASSERT_GE(memory.size(), pages * page_size);
  Code code = introduction();
  for (const std::uint64_t count : {3U, 1U}) {
    code.raw({0x48, 0xB9}).value(std::uint64_t{0x8003} | count << 32); // mov rcx
    code.mov_edx(list);
    code.raw({0x48, 0xB8}).value(hypercall_page).raw({0xFF, 0xD0}); // mov rax; call rax
    code.out(answer_port);
  }
  std::vector<std::uint64_t> asked;
  std::vector<std::uint64_t> went_on;
  HvOptions options;
  options.call_time = {};
  options.memory_heat.policy = [&](HvMemoryHeat, const PageSet& set) -> MemoryResult<HeatDone> {
    asked.push_back(set.page_count());
    return HeatDone{.freed_pages = set.page_count()};
  };
  options.trace = [&](const HvTraceEvent& event) {
    if (const auto* const call = std::get_if<HvCallEnded>(&event); call != nullptr && call->goes_on)
      went_on.push_back(*call->goes_on);
  };
  start(code.hlt(), std::move(options));
  // Cold, of three times all of the guest's first pages.
  for (std::uint64_t range = 0; range < 3; ++range)
    ASSERT_TRUE(guest_memory.write_value(GuestAddress(list + 8 + 8 * range), pages - 1));
  EXPECT_EQ(run_to_end(), (std::vector{hv_result(HvStatus::success, 3), hv_result(HvStatus::success, 1)}));
  EXPECT_EQ(asked, std::vector(4, pages));
  constexpr std::uint64_t control = 0x8003 | std::uint64_t{3} << 32;
  EXPECT_EQ(went_on, (std::vector{control | std::uint64_t{1} << 48, control | std::uint64_t{2} << 48}));
  EXPECT_EQ(hyperv->hypercalls().counts().memory_heat_hint, 4U);
}

TEST_P(HypervOver, WhatTheGuestDiscardsIsReportedByTheNextAnswer) {
  constexpr std::uint64_t list = 0x50000;
  Code code = introduction();
  for (std::uint64_t page = 0x60; page < 0x80; ++page) // dirty it: mov [page], eax
    code.raw({0x48, 0xA3}).value(page << 12);
  hypercall(code, 0x8002, boot_zeroed_output);
  code.raw({0x48, 0xB9}).value(std::uint64_t{0x8003} | std::uint64_t{1} << 32);
  code.mov_edx(list);
  code.raw({0x48, 0xB8}).value(hypercall_page).raw({0xFF, 0xD0});
  code.out(answer_port);
  hypercall(code, 0x8002, boot_zeroed_output);
  std::vector<PageSet> answers;
  start(code.hlt(), {.memory_heat = {.policy = standard_heat_policy(guest_memory)},
                     .on_boot_zeroed = [&](const BootZeroedAnswer& answer) { answers.push_back(answer.zeroed()); }});
  ASSERT_TRUE(guest_memory.write_value(GuestAddress(list), std::uint64_t{2}));
  ASSERT_TRUE(guest_memory.write_value(GuestAddress(list + 8), std::uint64_t{0x60} << 12 | 0x1F));
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, hv_result(HvStatus::success, 1), 0}));
  ASSERT_EQ(answers.size(), 2U);
  const PageRange discarded = *PageRange::make(PageNumber(0x60), 0x20);
  EXPECT_FALSE(answers[0].intersects(discarded));
  EXPECT_TRUE(answers[1].contains(discarded));
  EXPECT_EQ(answers[1].page_count(), answers[0].page_count() + 0x20);
}

// HvCallPostMessage, for a VMM that has VMBus.
TEST_P(HypervOver, HandsBackAnothersCallWhichWaitsForItsResult) {
  if (GetParam() != HypercallTransport::user) GTEST_SKIP() << "KVM keeps it, without a SynIC";
  Code code = introduction();
  hypercall(code, 0x005C, query_output);
  hypercall(code, 0x8001, query_output);
  start(code.hlt());
  EXPECT_TRUE(run_to_end().empty());
  ASSERT_TRUE(ended_by);
  const auto* const call = std::get_if<Hypercall>(&*ended_by);
  ASSERT_NE(call, nullptr);
  EXPECT_EQ(call->control, 0x005CU);
  EXPECT_EQ(call->output, query_output);
  EXPECT_FALSE(run_on(*vcpu)) << "unanswered";
  ASSERT_KVM_OK(vcpu->complete_hypercall(0x1234));
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0x1234, 0}));
  EXPECT_EQ(hyperv->hypercalls().counts().other, 1U);
}

TEST_P(HypervOver, TracesWhatAGuestSeesAndDoes) {
  std::vector<HvCpuidGiven> leaves;
  std::vector<HvMsrTouched> msrs;
  Code code = introduction();
  show_msr(code, 0x4000'01FF); // nobody's, which ends it
  HvOptions options;
  options.trace = [&](const HvTraceEvent& event) {
    if (const auto* const leaf = std::get_if<HvCpuidGiven>(&event)) leaves.push_back(*leaf);
    if (const auto* const msr = std::get_if<HvMsrTouched>(&event)) msrs.push_back(*msr);
  };
  start(code, std::move(options));
  EXPECT_TRUE(run_to_end().empty());
  EXPECT_TRUE(ended_with(ExceptionVector::general_protection));
  const auto features = std::ranges::find(leaves, hv_cpuid_features, &HvCpuidGiven::function);
  ASSERT_NE(features, leaves.end());
  EXPECT_NE(features->ebx & hv_feature_ebx_extended_hypercalls, 0U);
  ASSERT_EQ(msrs.size(), GetParam() == HypercallTransport::kernel  ? 0U
                         : GetParam() == HypercallTransport::split ? 2U
                                                                   : 3U);
  if (!msrs.empty()) {
    EXPECT_EQ(msrs[0].index, hv_msr_guest_os_id);
    EXPECT_EQ(msrs[0].access, HvMsrAccess::write);
    EXPECT_EQ(msrs[0].value, 0x8100'0000'0000'0001U);
    EXPECT_FALSE(msrs[0].is_refused);
  }
  if (msrs.size() == 3) {
    EXPECT_EQ(msrs[2].access, HvMsrAccess::read);
    EXPECT_TRUE(msrs[2].is_refused);
    EXPECT_FALSE(msrs[2].value);
  }
  // What KVM has answered by itself is seen by what it holds.
  msrs.clear();
  ASSERT_TRUE(hyperv->trace_held_msrs(*vcpu));
  const auto id = std::ranges::find(msrs, hv_msr_guest_os_id, &HvMsrTouched::index);
  if (GetParam() == HypercallTransport::kernel) {
    ASSERT_NE(id, msrs.end());
    EXPECT_EQ(id->access, HvMsrAccess::held);
    EXPECT_EQ(id->value, 0x8100'0000'0000'0001U);
  }
  EXPECT_EQ(msrs.empty(), GetParam() == HypercallTransport::user);
}

TEST_P(HypervOver, TracesCalls) {
  std::vector<HvCallEnded> calls;
  Code code = introduction();
  hypercall(code, 0x8001, query_output);
  hypercall(code, 0x8041, query_output);
  HvOptions options;
  options.trace = [&](const HvTraceEvent& event) {
    if (const auto* const call = std::get_if<HvCallEnded>(&event)) calls.push_back(*call);
  };
  start(code.hlt(), std::move(options));
  EXPECT_EQ(run_to_end().size(), 2U);
  ASSERT_EQ(calls.size(), 2U);
  EXPECT_EQ(calls[0].call.output, GuestAddress(query_output));
  EXPECT_EQ(calls[0].result, 0U);
  EXPECT_EQ(calls[1].call.control, 0x8041U);
  EXPECT_EQ(calls[1].result, hv_result(HvStatus::invalid_hypercall_code));
}

TEST_P(HypervOver, TakesNoCallBeforeTheGuestSaidWhoItIs) {
  if (GetParam() == HypercallTransport::kernel) GTEST_SKIP() << "a trap that the guest makes by itself is KVM's";
  start(Code().out(user_hypercall_port).hlt());
  EXPECT_TRUE(run_to_end().empty());
  EXPECT_TRUE(ended_with(ExceptionVector::invalid_opcode));
  EXPECT_EQ(hyperv->hypercalls().counts().other, 0U);
}

// By the counter, the page and the frequencies, which agree.
TEST_P(HypervOver, GivesTimeWhereKvmHasNone) {
  if (GetParam() != HypercallTransport::user) GTEST_SKIP() << "here it is KVM's";
  constexpr std::uint64_t time_page = 0x50000;
  ASSERT_KVM_OK(vm->create_interrupt_controller());
  Code code = introduction();
  wrmsr(code, hv_msr_reference_tsc, time_page | 1);
  show_msr(code, hv_msr_time_ref_count);
  show_both(code.raw({0x0F, 0x31})); // rdtsc
  show_msr(code, hv_msr_time_ref_count);
  show_msr(code, hv_msr_tsc_frequency);
  show_msr(code, hv_msr_apic_frequency);
  hypercall(code, 0x8002, time_page);
  hypercall(code, 0x8002, boot_zeroed_output);
  start(code.out(0x11));
  const auto khz = vcpu->tsc_khz();
  if (!khz) GTEST_SKIP() << khz.error().message();
  const auto answers = run_to_end();
  ASSERT_EQ(answers.size(), 7U);
  __extension__ using Wide = unsigned __int128;
  const auto time = static_cast<std::uint64_t>(Wide{answers[1]} * memory.read<std::uint64_t>(time_page + 8) >> 64) +
                    memory.read<std::uint64_t>(time_page + 16);
  EXPECT_NE(memory.read<std::uint32_t>(time_page), 0U);
  EXPECT_LT(answers[0], time);
  EXPECT_LT(time, answers[2]);
  EXPECT_EQ(answers[3], std::uint64_t{*khz} * 1000);
  EXPECT_EQ(answers[4], 1'000'000'000U);
  EXPECT_EQ(answers[5], hv_result(HvStatus::invalid_parameter));
  EXPECT_EQ(answers[6], 0U);

  const auto saved = hyperv->state(*vcpu);
  ASSERT_TRUE(saved) << saved.error().message();
  EXPECT_EQ(saved->reference_tsc, time_page | 1);
  EXPECT_GT(saved->tsc, answers[1]);
  EXPECT_GE(saved->reference_time, answers[2]);

  // It goes on where the VMM puts the TSC back; and nowhere where the guest would be without.
  const MsrEntry tsc{.index = 0x10, .value = saved->tsc};
  for (const bool is_given : {true, false}) {
    auto created = vm->create_vcpu(is_given ? 1 : 2);
    ASSERT_TRUE(created) << created.error().message();
    auto other = Hyperv::create(*vm, guest_memory, {}, GetParam());
    ASSERT_TRUE(other) << other.error().message();
    ASSERT_TRUE(other->prepare(*created, *kvm->supported_cpuid(), {.with_time = is_given}));
    ASSERT_KVM_OK(created->set_msrs(std::span(&tsc, 1)));
    const auto restored = other->restore(*created, *saved);
    EXPECT_EQ(restored.has_value(), is_given);
    if (!is_given) {
      EXPECT_EQ(restored.error().code, HypervErrc::invalid_state);
      continue;
    }
    const auto again = other->state(*created);
    ASSERT_TRUE(again) << again.error().message();
    EXPECT_GE(again->reference_time, saved->reference_time);
    EXPECT_NE(again->reference_tsc_sequence, saved->reference_tsc_sequence);
  }
}

TEST_P(HypervOver, GivesTheTimeThatLeavesGrantAndNoOther) {
  if (GetParam() != HypercallTransport::user) GTEST_SKIP() << "here it is KVM's";
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  if (user_time(*vcpu).tsc_hz == 0) GTEST_SKIP() << "this KVM does not know the TSC's frequency";
  EXPECT_EQ(user_time(*vcpu).apic_hz, 0U) << "KVM has no interrupt controller here";
  const auto prepare = [&](const HvTimeSource& time) {
    HypervCpuid shown;
    for (const HvCpuidLeaf& leaf : hv_cpuid_leaves({}, time))
      shown.leaves.push_back(
          {.function = leaf.function, .eax = leaf.eax, .ebx = leaf.ebx, .ecx = leaf.ecx, .edx = leaf.edx});
    return hyperv->prepare(*vcpu, *kvm->supported_cpuid(), shown);
  };
  const auto refused = prepare({.tsc_hz = 1, .apic_hz = 1});
  ASSERT_FALSE(refused) << "frequencies without the APIC's";
  EXPECT_EQ(refused.error().code, HypervErrc::invalid_options);
  ASSERT_TRUE(prepare({}));
  Code code;
  show_msr(code, hv_msr_time_ref_count);
  load(code.hlt());
  ASSERT_KVM_OK(start_long_mode(*vcpu));
  EXPECT_TRUE(run_to_end().empty());
  EXPECT_TRUE(ended_with(ExceptionVector::general_protection));
}

TEST_P(HypervOver, GivesNoTimeThatIsNotWanted) {
  if (GetParam() != HypercallTransport::user) GTEST_SKIP() << "here it is KVM's";
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  ASSERT_TRUE(hyperv->prepare(*vcpu, *kvm->supported_cpuid(), {.with_time = false}));
  Code code = introduction();
  show_msr(code, hv_msr_time_ref_count);
  load(code.hlt());
  ASSERT_KVM_OK(start_long_mode(*vcpu));
  EXPECT_TRUE(run_to_end().empty());
  EXPECT_TRUE(ended_with(ExceptionVector::general_protection));
}

// KVM answers its own hypercalls beside ours, from the page that is ours with `split`.
TEST_P(HypervOver, LeavesTheOtherCallsToKvm) {
  if (GetParam() == HypercallTransport::user) GTEST_SKIP() << "here KVM has none";
  Code code = introduction();
  hypercall(code, 0x0008, 0); // HvCallNotifyLongSpinWait
  hypercall(code, 0x8001, query_output);
  hypercall(code, 0x00FF, 0); // none
  hypercall(code, 0x0008 | 1ULL << 27, 0);
  start(code.hlt(), {}, true);
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, 0, 2, 3}));
  EXPECT_EQ(memory.read<std::uint64_t>(query_output), 1U);
  EXPECT_EQ(hyperv->hypercalls().counts().other, 0U);
}

TEST_P(HypervOver, AddsToAllThatKvmHas) {
  if (GetParam() == HypercallTransport::user) GTEST_SKIP() << "here KVM has none";
  Code code = introduction();
  const auto show_cpuid = [&](std::uint32_t leaf, int register_of_rax) {
    code.mov_eax(leaf).mov_ecx(0).raw({0x0F, 0xA2, 0x89, register_of_rax}).out(answer_port); // cpuid; mov eax, ...
  };
  show_cpuid(hv_cpuid_vendor, 0xD8);   // ebx
  show_cpuid(hv_cpuid_features, 0xC0); // eax
  show_cpuid(hv_cpuid_features, 0xD8); // ebx
  show_msr(code, 0x4000'0020);         // TIME_REF_COUNT, which is KVM's
  hypercall(code, 0x8001, query_output);
  start(code.hlt(), {}, true);
  const auto answers = run_to_end();
  ASSERT_EQ(answers.size(), 5U);
  EXPECT_EQ(answers[0], 0x7263'694DU) << "\"Micr\"";
  EXPECT_NE(answers[1] & 1U << 9, 0U) << "REFERENCE_TSC";
  EXPECT_EQ(answers[1] & (1U << 2 | 1U << 3), 0U) << "SynIC and its timers, which are not enabled";
  EXPECT_EQ(answers[2] & (1U << 4 | 1U << 5 | 1U << 20), 1U << 20) << "extended hypercalls, and no messages or events";
  EXPECT_EQ(answers[4], 0U);
}

TEST_P(HypervOver, ShowsSynicWhereItIsEnabled) {
  if (GetParam() == HypercallTransport::user) GTEST_SKIP() << "here KVM has none";
  ASSERT_KVM_OK(vm->create_interrupt_controller());
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  ASSERT_FALSE(vcpu->has_hyperv_synic());
  ASSERT_KVM_OK(vcpu->enable_hyperv_synic());
  const auto full = full_hv_cpuid(*vcpu);
  ASSERT_TRUE(full) << full.error().message();
  const CpuidEntry* const features = find_cpuid(*full, hv_cpuid_features);
  ASSERT_NE(features, nullptr);
  EXPECT_EQ(features->eax & 0x1CU, 0x1CU) << "SynIC, its timers, the APIC's MSRs";
  EXPECT_NE(features->edx & 1U << 19, 0U);
  EXPECT_EQ(find_cpuid(*full, 0x4000'0080), nullptr) << "the debugger, which nobody is";
}

TEST_P(HypervOver, SaysWhichLeavesContradict) {
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  HypervCpuid shown{.leaves = {{.function = 0x4000'0000, .eax = 0x4000'0006}, {.function = 0x4000'0001, .eax = 1}}};
  const auto refused = hyperv->prepare(*vcpu, *kvm->supported_cpuid(), shown);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HypervErrc::invalid_options);
  ASSERT_TRUE(std::holds_alternative<HvError>(refused.error().cause));
  EXPECT_EQ(std::get<HvError>(refused.error().cause).value, hv_cpuid_interface);
}

TEST_P(HypervOver, KeepsTheLeavesOfAVmmsOwn) {
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  auto cpuid = *kvm->supported_cpuid();
  std::erase_if(cpuid, [](const CpuidEntry& entry) { return entry.function >> 8 == 0x40'0000; });
  for (const HvCpuidLeaf& leaf : hv_cpuid_leaves({.extended_hypercalls = false, .boot_zeroed_memory = false}))
    cpuid.push_back({.function = leaf.function, .eax = leaf.eax, .ebx = leaf.ebx, .ecx = leaf.ecx, .edx = leaf.edx});
  set_cpuid_entry(cpuid, {.function = hv_cpuid_limits, .eax = 64, .ebx = 32});
  const auto prepared = hyperv->prepare(*vcpu, cpuid);
  ASSERT_TRUE(prepared) << prepared.error().message();
  const auto given = vcpu->cpuid();
  ASSERT_TRUE(given);
  EXPECT_EQ(find_cpuid(*given, hv_cpuid_limits)->ebx, 32U);
  EXPECT_EQ(find_cpuid(*given, hv_cpuid_features)->ebx, 1U << 20);
}

TEST_P(HypervOver, MovesKvmsOwnLeavesWhenAsked) {
  const auto own = *kvm->supported_cpuid();
  const CpuidEntry* const signature = find_cpuid(own, 0x4000'0000);
  if (signature == nullptr || signature->ebx != 0x4B4D'564B) GTEST_SKIP() << "this KVM has no leaves of its own";
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  ASSERT_TRUE(hyperv->prepare(*vcpu, own, {.with_kvm_leaves = true}));
  const auto given = *vcpu->cpuid();
  EXPECT_EQ(find_cpuid(given, 0x4000'0001)->eax, 0x3123'7648U);
  ASSERT_NE(find_cpuid(given, 0x4000'0100), nullptr);
  EXPECT_EQ(find_cpuid(given, 0x4000'0100)->ebx, signature->ebx);
  EXPECT_GE(find_cpuid(given, 0x4000'0100)->eax, 0x4000'0101U);
  EXPECT_EQ(find_cpuid(given, 0x4000'0101)->eax, find_cpuid(own, 0x4000'0001)->eax);
}

// Saved over one transport and restored over each, in another VM with the same memory.
TEST_P(HypervOver, AVmThatIsRestoredAnswersWithoutANewIntroduction) {
  Code first = introduction();
  hypercall(first, 0x8001, query_output);
  with_time = false; // a guest with time of ours has it over no other transport
  start(first.hlt());
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0}));
  const auto saved = hyperv->state(*vcpu);
  ASSERT_TRUE(saved) << saved.error().message();
  EXPECT_EQ(saved->guest_os_id, 0x8100'0000'0000'0001U);
  EXPECT_EQ(saved->hypercall, hypercall_page | 1);
  EXPECT_EQ(saved->hypercall_page_covers.has_value(), GetParam() != HypercallTransport::kernel);

  Code second;
  hypercall(second, 0x8001, query_output);
  hypercall(second, 0x8002, boot_zeroed_output);
  show_msr(second, hv_msr_guest_os_id);
  show_msr(second, hv_msr_hypercall);
  for (const HypercallTransport transport : transports) {
    if (!has_transport(transport)) continue;
    SCOPED_TRACE(to_string(transport));
    vcpu.reset();
    hyperv.reset();
    auto created = kvm->create_vm();
    ASSERT_TRUE(created) << created.error().message();
    vm.emplace(std::move(*created));
    ASSERT_KVM_OK(vm->set_tss_address(0xFFFB'D000));
    ASSERT_KVM_OK(vm->set_memory_slot({.bytes = memory.size(), .host_address = memory.data()}));
    memory.write(query_output, std::uint64_t{0});

    ASSERT_NO_FATAL_FAILURE(make({}, transport));
    ASSERT_TRUE(hyperv->prepare(*vcpu, *kvm->supported_cpuid()));
    const auto restored = hyperv->restore(*vcpu, *saved);
    ASSERT_TRUE(restored) << restored.error().message();
    const auto again = hyperv->state(*vcpu);
    ASSERT_TRUE(again) << again.error().message();
    EXPECT_EQ(again->guest_os_id, saved->guest_os_id);
    EXPECT_EQ(again->hypercall, saved->hypercall);
    load(second.hlt());
    ASSERT_KVM_OK(start_long_mode(*vcpu));
    EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, 0, 0x8100'0000'0000'0001, hypercall_page | 1}));
    EXPECT_EQ(memory.read<std::uint64_t>(query_output), 1U);
    // What the guest before it had done is forgotten.
    EXPECT_FALSE(hyperv->hypercalls().offer_boot_zeroed_memory(true)) << "it has asked";
    ASSERT_TRUE(hyperv->restore(*vcpu, *saved));
    EXPECT_TRUE(hyperv->hypercalls().offer_boot_zeroed_memory(true));
  }
}

// Between the answer to a call and the guest's next instruction, which is in the page.
TEST_P(HypervOver, AGuestThatIsRestoredInTheMiddleOfACallGoesOn) {
  Code code = introduction();
  hypercall(code, 0x8001, query_output);
  hypercall(code, 0x8001, query_output + 8);
  start(code.hlt());
  for (;;) {
    const auto exit = run_on(*vcpu);
    ASSERT_TRUE(exit) << exit.error().message();
    const auto handled = hyperv->handle(*vcpu, *exit);
    ASSERT_TRUE(handled && *handled);
    if (std::holds_alternative<Hypercall>(*exit)) break;
  }
  vcpu->stop_handle().request_stop();
  ASSERT_RUN(Interrupted, interrupted, *vcpu);
  const auto saved = hv_state_from_bytes(to_bytes(*hyperv->state(*vcpu)));
  ASSERT_TRUE(saved) << saved.error().message();
  const auto registers = *vcpu->registers();
  const auto special = *vcpu->special_registers();
  EXPECT_EQ(registers.rip >> 12, hypercall_page >> 12);

  vcpu.reset();
  hyperv.reset();
  auto created = kvm->create_vm();
  ASSERT_TRUE(created) << created.error().message();
  vm.emplace(std::move(*created));
  ASSERT_KVM_OK(vm->set_tss_address(0xFFFB'D000));
  ASSERT_KVM_OK(vm->set_memory_slot({.bytes = memory.size(), .host_address = memory.data()}));
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  ASSERT_TRUE(hyperv->prepare(*vcpu, *kvm->supported_cpuid()));
  const auto restored = hyperv->restore(*vcpu, *saved);
  ASSERT_TRUE(restored) << restored.error().message();
  ASSERT_KVM_OK(vcpu->set_special_registers(special));
  ASSERT_KVM_OK(vcpu->set_registers(registers));
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, 0}));
  EXPECT_EQ(memory.read<std::uint64_t>(query_output + 8), 1U);
}

TEST_P(HypervOver, GivesKvmsSyntheticMsrsAndPutsThemBack) {
  if (GetParam() == HypercallTransport::user) GTEST_SKIP() << "here KVM has none";
  ASSERT_KVM_OK(vm->create_interrupt_controller());
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  ASSERT_KVM_OK(vcpu->enable_hyperv_synic());
  ASSERT_TRUE(hyperv->prepare(*vcpu, *kvm->supported_cpuid(), {.leaves = *full_hv_cpuid(*vcpu)}));
  const auto at_first = synthetic_msrs(*vcpu);
  ASSERT_TRUE(at_first) << at_first.error().message();
  constexpr std::uint32_t vp_runtime = 0x4000'0010;
  constexpr std::array<MsrEntry, 5> chosen = {{{0x4000'0021, 0x50001},   // REFERENCE_TSC
                                               {0x4000'0080, 1},         // SCONTROL
                                               {0x4000'0083, 0x60001},   // SIMP
                                               {0x4000'0092, 0x20},      // SINT2
                                               {0x4000'00B2, 2 << 16}}}; // STIMER1_CONFIG
  ASSERT_KVM_OK(vcpu->set_msrs(chosen));
  const auto saved = synthetic_msrs(*vcpu);
  ASSERT_TRUE(saved) << saved.error().message();
  for (const MsrEntry& entry : chosen)
    EXPECT_NE(std::ranges::find(*saved, entry), saved->end()) << std::hex << entry.index;
  // Those of a machine that is reset are as they were at first, and can be put back.
  ASSERT_TRUE(hyperv->reset(*vcpu));
  const auto reset = synthetic_msrs(*vcpu);
  ASSERT_TRUE(reset && reset->size() == at_first->size());
  for (std::size_t i = 0; i < reset->size(); ++i)
    if ((*reset)[i].index != vp_runtime)
      EXPECT_EQ((*reset)[i].value, (*at_first)[i].value) << std::hex << (*at_first)[i].index;
  ASSERT_KVM_OK(vcpu->set_msrs(*saved));
  const auto again = synthetic_msrs(*vcpu);
  ASSERT_TRUE(again && again->size() == saved->size());
  for (std::size_t i = 0; i < again->size(); ++i)
    if ((*again)[i].index != vp_runtime)
      EXPECT_EQ((*again)[i].value, (*saved)[i].value) << std::hex << (*saved)[i].index;
}

TEST_P(HypervOver, GivesSyntheticMsrsThatCanBePutBackWithoutASynic) {
  if (GetParam() == HypercallTransport::user) GTEST_SKIP() << "here KVM has none";
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  ASSERT_TRUE(hyperv->prepare(*vcpu, *kvm->supported_cpuid()));
  const auto saved = synthetic_msrs(*vcpu);
  ASSERT_TRUE(saved) << saved.error().message();
  ASSERT_FALSE(saved->empty());
  ASSERT_KVM_OK(vcpu->set_msrs(*saved));
  ASSERT_TRUE(hyperv->reset(*vcpu));
}

// KVM would write its reference time there, in the next boot's memory.
TEST_P(HypervOver, ResetInPlaceHasKvmForgetThePagesThatTheGuestNamed) {
  if (GetParam() == HypercallTransport::user) GTEST_SKIP() << "here KVM has none";
  constexpr std::uint64_t tsc_page = 0x70000;
  Code first = introduction();
  wrmsr(first, 0x4000'0021, tsc_page | 1);
  start(first.hlt(), {}, true);
  EXPECT_TRUE(run_to_end().empty());
  ASSERT_TRUE(ended_by && std::holds_alternative<Hlt>(*ended_by));
  memory.write(tsc_page, std::array<std::uint64_t, 4>{});
  reset(Code().hlt());
  ASSERT_KVM_OK(vm->set_clock(*vm->clock()));
  EXPECT_TRUE(run_to_end().empty());
  EXPECT_EQ(memory.read<std::uint64_t>(tsc_page), 0U);
  EXPECT_EQ(*vcpu->msr(0x4000'0021), 0U);
}

// HvCallPostMessage and HvCallSignalEvent of a guest that has a SynIC, for a VMM with VMBus.
TEST_P(HypervOver, HandsBackMessagesAndEventsThatKvmForwards) {
  if (GetParam() == HypercallTransport::user) GTEST_SKIP() << "here KVM has none";
  ASSERT_KVM_OK(vm->create_interrupt_controller());
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  ASSERT_KVM_OK(vcpu->enable_hyperv_synic());
  ASSERT_TRUE(hyperv->prepare(*vcpu, *kvm->supported_cpuid(), {.leaves = *full_hv_cpuid(*vcpu)}));
  Code code = introduction();
  hypercall(code, 0x005C, query_output);
  hypercall(code, 0x1'005D, query_output); // fast: connection 0, which is no eventfd's
  hypercall(code, 0x8001, query_output);
  load(code.out(0x11)); // HLT does not come out with an interrupt controller of KVM's
  ASSERT_KVM_OK(start_long_mode(*vcpu));
  EXPECT_TRUE(run_to_end().empty());
  ASSERT_TRUE(ended_by);
  const auto* const call = std::get_if<Hypercall>(&*ended_by);
  ASSERT_NE(call, nullptr) << exit_name(*ended_by);
  EXPECT_EQ(call->control, 0x005CU);
  EXPECT_EQ(call->transport, HypercallTransport::kernel);
  ASSERT_KVM_OK(vcpu->complete_hypercall(0x1234));
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0x1234}));
  const auto* const event = std::get_if<Hypercall>(&*ended_by);
  ASSERT_NE(event, nullptr) << exit_name(*ended_by);
  EXPECT_EQ(event->control, 0x1'005DU);
  EXPECT_EQ(event->transport, HypercallTransport::kernel);
  ASSERT_KVM_OK(vcpu->complete_hypercall(0x5678));
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0x5678, 0}));
  EXPECT_EQ(memory.read<std::uint64_t>(query_output), 1U);
}

TEST_P(HypervOver, RefusesAStateThatNoneCanHave) {
  ASSERT_NO_FATAL_FAILURE(make({}, GetParam()));
  ASSERT_TRUE(hyperv->prepare(*vcpu, *kvm->supported_cpuid()));
  const auto refused = hyperv->restore(*vcpu, {.guest_os_id = 0, .hypercall = 0x5001});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HypervErrc::invalid_state);
}

INSTANTIATE_TEST_SUITE_P(Transports, HypervOver, testing::ValuesIn(transports),
                         [](const testing::TestParamInfo<HypercallTransport>& info) {
                           return std::string(to_string(info.param));
                         });

class HypervCreate : public BareGuestTest {};

TEST_F(HypervCreate, TakesTheKernelsTransportWhereThereIsOne) {
  GuestMemory guest_memory;
  const auto hyperv = Hyperv::create(*vm, guest_memory);
  ASSERT_TRUE(hyperv) << hyperv.error().message();
  EXPECT_EQ(hyperv->transport(), machine_facts().kvm_forwards ? HypercallTransport::kernel
                                 : machine_facts().kvm_hyperv ? HypercallTransport::split
                                                              : HypercallTransport::user);
}

TEST_F(HypervCreate, RefusesTheKernelsTransportWhereThereIsNone) {
  if (machine_facts().kvm_forwards) GTEST_SKIP() << "this KVM forwards extended hypercalls";
  GuestMemory guest_memory;
  const auto refused = Hyperv::create(*vm, guest_memory, {}, HypercallTransport::kernel);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HypervErrc::unsupported);
}

TEST_F(HypervCreate, RefusesTheSplitTransportWithoutKvmsHyperV) {
  if (machine_facts().kvm_hyperv) GTEST_SKIP() << "this KVM has Hyper-V";
  GuestMemory guest_memory;
  const auto refused = Hyperv::create(*vm, guest_memory, {}, HypercallTransport::split);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HypervErrc::unsupported);
}

TEST_F(HypervCreate, RefusesOptionsThatContradictEachOther) {
  GuestMemory guest_memory;
  const auto refused = Hyperv::create(*vm, guest_memory, {.extended_hypercalls = false, .boot_zeroed_memory = true});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HypervErrc::invalid_options);
}

} // namespace
