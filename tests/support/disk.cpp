#include "disk.hpp"

#include "kernel_files.hpp"

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <expected>
#include <fcntl.h>
#include <sched.h>
#include <string>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <system_error>
#include <thread>
#include <unistd.h>

namespace cppvmm::test {
namespace {

constexpr const char* zram_control = "/sys/class/zram-control";

std::unexpected<std::string> failure(const std::string& what) {
  return std::unexpected(what + ": " + std::generic_category().message(errno));
}

/// Runs mke2fs, whose words nobody needs.
bool make_file_system(const char* node) {
  const pid_t child = fork();
  if (child == 0) {
    const int nowhere = open("/dev/null", O_RDWR);
    for (const int stream : {0, 1, 2})
      dup2(nowhere, stream);
    execlp("mke2fs", "mke2fs", "-F", "-b", "4096", node, nullptr);
    _exit(127);
  }
  int status = 0;
  while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/// Has files made of extents from now on, as all are on ext4: busybox's mke2fs makes none that are.
bool use_extents(const char* node) {
  // fs/ext4/ext4.h, struct ext4_super_block: the super block is at 1024, s_feature_incompat at 0x60 of it.
  constexpr off_t features_at = 1024 + 0x60;
  constexpr std::uint32_t extents = 0x40;
  const Descriptor disk(open(node, O_RDWR | O_CLOEXEC));
  std::uint32_t features = 0;
  if (!disk.is_open() || pread(disk.number(), &features, sizeof features, features_at) != sizeof features) return false;
  features |= extents;
  return pwrite(disk.number(), &features, sizeof features, features_at) == sizeof features && fsync(disk.number()) == 0;
}

std::expected<Descriptor, std::string> mount_and_open(const std::string& folder) {
  if (unshare(CLONE_NEWNS) != 0) return failure("a mount namespace");
  if (mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return failure("mounts that others do not see");
  const std::string on = folder + "/on";
  if (mount((folder + "/node").c_str(), on.c_str(), "ext4", 0, nullptr) != 0) return failure("mount of an ext4");
  std::string name = on + "/file-XXXXXX";
  Descriptor file(mkostemp(name.data(), O_CLOEXEC));
  if (!file.is_open()) return failure("a file on an ext4");
  unlink(name.c_str());
  return file;
}

} // namespace

std::expected<Disk, std::string> Disk::make() {
  Disk disk;
  // To read it makes a device.
  disk.device_ = kernel_number(std::string(zram_control) + "/hot_add");
  if (disk.device_ < 0) return std::unexpected("no zram device can be made (needs root and CONFIG_ZRAM)");
  const std::string sys = "/sys/block/zram" + std::to_string(disk.device_);
  if (!tell_kernel(sys + "/disksize", "64M")) return failure("the size of a zram device");
  unsigned major_number = 0;
  unsigned minor_number = 0;
  // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
  if (std::sscanf(kernel_text(sys + "/dev").c_str(), "%u:%u", &major_number, &minor_number) != 2)
    return std::unexpected("no number of a zram device");
  char path[] = "/tmp/cppvmm-disk-XXXXXX";
  if (mkdtemp(path) == nullptr) return failure("mkdtemp");
  disk.folder_ = path;
  const std::string node = disk.folder_ + "/node";
  if (mkdir((disk.folder_ + "/on").c_str(), 0700) != 0) return failure("mkdir");
  if (mknod(node.c_str(), S_IFBLK | 0600, makedev(major_number, minor_number)) != 0)
    return failure("mknod of a zram device");
  if (!make_file_system(node.c_str())) return std::unexpected("mke2fs makes no file system here");
  if (!use_extents(node.c_str())) return failure("write to a zram device");
  if (const auto tried = disk.file(); !tried) return std::unexpected(tried.error());
  return disk;
}

Disk::~Disk() {
  if (!folder_.empty()) {
    unlink((folder_ + "/node").c_str());
    rmdir((folder_ + "/on").c_str());
    rmdir(folder_.c_str());
  }
  if (device_ >= 0) static_cast<void>(tell_kernel(std::string(zram_control) + "/hot_remove", std::to_string(device_)));
}

std::expected<Descriptor, std::string> Disk::file() const {
  // A thread has a mount namespace of its own, and the process's descriptors.
  std::expected<Descriptor, std::string> file = std::unexpected(std::string());
  std::thread([&] { file = mount_and_open(folder_); }).join();
  return file;
}

} // namespace cppvmm::test
