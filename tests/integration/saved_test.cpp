// Linux that is saved in the middle of its boot and goes on in another process, in memory of another kind: it finds the
// Hyper-V that it had set up, and asks.
#include "linux_guest.hpp"
#include "program.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using namespace cppvmm::testing;
using nlohmann::json;

// With the kernel's messages. Of XSAVE the emulated processor of the lab says what Linux warns of.
constexpr const char* boot_log = "console=ttyS0 panic=-1 clearcpuid=cx16 noxsave reboot=kbd";

/// By transport, number of vCPUs, enlightenments, and the backings in which it is saved and goes on.
class LinuxSaved
    : public LinuxLoads,
      public testing::WithParamInterface<std::tuple<const char*, const char*, const char*, const char*, const char*>> {
protected:
  /// Of a guest that goes on with what `saved` holds; null when it did not end well.
  json go_on(const File& saved, const std::string& backing, const std::vector<std::string>& more,
             std::string& console) {
    std::vector<std::string> arguments = {"--restore", saved.path(), "--backing", backing, "--thp",
                                          "never",     "--audit",    "--json",    "-"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Ended ended = run_linux([&] { return run_program(CPPVMM_BOOT, arguments); });
    console = ended.err;
    EXPECT_EQ(ended.status, 0) << ended.err;
    const json figures = json::parse(ended.out, nullptr, false);
    EXPECT_FALSE(figures.is_discarded()) << ended.out;
    return figures.is_discarded() || ended.status != 0 ? json() : figures;
  }

  /// What holds for the one answer of a run.
  static void expect_sound(const json& figures, const std::string& console) {
    const auto results = module_results(console);
    ASSERT_EQ(results.size(), 1U) << console;
    const json& answer = results.front();
    EXPECT_EQ(answer["status"], 0);
    EXPECT_EQ(answer["data_pages"], 0) << answer;
    EXPECT_EQ(figures["unsound_pages"], 0) << figures;
    EXPECT_EQ(answer["answered_pages"], figures["reported_pages"]);
    EXPECT_EQ(figures["calls"]["0x8002"], 1);
  }
  /// The guest's free memory was not in the file, and so it is not touched here.
  static void expect_most(const json& figures) {
    EXPECT_GT(figures["reported_pages"].get<std::uint64_t>(), 65536U / 2) << figures;
  }
};

TEST_P(LinuxSaved, GoesOnInAnotherProcessAndAsks) {
  const auto& [transport, cpus, enlightenments, before, after] = GetParam();
  const File initrd("initrd", initial_file_system(contents(busybox),
                                                  "#!/bin/busybox sh\n"
                                                  "/bin/busybox insmod /zeroed_memory.ko\n"
                                                  "/bin/busybox rmmod zeroed_memory\n"
                                                  "echo it has asked once\n"
                                                  "/bin/busybox insmod /zeroed_memory.ko\n"
                                                  "/bin/busybox reboot -f\n",
                                                  {module("zeroed_memory")}));
  const File in_boot("in-boot", "");
  const Ended ended = run_linux([&] {
    return run_program(CPPVMM_BOOT, {"--memory",
                                     "256M",
                                     "--cpus",
                                     cpus,
                                     "--hypercalls",
                                     transport,
                                     "--enlightenments",
                                     enlightenments,
                                     "--backing",
                                     before,
                                     "--thp",
                                     "never",
                                     "--kernel",
                                     kernel,
                                     "--initrd",
                                     initrd.path(),
                                     "--append",
                                     boot_log,
                                     "--json",
                                     "-",
                                     "--save",
                                     in_boot.path(),
                                     "--save-at",
                                     "Trying to unpack rootfs image"});
  });
  if (lacks_transport(ended)) GTEST_SKIP() << "this KVM lacks the transport";
  ASSERT_EQ(ended.status, 0) << ended.err;
  ASSERT_TRUE(ended.err.ends_with("Trying to unpack rootfs image")) << ended.err;
  // No page that is known to be zero is in it.
  EXPECT_LT(std::filesystem::file_size(in_boot.path()), std::uint64_t{200} << 20);

  const File asked("asked", "");
  std::string console;
  const json first = go_on(in_boot, after, {"--save", asked.path(), "--save-at", "it has asked once"}, console);
  ASSERT_FALSE(first.is_null());
  EXPECT_EQ(first["hypercalls"], transport);
  EXPECT_EQ(first["backing"], after);
  expect_sound(first, console);
  expect_most(first);

  const json second = go_on(asked, before, {}, console);
  ASSERT_FALSE(second.is_null());
  EXPECT_EQ(second["hypercalls"], transport);
  expect_sound(second, console);
  // The module reads all memory, which allocates it where it is shared.
  if (std::string(after) == "anonymous") expect_most(second);
}

INSTANTIATE_TEST_SUITE_P(All, LinuxSaved,
                         testing::Values(std::tuple("kernel", "2", "full", "memfd", "anonymous"),
                                         std::tuple("split", "2", "full", "anonymous", "memfd"),
                                         std::tuple("user", "1", "minimal", "memfd", "shared-anonymous")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "With" + std::get<1>(info.param) + "Vcpus" +
                                  std::get<2>(info.param);
                         });

/// What --restore is given, and is no machine.
TEST_F(Linux, AFileThatHoldsNoMachineIsOneLine) {
  const File text("text", "This is no machine.\n");
  const File cut("cut", "cppvmm-boot machine, form 1\n\x10");
  using std::string_view_literals::operator""sv;
  const File damaged("damaged", "cppvmm-boot machine, form 1\n\x04\0\0\0\0\0\0\0[{1}"sv);
  constexpr std::size_t depth = 0x10'0000; // for recursion, many times what a stack has room for
  const File deep("deep", std::string("cppvmm-boot machine, form 1\n\0\0\x10\0\0\0\0\0"sv) + std::string(depth, '['));
  const File huge("huge", "cppvmm-boot machine, form 1\n\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF"sv);
  for (const auto& [path, why] :
       {std::pair(text.path(), text.path() + " is no machine that --save has written"),
        std::pair(cut.path(), cut.path() + " ends too soon"), std::pair(huge.path(), huge.path() + " is damaged")}) {
    const Ended ended = run_program(CPPVMM_BOOT, {"--restore", path});
    EXPECT_EQ(ended.status, 1);
    EXPECT_EQ(ended.err, "cppvmm-boot: --restore: " + why + "\n");
  }
  for (const std::string& path : {damaged.path(), deep.path()}) {
    const Ended ended = run_program(CPPVMM_BOOT, {"--restore", path});
    EXPECT_EQ(ended.status, 1);
    EXPECT_TRUE(ended.err.starts_with("cppvmm-boot: --restore: " + path + " is damaged: ")) << ended.err;
    EXPECT_EQ(ended.err.find('\n'), ended.err.size() - 1);
  }
}

TEST_F(Linux, AGuestThatIsNeverSavedIsAFailure) {
  using std::string_view_literals::operator""sv;
  const File image("reset", small_image("\xB0\xFE"      // mov al, 0xFE
                                        "\xE6\x64"      // out 0x64, al
                                        "\xEB\xFE"sv)); // jmp .
  const File saved("never", "an earlier one");
  const Ended ended = run_program(
      CPPVMM_BOOT, {"--memory", "32M", "--kernel", image.path(), "--save", saved.path(), "--save-at", "good morning"});
  EXPECT_EQ(ended.status, 1);
  EXPECT_EQ(ended.err, "cppvmm-boot: --save: the guest has not said \"good morning\"\n");
  EXPECT_EQ(contents(saved.path()), "an earlier one");
}

} // namespace
