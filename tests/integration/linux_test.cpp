// Kernels: small ones of our own, and one that nobody here wrote.
#include "linux_guest.hpp"
#include "program.hpp"

#include <algorithm>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <string_view>
#include <termios.h>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using namespace cppvmm::testing;
using nlohmann::json;

// What is wrong with each is known to boot_tests; this is how it is said.
TEST_F(Linux, AnImageThatIsNoneIsOneLine) {
  const File text("image", "This is not a kernel.\n");
  const File empty("empty", "");
  const std::vector<std::pair<std::string, std::string>> images = {
      {text.path(), text.path() + " is too short for a Linux kernel"},
      {empty.path(), empty.path() + " is empty"},
      {CPPVMM_BOOT, CPPVMM_BOOT " is an ELF file: the bzImage is wanted, which distributions call vmlinuz"},
      {"/", "/ is no file"},
      {"/nonexistent/bzImage", "cannot open /nonexistent/bzImage: No such file or directory"},
  };
  for (const auto& [image, why] : images) {
    const Ended ended = run_program(CPPVMM_BOOT, {"--kernel", image});
    EXPECT_EQ(ended.status, 1);
    EXPECT_EQ(ended.err, "cppvmm-boot: " + why + "\n");
    EXPECT_EQ(ended.out, "");
  }
}

TEST_F(Linux, TheKernelHasItsZeroPageItsConsoleAndItsReset) {
  using std::string_view_literals::operator""sv;
  const File image("small", small_image("\x48\x8D\xB6\x02\x02\x00\x00" // lea rsi, [rsi + 0x202]
                                        "\xB9\x04\x00\x00\x00"         // mov ecx, 4
                                        "\x66\xBA\xF8\x03"             // mov dx, 0x3F8
                                        "\xF3\x6E"                     // rep outsb
                                        "\x66\xBA\xFD\x03"             // 1: mov dx, 0x3FD
                                        "\xEC"                         // 2: in al, dx
                                        "\xA8\x01"                     // test al, 1
                                        "\x74\xFB"                     // jz 2
                                        "\x66\xBA\xF8\x03"             // mov dx, 0x3F8
                                        "\xEC"                         // in al, dx
                                        "\xEE"                         // out dx, al
                                        "\x3C\x71"                     // cmp al, 'q'
                                        "\x75\xED"                     // jnz 1
                                        "\xB0\xFE"                     // mov al, 0xFE
                                        "\xE6\x64"                     // out 0x64, al
                                        "\xEB\xFE"sv));                // jmp .
  Program program(CPPVMM_BOOT, {"--memory", "32M", "--kernel", image.path(), "--json", "-"}, Stderr::file, Stdin::pipe);
  program.send("hello q");
  const Ended ended = program.wait();
  EXPECT_EQ(ended.status, 0) << ended.err;
  EXPECT_EQ(ended.err, "HdrShello q");
  const json figures = json::parse(ended.out, nullptr, false);
  ASSERT_FALSE(figures.is_discarded()) << "the console is not mixed into it: " << ended.out;
  EXPECT_EQ(figures["kernel"], image.path());
  EXPECT_EQ(figures["ram_pages"], 8192);
  EXPECT_TRUE(figures["guest_zeroed_pages"].is_null());
}

TEST_F(Linux, TheTerminalTypesThroughAndIsAsItWasAfterwards) {
  using std::string_view_literals::operator""sv;
  const File image("spin", small_image("\x66\xBA\xF8\x03" // mov dx, 0x3F8
                                       "\xB0\x3E"         // mov al, '>'
                                       "\xEE"             // out dx, al
                                       "\xEB\xFE"sv));    // jmp .
  Program program(CPPVMM_BOOT, {"--memory", "32M", "--kernel", image.path(), "--json", "-"}, Stderr::terminal,
                  Stdin::terminal);
  ASSERT_TRUE(program.wait_for_stderr(">")) << program.wait().err;
  termios mode{};
  ASSERT_EQ(tcgetattr(program.input(), &mode), 0);
  EXPECT_EQ(mode.c_lflag & (ICANON | ECHO), 0U) << "the guest echoes";
  EXPECT_NE(mode.c_lflag & ISIG, 0U) << "and the run can be ended";
  EXPECT_EQ(mode.c_iflag & ICRNL, 0U);
  ASSERT_EQ(kill(program.pid(), SIGTERM), 0);
  EXPECT_EQ(program.wait().status, 128 + SIGTERM);
  ASSERT_EQ(tcgetattr(program.input(), &mode), 0);
  EXPECT_EQ(mode.c_lflag & (ICANON | ECHO), static_cast<tcflag_t>(ICANON | ECHO));
  EXPECT_NE(mode.c_iflag & ICRNL, 0U);
}

