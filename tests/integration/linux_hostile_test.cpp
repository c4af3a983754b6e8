// A Linux guest whose kernel makes the calls of a broken or hostile one: tests/guests/linux/hostile_calls.c, which
// knows what each must come to. Here it is seen that the VMM stays what it was, and has counted each call.
#include "linux_guest.hpp"
#include "program.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <gtest/gtest.h>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CPPVMM_SANITIZED 1
#endif
#endif

namespace {

using namespace cppvmm::testing;
using nlohmann::json;

/// Boots Linux with one processor or more, and loads the module once for each of `loads` (its parameters).
class LinuxHostile : public LinuxLoads {
protected:
  [[nodiscard]] std::vector<std::string> arguments(const File& initrd, const std::string& transport,
                                                   const std::string& cpus, const std::vector<std::string>& more,
                                                   const std::string& enlightenments = "minimal") const {
    std::vector<std::string> all = {
        "--memory", "256M", "--cpus", cpus, "--hypercalls", transport, "--enlightenments", enlightenments, "--kernel",
        kernel, "--initrd", initrd.path(), "--append",
        // Linux would write zeros to pages that it allocates, so that none stayed untouched.
        std::string(linux_command_line) + "pci init_on_alloc=0", "--json", "-"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }

  [[nodiscard]] std::string file_system(const std::string& transport, const std::vector<std::string>& loads) const {
    std::vector<std::string> commands;
    for (const std::string& parameters : loads)
      commands.push_back("insmod /hostile_calls.ko way=" + transport + " " + parameters +
                         "\n$busybox rmmod hostile_calls");
    return file_system(commands, module("hostile_calls"));
  }

  [[nodiscard]] std::string file_system(const std::vector<std::string>& commands, const GuestFile& loaded) const {
    std::string init = "#!/bin/busybox sh\nbusybox=/bin/busybox\n$busybox mount -t proc proc /proc\n";
    for (const std::string& command : commands)
      init += "$busybox " + command + "\n";
    init += "$busybox dmesg | $busybox grep -E 'Oops|BUG:|soft lockup|detected stall|unchecked MSR' "
            "| $busybox grep -v 'WRMSR to 0x40000073'\n$busybox reboot -f\n";
    return initial_file_system(contents(busybox), init, {loaded});
  }

  /// That guest and VMM came through it, all that the module checked holds, and the VMM has counted what the module has
  /// made and Linux itself at boot. The lines of the module.
  static std::vector<json> expect_survived(const Ended& ended, std::size_t loads) {
    const std::string& console = ended.err;
    EXPECT_EQ(ended.status, 0) << console;
    for (const char* trouble : {"Kernel panic", "Oops", "BUG:", "soft lockup", "detected stall", "unchecked MSR"})
      EXPECT_EQ(console.find(trouble), std::string::npos) << console;

    std::vector<json> lines = module_results(console);
    std::uint64_t done = 0;
    json calls = {{"0x8001", 1}, {"0x8002", 0}, {"other", 0}};
    for (const json& line : lines) {
      EXPECT_FALSE(line.contains("wrong")) << line;
      if (!line.contains("done")) continue;
      ++done;
      EXPECT_EQ(line["error"], 0) << line;
      EXPECT_EQ(line["failed"], 0) << line;
      EXPECT_GT(line["checks"], 0) << line;
      for (auto& [code, count] : calls.items())
        count = count.get<std::uint64_t>() + line["calls"].value(code, std::uint64_t{0});
    }
    EXPECT_EQ(done, loads) << console;

    json figures = json::parse(ended.out, nullptr, false);
    EXPECT_FALSE(figures.is_discarded()) << ended.out;
    if (figures.is_discarded()) return lines;
    // To the module, a call that is not offered is like any other.
    json& counted = figures["calls"];
    counted["other"] = counted["other"].get<std::uint64_t>() + counted["0x8003"].get<std::uint64_t>();
    counted.erase("0x8003");
    EXPECT_EQ(counted, calls);
    return lines;
  }

  /// The last line of the module that says it is done with `mode`.
  [[nodiscard]] static json done(const std::vector<json>& lines, const std::string& mode) {
    const auto found = std::ranges::find_if(
        lines, [&](const json& line) { return line.value("mode", "") == mode && line.contains("done"); });
    return found == lines.end() ? json::object() : *found;
  }
};

/// By transport, and what the VMM is told of its memory.
class LinuxThrows : public LinuxHostile,
                    public testing::WithParamInterface<std::tuple<const char*, std::vector<std::string>>> {};

TEST_P(LinuxThrows, EveryBadCallHasItsStatusAndNoOutputPageIsReported) {
  const std::string transport = std::get<0>(GetParam());
  const File initrd("initrd", file_system(transport, {"mode=table", "mode=reuse"}));
  const Ended ended =
      run_linux([&] { return run_program(CPPVMM_BOOT, arguments(initrd, transport, "1", std::get<1>(GetParam()))); });
  if (lacks_transport(ended)) GTEST_SKIP() << "this KVM lacks the transport";
  const std::vector<json> lines = expect_survived(ended, 2);
  EXPECT_GT(done(lines, "table").value("made", 0), 1000);
  EXPECT_EQ(done(lines, "reuse").value("fresh", 0), 3) << "pages that nobody had touched were to be found";
}

INSTANTIATE_TEST_SUITE_P(All, LinuxThrows,
                         testing::Values(std::tuple("kernel", std::vector<std::string>{}),
                                         std::tuple("split",
                                                    std::vector<std::string>{"--backing", "memfd", "--content-check"}),
                                         std::tuple("user", std::vector<std::string>{})),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) +
                                  (std::get<1>(info.param).empty() ? "" : "WithALookAtContent");
                         });

