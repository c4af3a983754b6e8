#include "linux_guest.hpp"
#include "tests/support/machine_facts.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>
#include <unistd.h>

namespace cppvmm::testing {
namespace {

std::string variable(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? otherwise : value;
}

/// An entry of a cpio archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
std::string cpio_entry(unsigned inode, std::string_view name, unsigned mode, std::string_view bytes) {
  char head[112];
  std::snprintf(head, sizeof head, "070701%08x%08x%08x%08x%08x%08x%08zx%08x%08x%08x%08x%08zx%08x", inode, mode, 0U, 0U,
                1U, 0U, bytes.size(), 0U, 0U, 0U, 0U, name.size() + 1, 0U);
  std::string entry = std::string(head) + std::string(name) + '\0';
  entry.resize((entry.size() + 3) / 4 * 4);
  entry += bytes;
  entry.resize((entry.size() + 3) / 4 * 4);
  return entry;
}

} // namespace

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

File::File(const std::string& name, std::string_view bytes)
    : path_(std::filesystem::path(::testing::TempDir()) / (name + "-" + std::to_string(getpid()))) {
  std::ofstream(path_, std::ios::binary) << bytes;
}

File::~File() { std::filesystem::remove(path_); }

std::string initial_file_system(std::string_view busybox, std::string_view init, const std::vector<GuestFile>& more) {
  unsigned inode = 0;
  std::string archive;
  for (const char* folder : {"bin", "dev", "proc"})
    archive += cpio_entry(++inode, folder, 0040755, {});
  archive += cpio_entry(++inode, "bin/busybox", 0100755, busybox);
  archive += cpio_entry(++inode, "init", 0100755, init);
  for (const auto& [path, bytes] : more)
    archive += cpio_entry(++inode, path, 0100755, bytes);
  return archive + cpio_entry(0, "TRAILER!!!", 0, {});
}

std::string small_image(std::string_view code) {
  constexpr std::size_t setup = 2 * 512;
  constexpr std::size_t kernel = 0x1000;
  std::string file(setup + kernel, '\0');
  // Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
  const auto put = [&](std::size_t at, std::uint64_t value, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i)
      file[at + i] = static_cast<char>(value >> 8 * i);
  };
  put(0x1F1, 1, 1);           // setup_sects
  put(0x1F4, kernel / 16, 4); // syssize
  put(0x1FE, 0xAA55, 2);      // boot_flag
  put(0x200, 0x6AEB, 2);      // jump
  put(0x202, 0x5372'6448, 4); // header
  put(0x206, 0x020F, 2);      // version
  put(0x211, 1, 1);           // loadflags: loaded high
  put(0x22C, 0x7FFF'FFFF, 4); // initrd_addr_max
  put(0x230, 0x20'0000, 4);   // kernel_alignment
  put(0x234, 1, 1);           // relocatable_kernel
  put(0x236, 1, 2);           // xloadflags: 64-bit entry point
  put(0x238, 255, 4);         // cmdline_size
  put(0x258, 0x100'0000, 8);  // pref_address
  put(0x260, kernel, 4);      // init_size
  file.replace(setup + 0x200, code.size(), code);
  return file;
}

bool lacks_transport(const Ended& ended) {
  if (ended.status != 1) return false;
  return (!test::machine_facts().kvm_forwards && ended.err.find("KVM does not forward") != std::string::npos) ||
         (!test::machine_facts().kvm_hyperv && ended.err.find("KVM has no Hyper-V") != std::string::npos);
}

bool lacks_write_watch(const Ended& ended) {
  return !test::machine_facts().async_write_protect && ended.status == 1 &&
         ended.err.find("(Linux 6.7): not available") != std::string::npos;
}

namespace {

/// Kills what the calling thread has started, unless it ends before.
class Watchdog {
public:
  explicit Watchdog(std::chrono::seconds patience)
      : children_("/proc/self/task/" + std::to_string(gettid()) + "/children"),
        thread_([this, patience](const std::stop_token& stop) {
          std::mutex mutex;
          std::unique_lock lock(mutex);
          std::condition_variable_any never;
          never.wait_for(lock, stop, patience, [] { return false; });
          if (stop.stop_requested()) return;
          std::ifstream list(children_);
          for (pid_t child = 0; list >> child;)
            has_killed_ = kill(child, SIGKILL) == 0 || has_killed_;
        }) {}
  [[nodiscard]] bool has_killed() const { return has_killed_; }

private:
  std::string children_;
  std::atomic<bool> has_killed_ = false;
  std::jthread thread_;
};

} // namespace

Ended run_linux(const std::function<Ended()>& run) {
  const char* const lab = std::getenv("CPPVMM_LAB");
  if (lab == nullptr || *lab == 0) return run();
  constexpr int most = 4;
  constexpr std::chrono::seconds patience(150); // the longest take a minute
  for (int attempt = 1;; ++attempt) {
    bool was_killed = false;
    Ended ended = [&] {
      const Watchdog watchdog(patience);
      Ended of_run = run();
      was_killed = watchdog.has_killed();
      return of_run;
    }();
    const bool is_lost =
        ended.err.find("---[ end trace") != std::string::npos || ended.err.find("Kernel panic") != std::string::npos;
    if ((!is_lost && !was_killed) || attempt == most) return ended;
    std::cout << (is_lost ? "the guest's kernel has crashed" : "the guest came to no end") << ", which runs once more: "
              << ended.err.substr(ended.err.size() - std::min<std::size_t>(ended.err.size(), 400)) << std::endl;
  }
}

void NeedsKvm::SetUp() {
  if (const std::string why = test::kvm_missing(); !why.empty()) GTEST_SKIP() << "no usable KVM: " << why;
}

LinuxBoots::LinuxBoots()
    : distributed_kernel(variable("CPPVMM_LINUX", "")),
      kernel(variable("CPPVMM_LINUX_FLAT", distributed_kernel.c_str())),
      busybox(variable("CPPVMM_BUSYBOX", "/bin/busybox")) {}

void LinuxBoots::SetUp() {
  Linux::SetUp();
  if (IsSkipped()) return;
  if (distributed_kernel.empty()) GTEST_SKIP() << "CPPVMM_LINUX names no kernel to boot";
  if (!std::filesystem::exists(busybox)) GTEST_SKIP() << "CPPVMM_BUSYBOX: there is no " << busybox;
}

LinuxLoads::LinuxLoads() : modules(variable("CPPVMM_GUEST_MODULES", "")) {}

void LinuxLoads::SetUp() {
  LinuxBoots::SetUp();
  if (IsSkipped()) return;
  if (modules.empty())
    GTEST_SKIP() << "CPPVMM_GUEST_MODULES names no folder of modules to load (./dev lab builds them)";
}

GuestFile LinuxLoads::module(const std::string& name) const {
  const std::string path = modules + "/" + name + ".ko";
  EXPECT_TRUE(std::filesystem::exists(path)) << path;
  return {.path = name + ".ko", .bytes = contents(path)};
}

std::vector<nlohmann::json> module_results(std::string_view console) {
  constexpr std::string_view begin = "cppvmm: {";
  std::vector<nlohmann::json> results;
  for (std::size_t at = console.find(begin); at != std::string_view::npos; at = console.find(begin, at + 1)) {
    const std::string_view line =
        console.substr(at + begin.size() - 1, console.find_first_of("\r\n", at) - at - begin.size() + 1);
    const auto result = nlohmann::json::parse(line, nullptr, false);
    EXPECT_FALSE(result.is_discarded()) << line;
    if (!result.is_discarded()) results.push_back(result);
  }
  return results;
}

} // namespace cppvmm::testing
