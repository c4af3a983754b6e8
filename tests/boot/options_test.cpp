#include "examples/boot/options.hpp"

#include <algorithm>
#include <cstdint>
#include <gtest/gtest.h>
#include <optional>
#include <string>
#include <vector>

namespace {

using namespace cppvmm::boot;

std::expected<Options, EarlyExit> parse(std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "cppvmm-boot");
  return parse_options(static_cast<int>(arguments.size()), arguments.data());
}

TEST(BootOptions, HaveTheDocumentedDefaults) {
  const auto options = parse({});
  ASSERT_TRUE(options);
  EXPECT_EQ(options->memory_bytes, 128U << 20);
  EXPECT_EQ(options->cpus, 1U);
  EXPECT_EQ(options->backing, MemoryBacking::anonymous);
  EXPECT_EQ(options->hypercalls, Hypercalls::automatic);
  EXPECT_FALSE(options->audit);
  EXPECT_EQ(options->resets, 0U);
  EXPECT_EQ(options->json, "");
  EXPECT_EQ(options->map, "");
  EXPECT_EQ(options->host_memory_log, "");
  EXPECT_EQ(options->kvm_device, "/dev/kvm");
}

TEST(BootOptions, AreTaken) {
  const auto options =
      parse({"--memory", "1G", "--cpus", "4", "--backing", "memfd", "--hypercalls", "kernel", "--guest", "zeroing",
             "--audit", "--resets", "3", "--json", "out.json", "--map", "out.svg", "--host-memory-log", "out.log"});
  ASSERT_TRUE(options);
  EXPECT_EQ(options->memory_bytes, 1U << 30);
  EXPECT_EQ(options->cpus, 4U);
  EXPECT_EQ(options->backing, MemoryBacking::memfd);
  EXPECT_EQ(options->hypercalls, Hypercalls::kernel);
  EXPECT_TRUE(options->audit);
  EXPECT_EQ(options->resets, 3U);
  EXPECT_EQ(options->json, "out.json");
  EXPECT_EQ(options->map, "out.svg");
  EXPECT_EQ(options->host_memory_log, "out.log");
  EXPECT_FALSE(options->idle);
  EXPECT_TRUE(parse({"--guest", "idle"})->idle);
}

TEST(BootOptions, ABalloonTargetIsASizeThatMemoryHas) {
  EXPECT_EQ(parse({})->balloon_target, std::nullopt);
  EXPECT_EQ(parse({"--balloon-target", "16M"})->balloon_target, 16U << 20);
  EXPECT_EQ(parse({"--balloon-target", "0"})->balloon_target, 0U);
  EXPECT_EQ(parse({"--balloon-target", "64M", "--memory", "64M"})->balloon_target, 64U << 20);
  EXPECT_FALSE(parse({"--balloon-target", "16M", "--enlightenments", "minimal"}));
  EXPECT_TRUE(parse({"--balloon-target", "16M", "--enlightenments", "hv-memory-hint"}));
}

TEST(BootOptions, EnlightenmentsAreASetOrAList) {
  EXPECT_EQ(parse({})->enlightenments.set, EnlightenmentSet::full);
  EXPECT_EQ(parse({"--enlightenments", "full"})->enlightenments.set, EnlightenmentSet::full);
  EXPECT_EQ(parse({"--enlightenments", "minimal"})->enlightenments.set, EnlightenmentSet::minimal);
  const auto listed = parse({"--enlightenments", "hv-time,hv-synic,hv-ext-query-caps"});
  ASSERT_TRUE(listed);
  EXPECT_EQ(listed->enlightenments.set, EnlightenmentSet::listed);
  EXPECT_EQ(listed->enlightenments.names, (std::vector<std::string>{"hv-time", "hv-synic", "hv-ext-query-caps"}));
  const EnlightenmentBits bits = bits_of(listed->enlightenments);
  EXPECT_EQ(bits.eax, 1U << 1 | 1U << 2 | 1U << 5 | 1U << 6 | 1U << 9);
  EXPECT_EQ(bits.ebx, 1U << 4 | 1U << 5);
  EXPECT_EQ(bits.hints, 0U);
  EXPECT_TRUE(has_enlightenment(listed->enlightenments, "hv-ext-query-caps"));
  EXPECT_FALSE(has_enlightenment(listed->enlightenments, "hv-boot-zeroed-mem"));
  EXPECT_TRUE(has_enlightenment({.set = EnlightenmentSet::minimal}, "hv-boot-zeroed-mem"));
  EXPECT_FALSE(has_enlightenment({.set = EnlightenmentSet::minimal}, "hv-time"));
  EXPECT_FALSE(has_enlightenment({.set = EnlightenmentSet::minimal}, "hv-memory-hint"));
  EXPECT_TRUE(has_enlightenment({.set = EnlightenmentSet::full}, "hv-memory-hint"));
  EXPECT_EQ(first_missing(listed->enlightenments, bits), "");
  EXPECT_EQ(first_missing(listed->enlightenments, {.eax = bits.eax}), "hv-synic");
  EXPECT_EQ(first_missing(listed->enlightenments, {}), "hv-synic");
}

