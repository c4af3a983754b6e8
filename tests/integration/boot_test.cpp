#include "linux_guest.hpp"
#include "program.hpp"
#include "tests/support/huge_pages.hpp"
#include "tests/support/machine_facts.hpp"

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <unistd.h>
#include <utility>
#include <vector>

namespace {

using namespace cppvmm::testing;
using nlohmann::json;

constexpr std::uint64_t page = 4096;

Ended boot(const std::vector<std::string>& arguments) { return run_program(CPPVMM_BOOT, arguments); }

/// Runs it and gives the JSON; null, and a failed test, when it does not end well.
json boot_json(std::vector<std::string> arguments) {
  arguments.insert(arguments.end(), {"--json", "-"});
  const Ended ended = boot(arguments);
  EXPECT_EQ(ended.status, 0) << ended.err;
  EXPECT_EQ(ended.err, "");
  const json figures = json::parse(ended.out, nullptr, false);
  EXPECT_FALSE(figures.is_discarded()) << ended.out;
  return ended.status == 0 && !figures.is_discarded() ? figures : json();
}

bool is_one_line(const std::string& text) { return std::ranges::count(text, '\n') == 1 && text.ends_with('\n'); }

std::uint64_t sum(const json& numbers) {
  std::uint64_t total = 0;
  for (const auto& number : numbers)
    total += number.get<std::uint64_t>();
  return total;
}

using Boot = NeedsKvm;

class BootAsking : public Boot, public testing::WithParamInterface<std::tuple<const char*, const char*>> {};

TEST_P(BootAsking, TheAnswerIsTrueAndNearlyComplete) {
  const auto& [backing, cpus] = GetParam();
  const json figures = boot_json({"--memory", "16M", "--backing", backing, "--cpus", cpus, "--audit"});
  ASSERT_FALSE(figures.is_null());

  const std::uint64_t ram = figures["ram_pages"];
  const std::uint64_t reported = figures["reported_pages"];
  const std::uint64_t zeroed = figures["guest_zeroed_pages"];
  // Where the host gives huge pages unasked, these are present as a whole.
  const std::uint64_t huge = figures["transparent_huge_bytes"].get<std::uint64_t>() / page;
  EXPECT_EQ(ram, 4096U);
  const auto& facts = cppvmm::test::machine_facts();
  EXPECT_EQ(figures["hypercalls"], facts.kvm_forwards ? "kernel" : facts.kvm_hyperv ? "split" : "user");
  EXPECT_GE(figures["calls"]["0x8001"], 1);
  EXPECT_GE(figures["calls"]["0x8002"], 1);
  EXPECT_EQ(figures["calls"]["other"], 0);
  EXPECT_EQ(figures["unsound_pages"], 0);
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0);
  EXPECT_LE(figures["missed_zero_pages"], 32 + huge);
  EXPECT_GT(reported + huge, ram * 95 / 100);
  EXPECT_LT(zeroed, ram * 5 / 100 + huge);
  EXPECT_LT(figures["host_resident_bytes"], (ram * 5 / 100 + huge) * page);

  // What the guest makes of it: it is not told that what it lives in is zero, and zeroes exactly the rest.
  const json& guest = figures["guest"];
  EXPECT_EQ(guest["capabilities_result"], 0);
  EXPECT_EQ(guest["capabilities"].get<std::uint64_t>() & 1, 1U);
  EXPECT_EQ(guest["zeroed_memory_result"], 0);
  EXPECT_EQ(guest["lives_in_overlaps"], 0);
  EXPECT_EQ(guest["reported_ranges"], figures["ranges"].size());
  EXPECT_EQ(guest["planned_pages"], zeroed);
  EXPECT_EQ(sum(guest["cpu_zeroed_pages"]), zeroed);
  EXPECT_GT(ram, reported + zeroed);
  EXPECT_LE(ram, reported + zeroed + 32) << "pages that were neither reported, nor zeroed, nor lived in";

  std::uint64_t in_ranges = 0;
  std::uint64_t last = UINT64_MAX;
  for (const auto& range : figures["ranges"]) {
    EXPECT_LE(range[1], last) << "the largest come first";
    last = range[1];
    in_ranges += last;
  }
  EXPECT_EQ(in_ranges, reported);
}

INSTANTIATE_TEST_SUITE_P(All, BootAsking,
                         testing::Combine(testing::Values("anonymous", "memfd"), testing::Values("1", "2")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "With" + std::get<1>(info.param) + "Vcpus";
                         });