/// Memory heat hints: tests/guests/linux/hostile_hints.c.
class LinuxHints : public LinuxHostile {
protected:
  [[nodiscard]] Ended run(const std::string& transport, const std::string& backing,
                          const std::string& parameters = "") const {
    const File initrd("initrd", file_system({"insmod /hostile_hints.ko " + parameters}, module("hostile_hints")));
    const std::vector<std::string> chosen =
        arguments(initrd, transport, "1", {"--backing", backing, "--audit"}, "full");
    return run_linux([&] { return run_program(CPPVMM_BOOT, chosen); });
  }
  static void expect_right(const Ended& ended) {
    const std::vector<json> lines = module_results(ended.err);
    ASSERT_EQ(lines.size(), 1U) << ended.err;
    EXPECT_EQ(lines[0]["error"], 0) << lines[0];
    EXPECT_EQ(lines[0]["failed"], 0) << lines[0];
    EXPECT_GT(lines[0]["checks"], 300) << lines[0];
  }
};

/// By transport and backing.
class LinuxThrowsHints : public LinuxHints, public testing::WithParamInterface<std::tuple<const char*, const char*>> {};

TEST_P(LinuxThrowsHints, EachComesToWhatItMustAndHarmsNothingElse) {
  const auto& [transport, backing] = GetParam();
  const Ended ended = run(transport, backing);
  if (lacks_transport(ended)) GTEST_SKIP() << "this KVM lacks the transport";
  expect_right(ended);
  EXPECT_EQ(ended.status, 0) << ended.err;
  const json figures = json::parse(ended.out, nullptr, false);
  ASSERT_FALSE(figures.is_discarded()) << ended.out;
  EXPECT_EQ(figures["unsound_answers"], 0);
  EXPECT_EQ(figures["heat"]["failed_pages"], 0);
  EXPECT_GT(figures["heat"]["discard_pages"], 511);
}

INSTANTIATE_TEST_SUITE_P(All, LinuxThrowsHints,
                         testing::Values(std::tuple("kernel", "anonymous"), std::tuple("split", "memfd"),
                                         std::tuple("user", "anonymous")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "_" + std::get<1>(info.param);
                         });

// Its code, stack and page tables read zero then.
TEST_F(LinuxHints, ThatGiveAwayAllThatTheGuestUsesAreItsOwnEndAlone) {
  const Ended ended = run("user", "memfd", "all=1");
  expect_right(ended);
  EXPECT_EQ(ended.status, 1) << ended.err;
  EXPECT_NE(ended.err.find("the guest crashed (triple fault)"), std::string::npos) << ended.err;
}

struct Together {
  const char* transport;
  const char* cpus;
  const char* rounds;
  bool content_check;
};

class LinuxCallsTogether : public LinuxHostile, public testing::WithParamInterface<Together> {};

TEST_P(LinuxCallsTogether, EachAnswerIsWholeAndNamesNoPageWithData) {
  const Together& with = GetParam();
  const File initrd("initrd", file_system(with.transport, {std::string("mode=together rounds=") + with.rounds}));
  const Ended ended = run_linux([&] {
    return run_program(CPPVMM_BOOT, arguments(initrd, with.transport, with.cpus,
                                              with.content_check ? std::vector<std::string>{"--content-check"}
                                                                 : std::vector<std::string>{}));
  });
  if (lacks_transport(ended)) GTEST_SKIP() << "this KVM lacks the transport";
  const std::vector<json> lines = expect_survived(ended, 1);
  // Two calls a round and CPU, into pages of its own and then into one for all.
  EXPECT_EQ(done(lines, "together").value("made", 0), 4 * std::atoi(with.rounds) * std::atoi(with.cpus));
}

