// Linux guests in cppvmm-boot. CPPVMM_LINUX names a bzImage, as distributions have it; CPPVMM_LINUX_FLAT the same
// kernel in a form that boots sooner (tests/lab/flat_kernel.py), if there is one; CPPVMM_BUSYBOX a busybox that is
// linked statically (default: /bin/busybox), for the guest's programs; CPPVMM_GUEST_MODULES the folder of the modules
// of tests/guests/linux, built for that kernel.
#pragma once

#include "program.hpp"

#include <filesystem>
#include <functional>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace cppvmm::testing {

/// A file as a whole; empty when it cannot be read.
[[nodiscard]] std::string contents(const std::string& path);

/// A file in the tests' folder, gone with the object.
class File {
public:
  File(const std::string& name, std::string_view bytes);
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();
  [[nodiscard]] std::string path() const { return path_.string(); }

private:
  std::filesystem::path path_;
};

/// A file of the guest's.
struct GuestFile {
  std::string path; ///< Relative to the root; its folder is /, /bin or /dev.
  std::string bytes;
};

/// An initial file system: busybox, the script that is all of the guest's user space, and `more`.
[[nodiscard]] std::string initial_file_system(std::string_view busybox, std::string_view init,
                                              const std::vector<GuestFile>& more = {});

/// A bzImage as small as one can be: its kernel is `code`, of at most 0xE00 bytes, entered in 64-bit mode with RSI at
/// the zero page.
[[nodiscard]] std::string small_image(std::string_view code);

/// The kernel's parameters for a guest whose console is read and that ends by a reset; the way of the reset (Linux's
/// parameter `reboot`) comes after it.
// Without CMPXCHG16B, after which QEMU's emulated processor (7.2, in the lab) once came back from an exit with flags
// that were none: a double fault in the guest.
inline constexpr const char* linux_command_line = "console=ttyS0 quiet panic=-1 clearcpuid=cx16 reboot=";

/// Whether cppvmm-boot ended because this KVM lacks the transport, or this kernel has no write watch; not if it only
/// says so.
[[nodiscard]] bool lacks_transport(const Ended& ended);
[[nodiscard]] bool lacks_write_watch(const Ended& ended);

/// Runs a Linux guest to its end; in the lab up to three times more, saying so, where its kernel crashed or it came to
/// no end. So did some of a hundred boots, on either kernel and over each transport, where the emulated machine had two
/// CPUs (tests/lab/README.md): an exception of user code was taken for one of the kernel's, an interrupt came while
/// they were off, or a RET left its own address in RSP. What crashes a guest each time fails here too; and outside the
/// lab nothing is run twice.
[[nodiscard]] Ended run_linux(const std::function<Ended()>& run);

/// Skipped, saying so, where KVM cannot be used.
class NeedsKvm : public ::testing::Test {
protected:
  void SetUp() override;
};

using Linux = NeedsKvm;

/// Boots the kernel that CPPVMM_LINUX names, or the same one in the form that CPPVMM_LINUX_FLAT names; skipped, saying
/// so, without one.
class LinuxBoots : public Linux {
protected:
  void SetUp() override;

  const std::string distributed_kernel; ///< Which decompresses itself.
  const std::string kernel;             ///< Which need not, if there is such a one.
  const std::string busybox;

  LinuxBoots();
};

/// Boots it with modules; skipped, saying so, when they are not built.
class LinuxLoads : public LinuxBoots {
protected:
  void SetUp() override;

  /// A module as a file of the guest's, at its root.
  [[nodiscard]] GuestFile module(const std::string& name) const;

  const std::string modules;

  LinuxLoads();
};

/// The lines that modules put on the console, in order.
[[nodiscard]] std::vector<nlohmann::json> module_results(std::string_view console);

} // namespace cppvmm::testing