/// Data that firmware and loaders left behind: more ranges than the answer has room for.
class BootAfterOthers : public Boot, public testing::WithParamInterface<const char*> {};

TEST_P(BootAfterOthers, TheGuestZeroesWhatIsNotReported) {
  const json figures =
      boot_json({"--memory", "16M", "--cpus", "2", "--leftovers", "400", "--audit", "--backing", GetParam()});
  ASSERT_FALSE(figures.is_null());
  const std::uint64_t ram = figures["ram_pages"];
  const std::uint64_t reported = figures["reported_pages"];
  const std::uint64_t zeroed = figures["guest_zeroed_pages"];
  const std::uint64_t huge = figures["transparent_huge_bytes"].get<std::uint64_t>() / page;
  EXPECT_EQ(figures["unsound_pages"], 0);
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0) << "the guest goes on with data where it expects zeroes";
  EXPECT_GE(zeroed, 390);
  EXPECT_LE(ram, reported + zeroed + 32);
  EXPECT_EQ(sum(figures["guest"]["cpu_zeroed_pages"]), zeroed);
  if (huge == 0) {
    EXPECT_EQ(figures["ranges"].size(), 255U) << "all that an answer can hold";
    EXPECT_GT(reported, (ram - 400) * 255 / 400 * 95 / 100);
  }
}

INSTANTIATE_TEST_SUITE_P(All, BootAfterOthers, testing::Values("anonymous", "memfd"),
                         [](const auto& info) { return std::string(info.param); });

TEST_F(Boot, WithoutHypercallsTheGuestZeroesEverything) {
  const json figures =
      boot_json({"--memory", "8M", "--cpus", "2", "--hypercalls", "off", "--audit", "--leftovers", "100"});
  ASSERT_FALSE(figures.is_null());
  const std::uint64_t ram = figures["ram_pages"];
  EXPECT_EQ(figures["hypercalls"], "off");
  EXPECT_EQ(figures["calls"], json({{"0x8001", 0}, {"0x8002", 0}, {"0x8003", 0}, {"other", 0}}));
  EXPECT_EQ(figures["ranges"], json::array());
  EXPECT_EQ(figures["reported_pages"], 0);
  EXPECT_TRUE(figures["unsound_pages"].is_null()) << "there was no answer to audit";
  EXPECT_GT(figures["guest_zeroed_pages"], ram * 95 / 100);
  EXPECT_EQ(sum(figures["guest"]["cpu_zeroed_pages"]), figures["guest_zeroed_pages"]);
  EXPECT_GT(figures["host_resident_bytes"], ram * page * 95 / 100);
  for (const auto& seen : figures["guest"]["seen"])
    EXPECT_EQ(seen, "hypervisor") << "without Hyper-V, KVM may still show its own presence";
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0);
}

TEST_F(Boot, WithTheAnswerTheGuestTakesNoMoreMemoryThanAnIdleOne) {
  const json idle = boot_json({"--memory", "8M", "--backing", "memfd", "--hypercalls", "off", "--guest", "idle"});
  ASSERT_FALSE(idle.is_null());
  EXPECT_EQ(idle["guest_zeroed_pages"], 0);
  const json asks = boot_json({"--memory", "8M", "--backing", "memfd"});
  ASSERT_FALSE(asks.is_null());
  EXPECT_LE(asks["host_resident_bytes"].get<double>(), idle["host_resident_bytes"].get<double>() * 1.02);
  for (const json& run : {idle, asks}) {
    ASSERT_EQ(run["vcpu_us"].size(), 1U);
    EXPECT_GT(run["vcpu_us"][0], 0);
  }
}

/// What the guest lives in, and what the program takes meanwhile. A sanitizer keeps what was freed for a while.
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr std::uint64_t beside = std::uint64_t{64} << 20;
#else
constexpr std::uint64_t beside = std::uint64_t{6} << 20;
#endif

