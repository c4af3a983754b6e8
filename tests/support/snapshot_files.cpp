#include "snapshot_files.hpp"

#include "temporary_file.hpp"

#include <cerrno>
#include <cstdint>
#include <expected>
#include <fcntl.h>
#include <linux/btrfs.h>
#include <linux/loop.h>
#include <sched.h>
#include <spawn.h>
#include <string>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

namespace cppvmm::test {

const char* to_string(SnapshotPlace place) {
  switch (place) {
  case SnapshotPlace::ramfs:
    return "ramfs";
  case SnapshotPlace::squashfs:
    return "squashfs";
  case SnapshotPlace::erofs:
    return "erofs";
  case SnapshotPlace::btrfs:
    return "btrfs";
  case SnapshotPlace::btrfs_subvolume:
    return "btrfs_subvolume";
  case SnapshotPlace::overlay:
    return "overlay";
  case SnapshotPlace::block_device:
    return "block_device";
  }
  return "unknown";
}

namespace {

using Result = std::expected<SnapshotFiles, std::string>;

std::unexpected<std::string> failed(const std::string& what) {
  return std::unexpected(what + ": " + std::generic_category().message(errno));
}

/// Empty if it ran and said that all is well.
std::string run(std::vector<std::string> words) {
  std::vector<char*> arguments;
  arguments.reserve(words.size() + 1);
  for (std::string& word : words)
    arguments.push_back(word.data());
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
  pid_t child = 0;
  const int error = posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return words[0] + ": " + std::generic_category().message(error);
  int status = 0;
  if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
    return words[0] + " does not do it here";
  return {};
}

bool make_file(const std::string& path, std::uint64_t pages, const std::vector<std::uint64_t>& with_data) {
  const Descriptor file(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!file.is_open() || ftruncate(file.number(), static_cast<off_t>(pages * 4096)) != 0) return false;
  for (const std::uint64_t page : with_data)
    if (pwrite(file.number(), "\1", 1, static_cast<off_t>(page * 4096 + 77)) != 1) return false;
  return fsync(file.number()) == 0;
}

/// A device whose content is the file's, which ends with the last descriptor of it.
std::expected<Descriptor, std::string> loop_device(const std::string& path, bool is_read_only, std::string& name) {
  const Descriptor file(open(path.c_str(), (is_read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC));
  const Descriptor control(open("/dev/loop-control", O_RDWR | O_CLOEXEC));
  if (!file.is_open() || !control.is_open()) return failed("a loop device");
  // Others take free ones too.
  constexpr int attempts = 16;
  for (int attempt = 0; attempt < attempts; ++attempt) {
    const int number = ioctl(control.number(), LOOP_CTL_GET_FREE);
    if (number < 0) return failed("a free loop device");
    name = "/dev/loop" + std::to_string(number);
    Descriptor device(open(name.c_str(), (is_read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC));
    if (!device.is_open()) return failed(name);
    loop_config config{};
    config.fd = static_cast<std::uint32_t>(file.number());
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR | (is_read_only ? LO_FLAGS_READ_ONLY : 0U);
    if (ioctl(device.number(), LOOP_CONFIGURE, &config) == 0) return device;
    if (errno != EBUSY) return failed("LOOP_CONFIGURE");
  }
  return std::unexpected("all loop devices are taken");
}

Result open_both(const std::string& file, const std::string& other) {
  SnapshotFiles files{.file = Descriptor(open(file.c_str(), O_RDONLY | O_CLOEXEC)),
                      .other = Descriptor(open(other.c_str(), O_RDONLY | O_CLOEXEC))};
  if (!files.file.is_open() || !files.other.is_open()) return failed(file);
  return files;
}

std::string mount_image(const std::string& image, const char* type, const std::string& at, bool is_read_only) {
  std::string name;
  const auto device = loop_device(image, is_read_only, name);
  if (!device) return device.error();
  if (mount(name.c_str(), at.c_str(), type, is_read_only ? MS_RDONLY : 0, nullptr) != 0)
    return std::string(type) + ": " + std::generic_category().message(errno);
  return {};
}

std::string make_subvolume(const std::string& folder, const std::string& name) {
  const Descriptor parent(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  btrfs_ioctl_vol_args request{};
  name.copy(request.name, sizeof request.name - 1);
  if (!parent.is_open() || ioctl(parent.number(), BTRFS_IOC_SUBVOL_CREATE, &request) != 0)
    return "a subvolume: " + std::generic_category().message(errno);
  return {};
}

Result make_files(SnapshotPlace place, std::uint64_t pages, const std::vector<std::uint64_t>& with_data) {
  const std::string folder = temporary_folder();
  if (unshare(CLONE_NEWNS) != 0) return failed("a mount namespace");
  if (mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return failed("mounts that others do not see");
  if (mount("tmpfs", folder.c_str(), "tmpfs", 0, nullptr) != 0) return failed("a tmpfs");
  const std::string in = folder + "/in";
  const std::string at = folder + "/at";
  const std::string image = folder + "/image";
  if (mkdir(in.c_str(), 0700) != 0 || mkdir(at.c_str(), 0700) != 0) return failed(at);
  const auto make_both = [&](const std::string& where) {
    return make_file(where + "/file", pages, with_data) && make_file(where + "/other", pages, with_data);
  };
  std::string error;
  switch (place) {
  case SnapshotPlace::ramfs:
    if (mount("ramfs", at.c_str(), "ramfs", 0, nullptr) != 0) return failed("ramfs");
    if (!make_both(at)) return failed("a file on ramfs");
    break;
  case SnapshotPlace::squashfs:
  case SnapshotPlace::erofs: {
    const bool is_squashfs = place == SnapshotPlace::squashfs;
    if (!make_both(in)) return failed("a file on tmpfs");
    error = is_squashfs ? run({"mksquashfs", in, image, "-quiet", "-no-progress"}) : run({"mkfs.erofs", image, in});
    if (error.empty()) error = mount_image(image, is_squashfs ? "squashfs" : "erofs", at, true);
    break;
  }
  case SnapshotPlace::btrfs:
  case SnapshotPlace::btrfs_subvolume: {
    if (!make_file(image, (std::uint64_t{200} << 20) / 4096, {})) return failed("an image on tmpfs");
    error = run({"mkfs.btrfs", "-q", image});
    if (error.empty()) error = mount_image(image, "btrfs", at, false);
    if (error.empty() && place == SnapshotPlace::btrfs && !make_both(at)) return failed("a file on btrfs");
    if (!error.empty() || place == SnapshotPlace::btrfs) break;
    for (const char* const name : {"one", "two"}) {
      if (error.empty()) error = make_subvolume(at, name);
      if (error.empty() && !make_file(at + "/" + name + "/file", pages, with_data)) return failed("a file on btrfs");
    }
    if (error.empty()) return open_both(at + "/one/file", at + "/two/file");
    break;
  }
  case SnapshotPlace::overlay: {
    for (const char* const name : {"/upper", "/work"})
      if (mkdir((folder + name).c_str(), 0700) != 0) return failed(folder + name);
    if (!make_both(in)) return failed("a file on tmpfs");
    const std::string layers = "lowerdir=" + in + ",upperdir=" + folder + "/upper,workdir=" + folder + "/work";
    if (mount("overlay", at.c_str(), "overlay", 0, layers.c_str()) != 0) return failed("an overlay");
    break;
  }
  case SnapshotPlace::block_device: {
    if (!make_both(in)) return failed("a file on tmpfs");
    std::string name;
    auto file = loop_device(in + "/file", true, name);
    if (!file) return std::unexpected(file.error());
    auto other = loop_device(in + "/other", true, name);
    if (!other) return std::unexpected(other.error());
    return SnapshotFiles{.file = std::move(*file), .other = std::move(*other)};
  }
  }
  if (!error.empty()) return std::unexpected(error);
  return open_both(at + "/file", at + "/other");
}

} // namespace

Result snapshot_files(SnapshotPlace place, std::uint64_t pages, const std::vector<std::uint64_t>& with_data) {
  if (geteuid() != 0) return std::unexpected("mounting needs root");
  // A thread has a mount namespace of its own, and the process's descriptors.
  Result files = std::unexpected(std::string());
  std::thread([&] { files = make_files(place, pages, with_data); }).join();
  return files;
}

} // namespace cppvmm::test
