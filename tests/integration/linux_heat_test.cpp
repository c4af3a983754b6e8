// What a Linux guest frees comes back to the host: the module heat_hint says what Linux has free, while the program
// heat_load fills memory with data, frees most of it, and checks what stays.
#include "linux_guest.hpp"
#include "program.hpp"
#include "tests/support/huge_pages.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using namespace cppvmm::testing;
using nlohmann::json;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t mebi = std::uint64_t{1} << 20;

/// Host memory of guest RAM when each answer was made, from the log.
std::vector<std::uint64_t> bytes_at_answers(const std::string& log) {
  std::vector<std::uint64_t> bytes;
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::uint64_t ms = 0;
    std::uint64_t value = 0;
    std::string what;
    EXPECT_TRUE(words >> ms >> value) << line;
    if (words >> what) {
      EXPECT_EQ(what, "answer") << line;
      bytes.push_back(value);
    }
  }
  return bytes;
}

/// A guest: its memory, and what it has of data that goes, in MiB.
struct Size {
  const char* memory;
  std::uint64_t anonymous;
  std::uint64_t file;
};

class LinuxHeat : public LinuxLoads {
protected:
  /// Boots a guest that has data, frees it and keeps 18 MiB of it; checks what holds however the host is told of what
  /// is free. `in_guest` is done before the load. All is null when the test is over.
  void load(const Size& size, const std::vector<std::string>& options, const std::string& parameters = "",
            const std::string& in_guest = "") {
    const std::string program = modules + "/heat_load";
    ASSERT_TRUE(std::filesystem::exists(program)) << program;
    const File initrd("initrd",
                      initial_file_system(contents(busybox),
                                          "#!/bin/busybox sh\n"
                                          "/bin/busybox mkdir /sys\n"
                                          "/bin/busybox mount -t sysfs sys /sys\n"
                                          "/bin/busybox insmod /heat_hint.ko " +
                                              parameters + "\n" + in_guest +
                                              "\n/heat_load keep=16 anonymous=" + std::to_string(size.anonymous) +
                                              " file=" + std::to_string(size.file) + "\n/bin/busybox reboot -f\n",
                                          {module("heat_hint"), {"heat_load", contents(program)}}));
    const File log("host-memory", "");
    std::vector<std::string> arguments = {"--memory",
                                          size.memory,
                                          "--kernel",
                                          kernel,
                                          "--initrd",
                                          initrd.path(),
                                          "--append",
                                          std::string(linux_command_line) + "kbd",
                                          "--host-memory-log",
                                          log.path(),
                                          "--audit",
                                          "--json",
                                          "-"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    const Ended ended = run_linux([&] { return run_program(CPPVMM_BOOT, arguments); });
    if (lacks_transport(ended)) GTEST_SKIP() << "this KVM lacks the transport";
    SCOPED_TRACE(ended.err);
    const auto results = module_results(ended.err);
    ASSERT_EQ(results.size(), 4U) << "status " << ended.status;
    figures = json::parse(ended.out, nullptr, false);
    ASSERT_FALSE(figures.is_discarded()) << ended.out;
    host = bytes_at_answers(contents(log.path()));
    ASSERT_EQ(host.size(), 3U) << contents(log.path());
    constexpr const char* times[] = {"before", "full", "after"};
    for (std::size_t i = 0; i < 3; ++i) {
      ASSERT_EQ(results[i]["at"], times[i]);
      EXPECT_EQ(results[i]["status"], 0);
      EXPECT_EQ(results[i]["refused"], 0);
    }
    full = results[1];
    after = results[2];

    // The data is what it was, and no answer was wrong about it.
    EXPECT_EQ(ended.status, 0);
    EXPECT_EQ(results[3]["module"], "heat_load");
    EXPECT_EQ(results[3]["wrong_words"], 0);
    EXPECT_EQ(results[3]["wrong_kept_words"], 0);
    EXPECT_EQ(figures["answers_given"], 3);
    EXPECT_EQ(figures["unsound_answers"], 0);

    // 98 % of 256 MiB: what does not come back is in pieces of blocks, and in lists of its own.
    EXPECT_GE(grown(), (size.anonymous + size.file) * mebi / 10 * 9) << "it may have had some of it";
    EXPECT_GE(given_back(), grown() / 10 * 9) << host[0] << ", " << host[1] << ", " << host[2];
    EXPECT_GE(by("pages") * page, given_back()) << "nothing goes that the guest has not named";
  }

  static std::uint64_t number(const json& of, const char* field) { return of.at(field).get<std::uint64_t>(); }
  /// By how much it grew from full to after.
  [[nodiscard]] std::uint64_t by(const char* field) const {
    return number(after, field) - std::min(number(full, field), number(after, field));
  }
  /// Host memory, in bytes: by how much it grew, and how much of that is no longer there.
  [[nodiscard]] std::uint64_t grown() const { return host[1] - std::min(host[0], host[1]); }
  [[nodiscard]] std::uint64_t given_back() const { return host[1] - std::min(host[2], host[1]); }

  json full, after;                ///< What the module said at these times.
  json figures;                    ///< cppvmm-boot's.
  std::vector<std::uint64_t> host; ///< Before, full, and after.
};

/// By transport and backing.
class LinuxHeatComesBack : public LinuxHeat,
                           public testing::WithParamInterface<std::tuple<const char*, const char*>> {};

TEST_P(LinuxHeatComesBack, AllThatIsFreedAndNothingElse) {
  const auto& [transport, backing] = GetParam();
  std::optional<cppvmm::test::HugePagePool> pool;
  if (std::string_view(backing) == "hugetlb") {
    auto taken = cppvmm::test::HugePagePool::take(192);
    if (!taken) GTEST_SKIP() << taken.error();
    pool.emplace(std::move(*taken));
  }
  load({"384M", 64, 64}, {"--hypercalls", transport, "--backing", backing});
  if (HasFatalFailure() || IsSkipped()) return;
  EXPECT_EQ(figures["hypercalls"], transport);
  // What came back is as good as what was never used: the next answer has it.
  EXPECT_GE(by("answered_pages") * page, given_back() / 20 * 19);
}

INSTANTIATE_TEST_SUITE_P(All, LinuxHeatComesBack,
                         testing::Values(std::tuple("kernel", "anonymous"), std::tuple("split", "memfd"),
                                         std::tuple("split", "hugetlb")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "_" + std::get<1>(info.param);
                         });

TEST_F(LinuxHeat, BlocksOfAllSizesAreTakenAndReadZero) {
  load({"192M", 24, 24}, {"--hypercalls", "user", "--backing", "memfd"}, "read_back=1",
       "echo 0 >/sys/module/page_reporting/parameters/page_reporting_order");
  if (HasFatalFailure() || IsSkipped()) return;
  EXPECT_GT(after["read_pages"], 48 / 4) << "the largest blocks are 4 MiB";
  EXPECT_EQ(after["data_pages"], 0);
  EXPECT_NE(number(after, "pages") % 512, 0U) << "smaller ones, too";
}

} // namespace