/// A guest that keeps 8 MiB of its 32 and gives the rest back once it is up, by transport, backing and number of vCPUs.
class BootWithABalloon : public Boot,
                         public testing::WithParamInterface<std::tuple<const char*, const char*, const char*>> {
protected:
  static constexpr std::uint64_t memory = std::uint64_t{32} << 20;
  static constexpr std::uint64_t target = std::uint64_t{8} << 20;
  /// Null where there is no such transport.
  static json run(std::vector<std::string> more) {
    const auto& [transport, backing, cpus] = GetParam();
    more.insert(more.end(), {"--memory", "32M", "--balloon-target", "8M", "--thp", "never", "--hypercalls", transport,
                             "--backing", backing, "--cpus", cpus, "--json", "-"});
    const Ended ended = boot(more);
    if (lacks_transport(ended)) return {};
    EXPECT_EQ(ended.status, 0) << ended.err;
    json figures = json::parse(ended.out, nullptr, false);
    EXPECT_FALSE(figures.is_discarded()) << ended.out;
    if (ended.status != 0 || figures.is_discarded()) return {};
    EXPECT_EQ(figures["hypercalls"], transport);
    return figures;
  }

  /// It has sent what is beyond its target, in lists that were all done.
  static void expect_given_back(const json& figures) {
    const json& guest = figures["guest"];
    const std::uint64_t given = guest["given_back_pages"];
    EXPECT_LE(given + target / page, figures["ram_pages"]);
    EXPECT_GE(given + target / page + 64, figures["ram_pages"]) << "but for what it lives in";
    EXPECT_GE(guest["give_back_calls"], 1);
    EXPECT_GE(figures["calls"]["0x8003"], guest["give_back_calls"]);
    EXPECT_EQ(guest["give_back_failures"], 0);
    EXPECT_EQ(guest["give_back_result"].get<std::uint64_t>() & 0xFFFF, 0U);
    EXPECT_EQ(figures["heat"]["discard_pages"], given);
    EXPECT_EQ(figures["heat"]["freed_pages"], given);
    EXPECT_EQ(figures["heat"]["kept_pages"], 0);
    EXPECT_EQ(figures["balloon_target_bytes"], target);
  }
};

TEST_P(BootWithABalloon, ThatWasToldOfZeroedMemoryNeverTakesTheRest) {
  const json figures = run({"--audit"});
  if (figures.is_null()) GTEST_SKIP() << "this KVM lacks the transport";
  expect_given_back(figures);
  EXPECT_EQ(figures["unsound_pages"], 0);
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0);
  ASSERT_FALSE(figures["host_peak_bytes"].is_null());
  EXPECT_LT(figures["host_peak_bytes"], target + beside);
  EXPECT_LE(figures["host_resident_bytes"], figures["host_peak_bytes"]);
}

TEST_P(BootWithABalloon, ThatWasNotToldTakesAllOfItFirst) {
  const json figures = run({"--audit", "--enlightenments", "hv-memory-hint"});
  if (figures.is_null()) GTEST_SKIP() << "this KVM lacks the transport";
  expect_given_back(figures);
  EXPECT_EQ(figures["calls"]["0x8002"], 0);
  EXPECT_GT(figures["guest_zeroed_pages"], memory / page * 95 / 100);
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0);
  ASSERT_FALSE(figures["host_peak_bytes"].is_null());
  EXPECT_GT(figures["host_peak_bytes"], memory * 95 / 100);
  EXPECT_LT(figures["host_peak_bytes"], memory + beside);
  EXPECT_LT(figures["host_resident_bytes"], target + beside) << "what it gave back is the host's again";
  EXPECT_GE(figures["host_resident_bytes"], target);
}

TEST_P(BootWithABalloon, GivesBackWhatWasPresentBefore) {
  const json figures = run({"--populate"});
  if (figures.is_null()) GTEST_SKIP() << "this KVM lacks the transport";
  expect_given_back(figures);
  ASSERT_FALSE(figures["host_peak_bytes"].is_null());
  EXPECT_GE(figures["host_peak_bytes"], memory) << "it was there when the vCPUs started";
  EXPECT_LT(figures["host_resident_bytes"], target + beside);
}

INSTANTIATE_TEST_SUITE_P(All, BootWithABalloon,
                         testing::Combine(testing::Values("kernel", "split", "user"),
                                          testing::Values("anonymous", "memfd"), testing::Values("1", "3")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "_" + std::get<1>(info.param) + "_with_" +
                                  std::get<2>(info.param) + "_vcpus";
                         });