TEST(BootOptions, SizesHaveBinarySuffixes) {
  EXPECT_EQ(parse_size("4096"), 4096U);
  EXPECT_EQ(parse_size("64M"), 64U << 20);
  EXPECT_EQ(parse_size("64m"), 64U << 20);
  EXPECT_EQ(parse_size("2GiB"), std::uint64_t{2} << 30);
  EXPECT_EQ(parse_size("1TB"), std::uint64_t{1} << 40);
  for (const char* bad : {"", "M", "-1", "1X", "1MM", "1 M", "1.5G", "18446744073709551616", "99999999999T", "1Mi"})
    EXPECT_FALSE(parse_size(bad)) << bad;
}

TEST(BootOptions, AMistakeIsOneLineAndStatus2) {
  const std::vector<std::vector<const char*>> mistakes = {
      {"--memory", "lots"},
      {"--memory", "1M"},
      {"--memory", "5000000"},
      {"--memory", "9T"},
      {"--cpus", "0"},
      {"--cpus", "257"},
      {"--cpus", "two"},
      {"--backing", "paper"},
      {"--hypercalls", "maybe"},
      {"--enlightenments", ""},
      {"--enlightenments", "hv-time,hv-nothing"},
      {"--guest", "windows"},
      {"--guest", "zeroing", "--kernel", "bzImage"},
      {"--resets", "-1"},
      {"--resets", "100001"},
      {"--resets", "some"},
      {"--kernel"},
      {"--initrd", "initrd"},
      {"--append", "quiet"},
      {"--unknown"},
      {"stray"},
      {"--memory"},
      {"--json"},
      {"--backing", "hugetlb", "--memory", "5M"},
      {"--balloon-target", "little"},
      {"--balloon-target", "1000"},
      {"--balloon-target", "65M", "--memory", "64M"},
      {"--balloon-target", "16M", "--hypercalls", "off"},
      {"--balloon-target", "16M", "--enlightenments", "hv-boot-zeroed-mem"},
      {"--balloon-target", "16M", "--kernel", "bzImage"},
      {"--balloon-target", "16M", "--restore", "saved"},
  };
  for (const auto& mistake : mistakes) {
    const auto options = parse(mistake);
    ASSERT_FALSE(options) << mistake.front();
    const std::string& text = options.error().text;
    EXPECT_EQ(options.error().status, 2) << text;
    EXPECT_EQ(std::ranges::count(text, '\n'), 1) << text;
    EXPECT_TRUE(text.ends_with('\n')) << text;
    EXPECT_TRUE(text.starts_with("cppvmm-boot: ")) << text;
  }
}

TEST(BootOptions, AKernelIsBootedWithItsInitrdAndCommandLine) {
  const auto plain = parse({"--kernel", "bzImage"});
  ASSERT_TRUE(plain) << plain.error().text;
  EXPECT_EQ(plain->kernel, "bzImage");
  EXPECT_EQ(plain->initrd, "");
  EXPECT_NE(plain->append.find("console=ttyS0"), std::string::npos) << "it is heard";
  const auto full = parse({"--kernel", "bzImage", "--initrd", "initrd.gz", "--append", "quiet init=/bin/sh"});
  ASSERT_TRUE(full) << full.error().text;
  EXPECT_EQ(full->initrd, "initrd.gz");
  EXPECT_EQ(full->append, "quiet init=/bin/sh");
  EXPECT_EQ(parse({})->kernel, "");
}

TEST(BootOptions, HelpIsNoMistake) {
  const auto help = parse({"--help"});
  ASSERT_FALSE(help);
  EXPECT_EQ(help.error().status, 0);
  for (const char* option : {"--memory", "--cpus", "--backing", "--hypercalls", "--guest", "--kernel", "--initrd",
                             "--append", "--audit", "--resets", "--json", "--map", "--balloon-target"})
    EXPECT_NE(help.error().text.find(option), std::string::npos) << option;
}

} // namespace