TEST_F(Linux, AKernelThatCrashesIsAFailure) {
  const File image("crash", small_image("\x0F\x0B")); // ud2, and no interrupt table
  const Ended ended = run_program(CPPVMM_BOOT, {"--memory", "32M", "--kernel", image.path()});
  EXPECT_EQ(ended.status, 1);
  EXPECT_EQ(ended.err, "cppvmm-boot: vCPU 0: the guest crashed (triple fault)\n");
}

TEST_F(LinuxBoots, ATruncatedKernelIsOneLine) {
  const std::string whole = contents(distributed_kernel);
  const File half("half", std::string_view(whole).substr(0, whole.size() / 2));
  const Ended ended = run_program(CPPVMM_BOOT, {"--kernel", half.path()});
  EXPECT_EQ(ended.status, 1);
  EXPECT_TRUE(ended.err.starts_with("cppvmm-boot: " + half.path() + " is truncated: it has ")) << ended.err;
  EXPECT_EQ(std::ranges::count(ended.err, '\n'), 1) << ended.err;
}

TEST_F(LinuxBoots, AnInitrdThatIsNotThereIsOneLine) {
  const Ended ended = run_program(CPPVMM_BOOT, {"--kernel", kernel, "--initrd", "/nonexistent/initrd"});
  EXPECT_EQ(ended.status, 1);
  EXPECT_EQ(ended.err, "cppvmm-boot: cannot open /nonexistent/initrd: No such file or directory\n");
}

TEST_F(LinuxBoots, MemoryThatItDoesNotFitInIsOneLine) {
  const Ended ended = run_program(CPPVMM_BOOT, {"--kernel", kernel, "--memory", "8M"});
  EXPECT_EQ(ended.status, 1);
  EXPECT_TRUE(ended.err.starts_with("cppvmm-boot: --memory is too little: the kernel alone needs ")) << ended.err;
}

/// By transport, number of vCPUs, and how the guest resets the machine (Linux's parameter `reboot`).
class LinuxAsks : public LinuxBoots,
                  public testing::WithParamInterface<std::tuple<const char*, const char*, const char*>> {};