TEST_F(Boot, WithABalloonSendsListsFromEachVcpuUntilAllIsGivenBack) {
  const json figures = boot_json({"--memory", "3200M", "--cpus", "4", "--balloon-target", "10M", "--audit"});
  ASSERT_FALSE(figures.is_null());
  const json& guest = figures["guest"];
  const std::uint64_t given = guest["given_back_pages"];
  EXPECT_LE(given + (10 << 20) / page, figures["ram_pages"]);
  EXPECT_GE(given + (10 << 20) / page + 64, figures["ram_pages"]) << "above the gap too";
  EXPECT_GE(guest["give_back_calls"], 3200 / 128);
  EXPECT_EQ(guest["give_back_failures"], 0);
  EXPECT_EQ(figures["heat"]["discard_pages"], given) << "each page once";
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0);
}

TEST_F(Boot, GivesBackInEachBootAndHasOneRamAtMost) {
  const json figures = boot_json({"--memory", "16M", "--balloon-target", "4M", "--thp", "never", "--resets", "2",
                                  "--audit", "--enlightenments", "hv-memory-hint"});
  ASSERT_FALSE(figures.is_null());
  const std::uint64_t given = figures["guest"]["given_back_pages"];
  EXPECT_GT(given, (std::uint64_t{11} << 20) / page);
  EXPECT_EQ(figures["heat"]["discard_pages"], 3 * given);
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0);
  ASSERT_FALSE(figures["host_peak_bytes"].is_null());
  EXPECT_GT(figures["host_peak_bytes"], 15 << 20);
  EXPECT_LT(figures["host_peak_bytes"], (16 << 20) + beside);
}

TEST_F(Boot, WithoutABalloonTargetGivesNothingBack) {
  const json figures = boot_json({"--memory", "4M"});
  ASSERT_FALSE(figures.is_null());
  EXPECT_EQ(figures["guest"]["give_back_calls"], 0);
  EXPECT_TRUE(figures["guest"]["give_back_result"].is_null());
  EXPECT_TRUE(figures["balloon_target_bytes"].is_null());
  EXPECT_EQ(figures["calls"]["0x8003"], 0);
}

TEST_F(Boot, MemoryAboveTheGapIsReportedAndZeroedToo) {
  const json figures = boot_json({"--memory", "3080M", "--backing", "memfd"});
  ASSERT_FALSE(figures.is_null());
  constexpr std::uint64_t four_gib = (std::uint64_t{4} << 30) / page;
  EXPECT_TRUE(std::ranges::any_of(figures["ranges"], [](const json& range) { return range[0] >= four_gib; }));
  EXPECT_EQ(figures["regions"].size(), 2U);
  EXPECT_GT(figures["reported_pages"], figures["ram_pages"].get<std::uint64_t>() * 99 / 100);
}

TEST_F(Boot, BothTransportsGiveTheGuestTheSame) {
  const Ended kernel = boot({"--memory", "8M", "--hypercalls", "kernel", "--json", "-"});
  if (!cppvmm::test::machine_facts().kvm_forwards) {
    EXPECT_EQ(kernel.status, 1);
    EXPECT_TRUE(is_one_line(kernel.err) && kernel.err.starts_with("cppvmm-boot: --hypercalls kernel: ")) << kernel.err;
    GTEST_SKIP() << "this KVM forwards no extended hypercalls";
  }
  ASSERT_EQ(kernel.status, 0) << kernel.err;
  const json by_kernel = json::parse(kernel.out);
  const json by_user = boot_json({"--memory", "8M", "--hypercalls", "user"});
  ASSERT_FALSE(by_user.is_null());
  EXPECT_EQ(by_kernel["hypercalls"], "kernel");
  EXPECT_EQ(by_user["hypercalls"], "user");
  EXPECT_EQ(by_kernel["guest"], by_user["guest"]);
  EXPECT_EQ(by_kernel["ranges"], by_user["ranges"]);
  EXPECT_EQ(by_kernel["calls"], by_user["calls"]);
}

TEST_F(Boot, AnEnlightenmentThatCannotBeHadIsOneLine) {
  const Ended ended =
      boot({"--memory", "8M", "--hypercalls", "user", "--enlightenments", "hv-synic,hv-boot-zeroed-mem"});
  EXPECT_EQ(ended.status, 1);
  EXPECT_TRUE(is_one_line(ended.err) && ended.err.starts_with("cppvmm-boot: --enlightenments: there is no hv-synic"))
      << ended.err;
}

/// Over each transport, a guest of a size whose audit takes a while.
class BootOver : public Boot, public testing::WithParamInterface<std::tuple<const char*, const char*, const char*>> {};

