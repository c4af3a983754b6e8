#include "linux_guest.hpp"
#include "program.hpp"
#include "tests/support/machine_facts.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <unistd.h>
#include <vector>

// What cppvmm-boot --trace has of a guest that asks, over each transport.

namespace {

using namespace cppvmm::testing;
using nlohmann::json;

class BootTraced : public NeedsKvm, public testing::WithParamInterface<const char*> {
protected:
  BootTraced() : path(std::filesystem::temp_directory_path() / ("cppvmm-boot-trace-" + std::to_string(getpid()))) {}
  void TearDown() override { std::filesystem::remove(path); }

  void SetUp() override {
    NeedsKvm::SetUp();
    if (IsSkipped()) return;
    const auto& facts = cppvmm::test::machine_facts();
    if (transport == "kernel" && !facts.kvm_forwards) GTEST_SKIP() << "this KVM does not forward extended hypercalls";
    if (transport == "split" && !facts.kvm_hyperv) GTEST_SKIP() << "this KVM has no Hyper-V";
  }

  /// The events of one kind.
  [[nodiscard]] static std::vector<json> of(const std::vector<json>& events, const char* kind) {
    std::vector<json> some;
    std::ranges::copy_if(events, std::back_inserter(some), [&](const json& event) { return event["event"] == kind; });
    return some;
  }

  const std::string transport = GetParam();
  const std::filesystem::path path;
};

TEST_P(BootTraced, HasAllThatTheGuestSawAndAsked) {
  const Ended ended = run_program(CPPVMM_BOOT, {"--memory", "16M", "--cpus", "2", "--hypercalls", transport, "--resets",
                                                "1", "--json", "-", "--trace", path.string()});
  ASSERT_EQ(ended.status, 0) << ended.err;
  const json figures = json::parse(ended.out);
  std::vector<json> events;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    events.push_back(json::parse(line));
  ASSERT_FALSE(events.empty());
  EXPECT_EQ(events[0]["event"], "trace");

  const auto boots = of(events, "boot");
  ASSERT_EQ(boots.size(), 2U);
  EXPECT_EQ(boots[1]["number"], 2);
  EXPECT_EQ(boots[1]["hypercalls"], transport);

  int offers = 0; // by vCPU and boot
  for (const json& leaf : of(events, "cpuid"))
    if (leaf["leaf"] == "0x40000003" && (std::stoul(leaf["ebx"].get<std::string>(), nullptr, 0) >> 20 & 1) != 0)
      ++offers;
  EXPECT_EQ(offers, 4);

  const auto msrs = of(events, "msr");
  const auto touches = [&](const char* index, const char* access) {
    return std::ranges::count_if(msrs, [&](const json& msr) {
      return msr["msr"] == index && msr["access"] == access && msr["value"] != "0x0" && msr["refused"] == false;
    });
  };
  // Of KVM's own MSRs there is what they hold when a vCPU calls first, and in the end that of both, for each boot.
  const bool is_held = transport == "kernel";
  const int times = is_held ? 2 * (1 + 2) : 2;
  EXPECT_EQ(touches("0x40000000", is_held ? "held" : "write"), times);
  EXPECT_EQ(touches("0x40000001", is_held ? "held" : "write"), times);
  EXPECT_EQ(std::ranges::any_of(msrs, [](const json& msr) { return msr["access"] == "held"; }), transport != "user");

  const auto answers = of(events, "ranges");
  ASSERT_EQ(answers.size(), 2U);
  const json& last = answers[1];
  std::uint64_t reported = 0;
  for (const json& range : last["ranges"])
    reported += range[1].get<std::uint64_t>();
  EXPECT_EQ(reported, figures["reported_pages"]);
  EXPECT_EQ(last["ranges"].size(), figures["ranges"].size());
  EXPECT_EQ(last["ram_pages"], figures["ram_pages"]);

  int asked = 0;
  for (const json& call : of(events, "call")) {
    EXPECT_EQ(call["result"], "0x0") << call;
    EXPECT_GT(call["us"], 0.0);
    if (call["control"] == "0x8002") ++asked;
  }
  EXPECT_EQ(asked, 2);
}

INSTANTIATE_TEST_SUITE_P(Over, BootTraced, testing::Values("kernel", "split", "user"),
                         [](const auto& info) { return std::string(info.param); });

} // namespace
