// What cppvmm-boot says before it comes to KVM.
#include "program.hpp"

#include <algorithm>
#include <fcntl.h>
#include <filesystem>
#include <gtest/gtest.h>
#include <string>
#include <unistd.h>
#include <vector>

namespace {

using namespace cppvmm::testing;

Ended boot(const std::vector<std::string>& arguments) { return run_program(CPPVMM_BOOT, arguments); }

bool is_one_line(const std::string& text) { return std::ranges::count(text, '\n') == 1 && text.ends_with('\n'); }

TEST(BootMistakes, AreOneLineAndStatus2) {
  for (const std::vector<std::string>& mistake : {std::vector<std::string>{"--memory", "lots"},
                                                  {"--cpus", "0"},
                                                  {"--hypercalls", "maybe"},
                                                  {"--balloon-target", "8M", "--hypercalls", "off"},
                                                  {"--balloon-target", "8M", "--kernel", "bzImage"},
                                                  {"--no-such-option"}}) {
    const Ended ended = boot(mistake);
    EXPECT_EQ(ended.status, 2);
    EXPECT_TRUE(is_one_line(ended.err)) << ended.err;
    EXPECT_TRUE(ended.err.starts_with("cppvmm-boot: ")) << ended.err;
    EXPECT_EQ(ended.out, "");
  }
}

TEST(BootWithoutKvm, SaysInOneLineWhatToDo) {
  const Ended missing = boot({"--kvm-device", "/nonexistent/kvm"});
  EXPECT_EQ(missing.status, 1);
  EXPECT_TRUE(is_one_line(missing.err)) << missing.err;
  EXPECT_NE(missing.err.find("/nonexistent/kvm does not exist"), std::string::npos) << missing.err;
  EXPECT_NE(missing.err.find("modprobe"), std::string::npos) << missing.err;

  const Ended other = boot({"--kvm-device", "/dev/null"});
  EXPECT_EQ(other.status, 1);
  EXPECT_TRUE(is_one_line(other.err)) << other.err;
  EXPECT_NE(other.err.find("/dev/null is not KVM's device"), std::string::npos) << other.err;
}

TEST(BootWithoutKvm, SaysInOneLineHowToGetPermission) {
  if (geteuid() == 0) GTEST_SKIP() << "root may open anything";
  const auto file = std::filesystem::path(testing::TempDir()) / ("kvm-" + std::to_string(getpid()));
  const int fd = open(file.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0);
  ASSERT_GE(fd, 0);
  close(fd);
  const Ended ended = boot({"--kvm-device", file.string()});
  std::filesystem::remove(file);
  EXPECT_EQ(ended.status, 1);
  EXPECT_TRUE(is_one_line(ended.err)) << ended.err;
  EXPECT_NE(ended.err.find("usermod -aG kvm"), std::string::npos) << ended.err;
}

} // namespace