TEST_P(BootOver, TheAnswerIsSoundAndTheGuestIsRight) {
  const auto& [transport, backing, cpus] = GetParam();
  std::optional<cppvmm::test::HugePagePool> pool;
  if (std::string_view(backing) == "hugetlb") {
    auto taken = cppvmm::test::HugePagePool::take();
    if (!taken) GTEST_SKIP() << taken.error();
    pool.emplace(std::move(*taken));
  }
  const Ended ended = boot({"--memory", std::string_view(backing) == "hugetlb" ? "32M" : "256M", "--audit", "--json",
                            "-", "--hypercalls", transport, "--backing", backing, "--cpus", cpus});
  if (lacks_transport(ended)) GTEST_SKIP() << "this KVM lacks the transport";
  ASSERT_EQ(ended.status, 0) << ended.err;
  const json figures = json::parse(ended.out);
  EXPECT_EQ(figures["hypercalls"], transport);
  EXPECT_EQ(figures["unsound_pages"], 0);
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0);
  EXPECT_EQ(figures["host_peak_bytes"].is_null(), std::string_view(backing) == "hugetlb") << "no RSS tells of the pool";
}

INSTANTIATE_TEST_SUITE_P(All, BootOver,
                         testing::Combine(testing::Values("kernel", "split", "user"),
                                          testing::Values("anonymous", "memfd", "hugetlb"), testing::Values("1", "2")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "_" + std::get<1>(info.param) + "_with_" +
                                  std::get<2>(info.param) + "_vcpus";
                         });

/// Every kind of memory, as it is and present as a whole, with each way to an exact answer.
class BootWith : public Boot, public testing::WithParamInterface<std::tuple<const char*, const char*>> {
protected:
  void SetUp() override {
    Boot::SetUp();
    if (IsSkipped()) return;
    if (!is_huge()) return;
    auto taken = cppvmm::test::HugePagePool::take();
    if (!taken) GTEST_SKIP() << taken.error();
    pool.emplace(std::move(*taken));
  }

  [[nodiscard]] static std::string backing() { return std::get<0>(GetParam()); }
  [[nodiscard]] static std::string way() { return std::get<1>(GetParam()); }
  [[nodiscard]] static bool is_huge() { return backing().starts_with("hugetlb"); }
  [[nodiscard]] static bool is_file() { return backing().ends_with("file"); }

  /// Of the folder that the program makes its files in.
  [[nodiscard]] static cppvmm::test::FileFacts files() {
    const char* const folder = std::getenv("TMPDIR");
    if (folder != nullptr && *folder != '\0') return cppvmm::test::file_facts(folder);
    return cppvmm::test::file_facts(access("/var/tmp", W_OK) == 0 ? "/var/tmp" : "/tmp");
  }