TEST_P(LinuxAsks, FindsHyperVAndAsksForItsCapabilities) {
  const auto& [transport, cpus, reset] = GetParam();
  const std::string& image = std::string_view(cpus) == "1" ? distributed_kernel : kernel;
  const File initrd("initrd", initial_file_system(contents(busybox), R"init(#!/bin/busybox sh
busybox=/bin/busybox
$busybox mount -t proc proc /proc
echo "guest: processors $($busybox nproc)"
echo "guest: memory $($busybox sed -n 's/^MemTotal: *//p' /proc/meminfo)"
$busybox dmesg | $busybox sed -n 's/.*\(Hypervisor detected: .*\|Hyper-V: privilege .*\)/guest: \1/p'
$busybox dmesg | $busybox grep -E 'Kernel panic|Oops|APIC id mismatch|soft lockup'
echo "guest: listens"
read -r line
echo "guest: heard $line"
$busybox reboot -f
)init"));
  const Ended ended = run_linux([&] {
    Program program(CPPVMM_BOOT,
                    {"--memory", "256M", "--cpus", cpus, "--hypercalls", transport, "--enlightenments", "minimal",
                     "--kernel", image, "--initrd", initrd.path(), "--append", std::string(linux_command_line) + reset,
                     "--audit", "--json", "-"},
                    Stderr::terminal, Stdin::pipe);
    if (program.wait_for_stderr("guest: listens")) program.send("a line\n");
    return program.wait();
  });
  const std::string& console = ended.err;
  if (lacks_transport(ended)) GTEST_SKIP() << "this KVM lacks the transport";
  ASSERT_EQ(ended.status, 0) << console;

  EXPECT_NE(console.find("guest: Hypervisor detected: Microsoft Hyper-V"), std::string::npos) << console;
  EXPECT_NE(console.find("guest: Hyper-V: privilege flags low 0x60, high 0x100000"), std::string::npos) << console;
  EXPECT_NE(console.find(std::string("guest: processors ") + cpus), std::string::npos) << console;
  EXPECT_NE(console.find("guest: memory "), std::string::npos) << console;
  EXPECT_NE(console.find("guest: heard a line"), std::string::npos) << console;
  for (const char* trouble : {"Kernel panic", "Oops", "APIC id mismatch", "soft lockup"})
    EXPECT_EQ(console.find(trouble), std::string::npos) << console;

  const json figures = json::parse(ended.out, nullptr, false);
  ASSERT_FALSE(figures.is_discarded()) << ended.out;
  EXPECT_EQ(figures["hypercalls"], transport);
  EXPECT_EQ(figures["calls"], json({{"0x8001", 1}, {"0x8002", 0}, {"0x8003", 0}, {"other", 0}}))
      << "Linux asks once, at boot";
  EXPECT_EQ(figures["kernel"], image);
  EXPECT_EQ(figures["ram_pages"], 65536);
  EXPECT_EQ(figures["vcpu_ticks"].size(), static_cast<std::size_t>(std::atoi(cpus)));
  for (const char* field : {"guest", "guest_zeroed_pages", "nonzero_pages_at_end", "unsound_pages"})
    EXPECT_TRUE(figures[field].is_null()) << field;
}

INSTANTIATE_TEST_SUITE_P(All, LinuxAsks,
                         testing::Values(std::tuple("kernel", "1", "kbd"), std::tuple("kernel", "2", "pci"),
                                         std::tuple("split", "1", "pci"), std::tuple("user", "2", "kbd")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "With" + std::get<1>(info.param) + "Vcpus";
                         });

/// With more of KVM's Hyper-V than the least, by transport.
class LinuxEnlightened : public LinuxBoots, public testing::WithParamInterface<const char*> {
protected:
  /// Boots it with two vCPUs; its console.
  std::string boot(const std::string& enlightenments) {
    const File initrd("initrd", initial_file_system(contents(busybox), R"init(#!/bin/busybox sh
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mkdir /sys
$busybox mount -t sysfs sysfs /sys
$busybox dmesg | $busybox sed -n 's/.*\(Hyper-V: .*\)/guest: \1/p'
echo "guest: clocks $($busybox cat /sys/devices/system/clocksource/clocksource0/available_clocksource)"
echo "guest: clock $($busybox cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "guest: timer $($busybox cat /sys/devices/system/clockevents/clockevent0/current_device)"
echo "guest: ticks $($busybox sed -n 's/ *HVS: *\([0-9]*\) *\([0-9]*\) .*/\1 \2/p' /proc/interrupts)"
$busybox dmesg | $busybox grep -E 'Kernel panic|Oops|BUG:|soft lockup|detected stall|unchecked MSR' \
  | $busybox grep -v 'WRMSR to 0x40000073'
$busybox reboot -f
)init"));
    const Ended ended = run_linux([&] {
      return run_program(CPPVMM_BOOT,
                         {"--memory", "256M", "--cpus", "2", "--hypercalls", GetParam(), "--enlightenments",
                          enlightenments, "--kernel", kernel, "--initrd", initrd.path(), "--append",
                          std::string(linux_command_line) + "pci", "--audit", "--json", "-"});
    });
    is_lacking = lacks_transport(ended);
    if (is_lacking) return {};
    EXPECT_EQ(ended.status, 0) << ended.err;
    for (const char* trouble : {"Kernel panic", "Oops", "BUG:", "soft lockup", "detected stall", "unchecked MSR"})
      EXPECT_EQ(ended.err.find(trouble), std::string::npos) << ended.err;
    const json figures = json::parse(ended.out, nullptr, false);
    EXPECT_FALSE(figures.is_discarded()) << ended.out;
    if (!figures.is_discarded())
      EXPECT_EQ(figures["calls"], json({{"0x8001", 1}, {"0x8002", 0}, {"0x8003", 0}, {"other", 0}}));
    return ended.err;
  }

  /// The numbers behind `label` in a console's line.
  static std::vector<std::uint64_t> numbers_behind(const std::string& console, const std::string& label) {
    const std::size_t at = console.find(label);
    std::vector<std::uint64_t> numbers;
    if (at == std::string::npos) return numbers;
    std::istringstream words(console.substr(at + label.size(), console.find('\n', at) - at - label.size()));
    for (std::string word; words >> word;)
      if (const auto value = std::strtoull(word.c_str(), nullptr, 0); value != 0 || word == "0")
        numbers.push_back(value);
    return numbers;
  }

  bool is_lacking = false;
};

TEST_P(LinuxEnlightened, UsesTheTimeAndTheHypercallsThatKvmHasBesideTheExtendedOnes) {
  const std::string console = boot("hv-boot-zeroed-mem,hv-frequencies,hv-ipi,hv-relaxed,hv-time,hv-tlbflush,hv-vapic");
  if (is_lacking) GTEST_SKIP() << "this KVM lacks the transport";
  const auto privileges = numbers_behind(console, "guest: Hyper-V: privilege flags low ");
  const auto more = numbers_behind(console, ", high ");
  ASSERT_FALSE(privileges.empty() || more.empty()) << console;
  constexpr std::uint64_t time_and_apic = 1U << 1 | 1U << 4 | 1U << 9;
  EXPECT_EQ(privileges[0] & time_and_apic, time_and_apic) << console;
  EXPECT_EQ(more[0], 1U << 20) << console;
  EXPECT_NE(console.find("hyperv_clocksource_tsc_page"), std::string::npos) << console;
  EXPECT_NE(console.find("guest: Hyper-V: Using IPI hypercalls"), std::string::npos) << console;
  EXPECT_NE(console.find("guest: Hyper-V: Using hypercall for remote TLB flush"), std::string::npos) << console;
}

TEST_P(LinuxEnlightened, TicksByKvmsSyntheticTimers) {
  const std::string console = boot("full");
  if (is_lacking) GTEST_SKIP() << "this KVM lacks the transport";
  const auto privileges = numbers_behind(console, "guest: Hyper-V: privilege flags low ");
  ASSERT_FALSE(privileges.empty()) << console;
  constexpr std::uint64_t synic_and_timers = 1U << 2 | 1U << 3;
  EXPECT_EQ(privileges[0] & synic_and_timers, synic_and_timers) << console;
  EXPECT_NE(console.find("guest: timer Hyper-V clockevent"), std::string::npos) << console;
  const auto ticks = numbers_behind(console, "guest: ticks ");
  ASSERT_EQ(ticks.size(), 2U) << console;
  EXPECT_GT(ticks[0], 0U);
  EXPECT_GT(ticks[1], 0U);
}

TEST_P(LinuxEnlightened, SeesWhatIsListedAlone) {
  const std::string console = boot("hv-time,hv-relaxed,hv-boot-zeroed-mem");
  if (is_lacking) GTEST_SKIP() << "this KVM lacks the transport";
  const auto privileges = numbers_behind(console, "guest: Hyper-V: privilege flags low ");
  const auto more = numbers_behind(console, ", high ");
  ASSERT_FALSE(privileges.empty() || more.empty()) << console;
  EXPECT_EQ(privileges[0], 1U << 1 | 1U << 9 | 1U << 5 | 1U << 6) << console;
  EXPECT_EQ(more[0], 1U << 20) << console;
  EXPECT_EQ(console.find("Using IPI hypercalls"), std::string::npos) << console;
}

/// Where KVM has no time for it.
class LinuxWithTimeOfOurs : public LinuxEnlightened {};

TEST_P(LinuxWithTimeOfOurs, GoesByTheReferenceTscPage) {
  const std::string console = boot("full");
  if (is_lacking) GTEST_SKIP() << "this KVM lacks the transport";
  const auto privileges = numbers_behind(console, "guest: Hyper-V: privilege flags low ");
  ASSERT_FALSE(privileges.empty()) << console;
  EXPECT_EQ(privileges[0], 1U << 1 | 1U << 5 | 1U << 6 | 1U << 9 | 1U << 11) << console;
  EXPECT_NE(console.find("guest: clock hyperv_clocksource_tsc_page"), std::string::npos) << console;
}

INSTANTIATE_TEST_SUITE_P(Over, LinuxWithTimeOfOurs, testing::Values("user"),
                         [](const auto& info) { return std::string(info.param); });

INSTANTIATE_TEST_SUITE_P(Over, LinuxEnlightened, testing::Values("kernel", "split"),
                         [](const auto& info) { return std::string(info.param); });

} // namespace
