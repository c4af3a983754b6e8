#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
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

/// OUT with the low half of an MSR in EAX.
void show_msr(Code& code, std::uint32_t msr) { code.mov_ecx(msr).raw({0x0F, 0x32}).out(answer_port); }

/// Sets the Hyper-V interface up.
Code introduction(std::uint64_t page = hypercall_page) {
  Code code;
  wrmsr(code, hv_msr_guest_os_id, 0x8100'0000'0000'0001);
  wrmsr(code, hv_msr_hypercall, page | 1);
  return code;
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
    auto region = Region::adopt(GuestAddress(0), {memory.data(), memory.size(), Backing::anonymous, -1, 0});
    ASSERT_TRUE(region) << region.error().message();
    guest_memory.replace(*MemoryMap::make({*region}));
  }

  void start(const Code& code, HvOptions options = {}) {
    auto made = Hyperv::create(*vm, guest_memory, std::move(options), GetParam());
    ASSERT_TRUE(made) << made.error().message();
    hyperv.emplace(std::move(*made));
    auto created = vm->create_vcpu(0);
    ASSERT_TRUE(created) << created.error().message();
    vcpu.emplace(std::move(*created));
    const auto prepared = hyperv->prepare(*vcpu, *kvm->supported_cpuid());
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

// The statuses that a guest meets are the same over both transports.
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
  EXPECT_EQ(run_to_end(), (std::vector<std::uint64_t>{0, hypercall_page | 1, 1}));
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
  if (GetParam() == HypercallTransport::user) {
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

TEST_P(HypervOver, TakesNoCallBeforeTheGuestSaidWhoItIs) {
  if (GetParam() == HypercallTransport::kernel) GTEST_SKIP() << "a trap that the guest makes by itself is KVM's";
  start(Code().out(user_hypercall_port).hlt());
  EXPECT_TRUE(run_to_end().empty());
  EXPECT_TRUE(ended_with(ExceptionVector::invalid_opcode));
  EXPECT_EQ(hyperv->hypercalls().counts().other, 0U);
}

INSTANTIATE_TEST_SUITE_P(Transports, HypervOver, testing::Values(HypercallTransport::kernel, HypercallTransport::user),
                         [](const testing::TestParamInfo<HypercallTransport>& info) {
                           return std::string(info.param == HypercallTransport::kernel ? "kernel" : "user");
                         });

class HypervCreate : public BareGuestTest {};

TEST_F(HypervCreate, TakesTheKernelsTransportWhereThereIsOne) {
  GuestMemory guest_memory;
  const auto hyperv = Hyperv::create(*vm, guest_memory);
  ASSERT_TRUE(hyperv) << hyperv.error().message();
  EXPECT_EQ(hyperv->transport(), machine_facts().kvm_forwards ? HypercallTransport::kernel : HypercallTransport::user);
}

TEST_F(HypervCreate, RefusesTheKernelsTransportWhereThereIsNone) {
  if (machine_facts().kvm_forwards) GTEST_SKIP() << "this KVM forwards extended hypercalls";
  GuestMemory guest_memory;
  const auto refused = Hyperv::create(*vm, guest_memory, {}, HypercallTransport::kernel);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HvErrc::unsupported);
}

TEST_F(HypervCreate, RefusesOptionsThatContradictEachOther) {
  GuestMemory guest_memory;
  const auto refused = Hyperv::create(*vm, guest_memory, {.extended_hypercalls = false, .boot_zeroed_memory = true});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, HvErrc::invalid_options);
}

} // namespace