  /// The figures of a run with `way` but for kinds of memory that have no such thing, where the refusal is one line.
  [[nodiscard]] static json run(const std::vector<std::string>& more) {
    std::vector<std::string> arguments{"--memory", "16M", "--backing", backing(), "--audit", "--json", "-"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Ended ended = boot(arguments);
    if (ended.status == 0) return json::parse(ended.out);
    EXPECT_TRUE(is_one_line(ended.err)) << ended.err;
    return {{"refused", ended.err}};
  }

  std::optional<cppvmm::test::HugePagePool> pool;
};

TEST_P(BootWith, TheAnswerIsSoundAndAsCompleteAsItCanBe) {
  std::vector<std::string> options;
  if (way() != "nothing") options = {"--populate", "--" + way()};
  if (way() == "populate") options.pop_back();
  const json figures = run(options);
  if (figures.contains("refused")) {
    const auto why = figures["refused"].get<std::string>();
    if (backing() == "shared-file" && (files().in_memory || !files().named_by_fstat)) GTEST_SKIP() << why;
    if (way() == "write-watch" && is_file()) {
      EXPECT_NE(why.find("--write-watch"), std::string::npos) << why;
      return;
    }
    if (way() == "write-watch" && !cppvmm::test::machine_facts().async_write_protect) GTEST_SKIP() << why;
    FAIL() << why;
  }
  EXPECT_EQ(figures["unsound_pages"], 0);
  EXPECT_EQ(figures["nonzero_pages_at_end"], 0);
  const std::uint64_t missed = figures["missed_zero_pages"];
  const std::uint64_t huge = figures["transparent_huge_bytes"].get<std::uint64_t>() / page;
  const json& region = figures["regions"][0];
  EXPECT_EQ(region["backing"], std::string(backing() == "shared-anonymous" ? "shared_anonymous"
                                           : backing() == "hugetlb-memfd"  ? "hugetlb_memfd"
                                           : backing() == "private-file"   ? "private_file"
                                           : backing() == "shared-file"    ? "shared_file"
                                                                           : backing()));
  const bool has_evidence = !(backing() == "shared-anonymous" && !cppvmm::test::machine_facts().map_files) &&
                            !(backing() == "shared-file" && !cppvmm::test::machine_facts().cachestat) &&
                            !(is_file() && !files().tell_the_truth());
  EXPECT_EQ(region["evidence"] != "none", has_evidence) << region;
  if (!has_evidence && way() != "content-check")
    GTEST_SKIP() << "no evidence here for " << backing() << ": " << region["error"];
  if (way() == "nothing")
    EXPECT_LE(missed, (is_huge() ? 512 : 32) + huge);
  else if (way() == "populate" || (way() == "dirty-log" && is_file()))
    EXPECT_GT(missed, 4000U) << "all of it is present";
  else if (way() == "write-watch" && is_huge())
    EXPECT_LE(missed, 512U) << "a write watch tells huge pages alone";
  else
    EXPECT_EQ(missed, 0U) << region;
  EXPECT_EQ(region["write_watch"].is_null(), way() != "write-watch");
  EXPECT_EQ(region["content_check"].is_null(), way() != "content-check");
  EXPECT_EQ(region["dirty_log"].is_null(), way() != "dirty-log" || is_file());
}

INSTANTIATE_TEST_SUITE_P(All, BootWith,
                         testing::Combine(testing::Values("anonymous", "memfd", "shared-anonymous", "hugetlb",
                                                          "hugetlb-memfd", "private-file", "shared-file"),
                                          testing::Values("nothing", "populate", "write-watch", "dirty-log",
                                                          "content-check")),
                         [](const auto& info) {
                           std::string name = std::string(std::get<0>(info.param)) + "_and_" + std::get<1>(info.param);
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

TEST_F(Boot, KeepsHugePagesOffUntilTheAnswerAndHasThemFromThenOn) {
  // So much that the guest zeroes enough afterwards for a huge page to come.
  const json kept_off = boot_json({"--memory", "16M", "--thp", "after-answer", "--leftovers", "2000", "--audit"});
  ASSERT_FALSE(kept_off.is_null());
  EXPECT_EQ(kept_off["transparent_huge_bytes"], 0) << "at the answer";
  EXPECT_EQ(kept_off["unsound_pages"], 0);
  const json always = boot_json({"--memory", "16M", "--thp", "always", "--audit"});
  ASSERT_FALSE(always.is_null());
  if (!cppvmm::test::machine_facts().gives_huge_pages) GTEST_SKIP() << "the kernel gives no huge pages";
  EXPECT_GT(always["transparent_huge_bytes"], 0);
  EXPECT_GT(always["missed_zero_pages"], 256);
  const json exact = boot_json({"--memory", "16M", "--thp", "always", "--content-check", "--audit"});
  ASSERT_FALSE(exact.is_null());
  EXPECT_EQ(exact["missed_zero_pages"], 0);
  EXPECT_EQ(exact["unsound_pages"], 0);
}

TEST_F(Boot, TheDirtyLogOfSeveralVcpusProvesNothing) {
  const json figures = boot_json({"--memory", "16M", "--cpus", "2", "--populate", "--dirty-log", "--audit"});
  ASSERT_FALSE(figures.is_null());
  EXPECT_EQ(figures["reported_pages"], 0) << "a vCPU that runs may have stores that are not in the log yet";
  EXPECT_TRUE(figures["regions"][0]["dirty_log"].is_null());
}

TEST_F(Boot, TheDirtyLogTellsWhoWrote) {
  const auto file = std::filesystem::path(testing::TempDir()) / ("who-" + std::to_string(getpid()) + ".svg");
  const Ended ended = boot({"--memory", "16M", "--dirty-log", "--map", file.string()});
  std::filesystem::remove(file);
  ASSERT_EQ(ended.status, 0) << ended.err;
  EXPECT_NE(ended.out.find("guest"), std::string::npos);
  EXPECT_NE(ended.out.find("dirty_log"), std::string::npos) << ended.out;
}

TEST_F(Boot, TheJsonFileHoldsEveryDocumentedField) {
  const auto file = std::filesystem::path(testing::TempDir()) / ("boot-" + std::to_string(getpid()) + ".json");
  const Ended ended = boot({"--memory", "4M", "--json", file.string()});
  ASSERT_EQ(ended.status, 0) << ended.err;
  EXPECT_NE(ended.out.find("reported"), std::string::npos) << "a person gets lines: " << ended.out;
  std::string text(std::filesystem::file_size(file), '\0');
  const int fd = open(file.c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_EQ(read(fd, text.data(), text.size()), static_cast<ssize_t>(text.size()));
  close(fd);
  std::filesystem::remove(file);
  const json figures = json::parse(text);
  for (const char* field :
       {"memory_bytes", "cpus", "backing", "hypercalls", "calls", "ranges", "ram_pages", "touched_pages",
        "reported_pages", "reported_pages_by_2_mib", "unsound_pages", "missed_zero_pages", "survey_us",
        "guest_zeroed_pages", "host_resident_bytes", "host_peak_bytes", "vcpu_ticks", "wall_ms"})
    EXPECT_TRUE(figures.contains(field)) << field;
  EXPECT_LE(figures["reported_pages_by_2_mib"], figures["reported_pages"]);
  EXPECT_EQ(figures["memory_bytes"], 4 << 20);
  EXPECT_EQ(figures["cpus"], 1);
  EXPECT_EQ(figures["backing"], "anonymous");
  EXPECT_TRUE(figures["unsound_pages"].is_null()) << "there was no audit";
  EXPECT_TRUE(figures["missed_zero_pages"].is_null());
  EXPECT_EQ(figures["vcpu_ticks"].size(), 1U);
  EXPECT_EQ(figures["vcpu_ticks"][0].size(), 2U);
  EXPECT_NE(figures["regions"][0]["evidence"], "none");
}

TEST_F(Boot, AJsonFileThatCannotBeWrittenIsOneLine) {
  const Ended ended = boot({"--memory", "4M", "--json", "/nonexistent/boot.json"});
  EXPECT_EQ(ended.status, 1);
  EXPECT_EQ(ended.err, "cppvmm-boot: cannot write /nonexistent/boot.json\n");
}

TEST_F(Boot, ThePictureHasEveryPageOfRam) {
  const auto file = std::filesystem::path(testing::TempDir()) / ("boot-" + std::to_string(getpid()) + ".svg");
  const Ended ended = boot({"--memory", "16M", "--leftovers", "3", "--audit", "--map", file.string()});
  ASSERT_EQ(ended.status, 0) << ended.err;
  EXPECT_EQ(ended.err, "");
  std::ifstream stream(file);
  const std::string svg{std::istreambuf_iterator<char>(stream), {}};
  std::filesystem::remove(file);

  EXPECT_TRUE(svg.starts_with("<svg xmlns=")) << svg;
  EXPECT_TRUE(svg.ends_with("</svg>\n")) << svg;
  EXPECT_NE(svg.find("audit: 0 unsound"), std::string::npos) << svg;
  const std::regex kind("<g data-kind=\"([a-zA-Z ]+)\" data-pages=\"([0-9]+)\">");
  std::map<std::string, std::uint64_t> pages;
  for (auto match = std::sregex_iterator(svg.begin(), svg.end(), kind); match != std::sregex_iterator(); ++match)
    pages[(*match)[1]] = std::stoull((*match)[2]);
  std::uint64_t ram = 0;
  for (const auto& [word, count] : pages)
    ram += count;
  EXPECT_EQ(ram, 4096U) << "this much has no hole";
  for (const char* word : {"zeroed", "host", "guest", "device", "unknown"})
    EXPECT_TRUE(pages.contains(word)) << word;
  EXPECT_GT(pages["zeroed"], 0U);
  EXPECT_LT(pages["zeroed"], 4096U);

  const auto usual = ended.out.find("memory      16.0 MiB");
  const auto picture = ended.out.find("\n\nGuest memory: 16 MiB, anonymous\n");
  EXPECT_EQ(usual, 0U) << ended.out;
  ASSERT_NE(picture, std::string::npos) << ended.out;
  for (const char* part : {"+0 ", "     0  ", "15 MiB  ", "  UU  unknown ", "one character is 16 KiB"})
    EXPECT_NE(ended.out.find(part, picture), std::string::npos) << part << ended.out;
  EXPECT_EQ(ended.out.find('\033'), std::string::npos) << "a file has no colours";
}

TEST_F(Boot, ThePictureIsNotMixedIntoJson) {
  const auto file = std::filesystem::path(testing::TempDir()) / ("boot-json-" + std::to_string(getpid()) + ".svg");
  const json figures = boot_json({"--memory", "4M", "--map", file.string()});
  EXPECT_FALSE(figures.is_null());
  EXPECT_TRUE(std::filesystem::remove(file));
}

TEST_F(Boot, APictureThatCannotBeWrittenIsOneLine) {
  const Ended ended = boot({"--memory", "4M", "--map", "/nonexistent/boot.svg"});
  EXPECT_EQ(ended.status, 1);
  EXPECT_EQ(ended.err, "cppvmm-boot: cannot write /nonexistent/boot.svg\n");
}

TEST_F(Boot, TheHostMemoryLogHasTheAnswerAndTheEnd) {
  const File log("host-memory", "");
  const json figures = boot_json({"--memory", "16M", "--leftovers", "100", "--host-memory-log", log.path()});
  ASSERT_FALSE(figures.is_null());
  std::istringstream lines(contents(log.path()));
  std::vector<std::uint64_t> times;
  std::vector<std::uint64_t> bytes;
  std::vector<std::uint64_t> at_answers;
  for (std::string line; std::getline(lines, line);) {
    std::smatch parts;
    ASSERT_TRUE(std::regex_match(line, parts, std::regex("([0-9]+) ([0-9]+)( answer)?"))) << line;
    times.push_back(std::stoull(parts[1]));
    bytes.push_back(std::stoull(parts[2]));
    if (parts[3].matched) at_answers.push_back(bytes.back());
  }
  EXPECT_TRUE(std::ranges::is_sorted(times));
  EXPECT_EQ(at_answers.size(), figures["answers_given"]);
  ASSERT_FALSE(at_answers.empty());
  EXPECT_GE(at_answers.front(), 100 * page) << "the leftovers";
  EXPECT_EQ(bytes.back(), figures["host_resident_bytes"]);
}

TEST_F(Boot, AHostMemoryLogThatCannotBeWrittenIsOneLine) {
  const Ended ended = boot({"--memory", "4M", "--host-memory-log", "/nonexistent/log"});
  EXPECT_EQ(ended.status, 1);
  EXPECT_EQ(ended.err, "cppvmm-boot: cannot write /nonexistent/log\n");
}

TEST_F(Boot, WithoutAnAnswerThereIsNothingToDraw) {
  const auto file = std::filesystem::path(testing::TempDir()) / ("boot-none-" + std::to_string(getpid()) + ".svg");
  const Ended ended = boot({"--memory", "4M", "--hypercalls", "off", "--map", file.string()});
  EXPECT_EQ(ended.status, 0);
  EXPECT_EQ(ended.err, "cppvmm-boot: --map: the guest never asked, so there is nothing to draw\n");
  EXPECT_EQ(ended.out.find("Guest memory"), std::string::npos) << ended.out;
  EXPECT_FALSE(std::filesystem::remove(file));
}

class BootInterrupted : public Boot, public testing::WithParamInterface<int> {};

TEST_P(BootInterrupted, EndsCleanlyAndWritesNoFigures) {
  const auto file = std::filesystem::path(testing::TempDir()) / ("interrupted-" + std::to_string(getpid()) + ".json");
  // Long enough on any machine to be met at work.
  Program program(CPPVMM_BOOT, {"--memory", "8G", "--cpus", "2", "--hypercalls", "off", "--json", file.string()},
                  Stderr::terminal);
  ASSERT_TRUE(program.wait_for_stderr("the guest zeroes its memory")) << program.wait().err;
  ASSERT_EQ(kill(program.pid(), GetParam()), 0);
  const Ended ended = program.wait();
  EXPECT_EQ(ended.status, 128 + GetParam()) << ended.err;
  EXPECT_NE(ended.err.find("cppvmm-boot: interrupted"), std::string::npos) << ended.err;
  EXPECT_EQ(ended.out, "");
  EXPECT_FALSE(std::filesystem::exists(file));
}

INSTANTIATE_TEST_SUITE_P(Signals, BootInterrupted, testing::Values(SIGINT, SIGTERM),
                         [](const auto& info) { return info.param == SIGINT ? "Interrupt" : "Terminate"; });

} // namespace
