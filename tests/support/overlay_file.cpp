#include "overlay_file.hpp"

#include "kernel_files.hpp"
#include "temporary_file.hpp"

#include <cerrno>
#include <expected>
#include <fcntl.h>
#include <sched.h>
#include <string>
#include <sys/mount.h>
#include <sys/stat.h>
#include <system_error>
#include <thread>
#include <unistd.h>

namespace cppvmm::test {
namespace {

std::unexpected<std::string> failed(const std::string& what) {
  return std::unexpected(what + ": " + std::generic_category().message(errno));
}

std::expected<Descriptor, std::string> mount_and_open(const std::string& folder) {
  if (unshare(CLONE_NEWNS) != 0) return failed("a mount namespace");
  if (mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return failed("mounts that others do not see");
  if (mount("tmpfs", folder.c_str(), "tmpfs", 0, nullptr) != 0) return failed("a tmpfs");
  for (const char* const name : {"/lower", "/upper", "/work", "/overlay"})
    if (mkdir((folder + name).c_str(), 0700) != 0) return failed(folder + name);
  const std::string layers = "lowerdir=" + folder + "/lower,upperdir=" + folder + "/upper,workdir=" + folder + "/work";
  const std::string overlay = folder + "/overlay";
  if (mount("overlay", overlay.c_str(), "overlay", 0, layers.c_str()) != 0) return failed("an overlay");
  Descriptor file(open((overlay + "/file").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!file.is_open()) return failed("a file on an overlay");
  return file;
}

} // namespace

std::expected<Descriptor, std::string> overlay_file() {
  if (geteuid() != 0) return std::unexpected("mounting needs root");
  if (kernel_text("/proc/filesystems").find("\toverlay\n") == std::string::npos)
    return std::unexpected("this kernel has no overlayfs loaded");
  // A thread has a mount namespace of its own, and the process's descriptors.
  std::expected<Descriptor, std::string> file = std::unexpected(std::string());
  std::thread([&] { file = mount_and_open(temporary_folder()); }).join();
  return file;
}

} // namespace cppvmm::test