// A look at content takes a quarter of a second each time, in a machine that is emulated.
INSTANTIATE_TEST_SUITE_P(All, LinuxCallsTogether,
                         testing::Values(Together{"kernel", "4", "50", false}, Together{"split", "2", "50", false},
                                         Together{"user", "4", "50", false}, Together{"kernel", "2", "4", true},
                                         Together{"user", "2", "4", true}),
                         [](const auto& info) {
                           return std::string(info.param.transport) + "With" + info.param.cpus + "Vcpus" +
                                  (info.param.content_check ? "AndALookAtContent" : "");
                         });

/// What a process has of the host's. With guest RAM in a memfd, its anonymous memory is its own.
struct Holdings {
  std::uint64_t anonymous_bytes = 0; ///< Resident.
  std::uint64_t threads = 0;
  std::uint64_t descriptors = 0;
};

std::optional<Holdings> holdings_of(pid_t process) {
  const std::filesystem::path folder = std::filesystem::path("/proc") / std::to_string(process);
  std::istringstream status(contents(folder / "status"));
  Holdings holdings;
  bool known = false;
  for (std::string line; std::getline(status, line);) {
    std::istringstream words(line);
    std::string name;
    std::uint64_t value = 0;
    words >> name >> value;
    if (name == "RssAnon:") {
      holdings.anonymous_bytes = value * 1024;
      known = true;
    }
    if (name == "Threads:") holdings.threads = value;
  }
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder / "fd", error), end; !error && entry != end;
       entry.increment(error))
    ++holdings.descriptors;
  return known && !error ? std::optional(holdings) : std::nullopt;
}

class LinuxNeverStops : public LinuxHostile, public testing::WithParamInterface<const char*> {};

// CPPVMM_HOSTILE_SECONDS: how long the guest calls; 10 by default.
// Where the vCPUs share a processor they take turns, so that the longest gap says as much of the host's scheduler as of
// the VMM: it is told, and not judged.
TEST_P(LinuxNeverStops, TheVmmKeepsItsSizeAndTheOtherProcessorGoesOn) {
#ifdef CPPVMM_SANITIZED
  GTEST_SKIP() << "a sanitizer keeps memory of its own";
#endif
  const std::string transport = GetParam();
  const char* const chosen = std::getenv("CPPVMM_HOSTILE_SECONDS");
  const std::string seconds = chosen != nullptr && *chosen != '\0' ? chosen : "10";
  constexpr unsigned parts = 10;
  const File initrd("initrd", file_system(transport, {"mode=loop seconds=" + seconds}));
  std::vector<Holdings> seen;
  const Ended ended = run_linux([&] {
    seen.clear();
    Program program(CPPVMM_BOOT, arguments(initrd, transport, "2", {"--backing", "memfd"}), Stderr::terminal);
    for (unsigned part = 1; part <= parts && program.wait_for_stderr("\"part\": " + std::to_string(part) + ","); ++part)
      if (const auto holdings = holdings_of(program.pid())) seen.push_back(*holdings);
    return program.wait();
  });
  if (lacks_transport(ended)) GTEST_SKIP() << "this KVM lacks the transport";
  const std::vector<json> lines = expect_survived(ended, 1);

  // Each vCPU's thread has its arena of the heap by the second part.
  ASSERT_EQ(seen.size(), parts);
  // The heap grows by steps, and the last comes when both vCPUs happen to call at once: 96 KiB were seen, of 1602
  // calls.
  constexpr std::uint64_t noise = 256 << 10;
  constexpr std::uint64_t of_a_survey = 2; // it reads /proc while it lasts
  for (auto later = seen.begin() + 2; later != seen.end(); ++later) {
    EXPECT_LE(later->anonymous_bytes, seen[1].anonymous_bytes + noise) << "part " << later - seen.begin() + 1;
    EXPECT_EQ(later->threads, seen[1].threads);
    EXPECT_LE(later->descriptors, seen[1].descriptors + of_a_survey);
  }

  unsigned told = 0;
  for (const json& line : lines) {
    if (line.contains("part")) {
      ++told;
      EXPECT_GT(line["made"], 0) << line;
      EXPECT_GT(line["steps"], 0) << line;
    }
    if (line.contains("per_second")) {
      EXPECT_GT(line["msr_rounds"], 0) << line;
      std::printf("%s: %s\n", transport.c_str(), line.dump().c_str());
    }
  }
  EXPECT_EQ(told, parts);
  std::printf("%s: %llu calls; anonymous memory %llu KiB in part 2, %llu KiB in part %u\n", transport.c_str(),
              done(lines, "loop").value("made", 0ULL), static_cast<unsigned long long>(seen[1].anonymous_bytes >> 10),
              static_cast<unsigned long long>(seen.back().anonymous_bytes >> 10), parts);
}

INSTANTIATE_TEST_SUITE_P(Over, LinuxNeverStops, testing::Values("kernel", "user"),
                         [](const auto& info) { return std::string(info.param); });

} // namespace
