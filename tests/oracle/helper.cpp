#include "helper.hpp"

#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <string>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <system_error>
#include <unistd.h>

namespace cppvmm::oracle {

constexpr std::uint64_t page_bytes = 4096;

struct Helper::Command {
  enum class Kind : std::uint32_t { store, write, write_process } kind{};
  std::uint32_t count = 0;
  std::uint64_t where = 0; ///< Offset in the file, or address.
  std::uint32_t at = 0;
  std::uint32_t value = 0;
};

std::expected<Helper, std::string> Helper::start() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
    return std::unexpected("socketpair: " + std::generic_category().message(errno));
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    close(ends[0]);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(0);
    // What a terminal sends to all of a group is for the parent to act on.
    for (const int signal : {SIGINT, SIGTERM, SIGHUP})
      std::signal(signal, SIG_IGN);
    serve(ends[1], parent);
  }
  const int error = errno;
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    return std::unexpected("fork: " + std::generic_category().message(error));
  }
  // Where Yama restricts ptrace, a child may not write to its parent unless it is named; elsewhere this is EINVAL.
  static_cast<void>(prctl(PR_SET_PTRACER, pid, 0, 0, 0));
  return Helper(pid, ends[0]);
}

Helper::~Helper() {
  if (pid_ < 0) return;
  close(socket_);
  while (waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

void Helper::serve(int socket, pid_t parent) {
  for (;;) {
    Command command{};
    iovec part{&command, sizeof command};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    if (got < 0 && errno == EINTR) continue;
    if (got != sizeof command) _exit(0);
    int fd = -1;
    if (const cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr && header->cmsg_type == SCM_RIGHTS)
      std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
    const int result = carry_out(command, fd, parent);
    if (fd >= 0) close(fd);
    if (::send(socket, &result, sizeof result, 0) != sizeof result) _exit(0);
  }
}

int Helper::carry_out(const Command& command, int fd, pid_t parent) {
  const auto value = static_cast<unsigned char>(command.value);
  if (command.kind == Command::Kind::store) {
    // The kernel takes whole huge pages only of a hugetlb file.
    constexpr std::uint64_t huge = std::uint64_t{2} << 20;
    const std::uint64_t first = command.where & ~(huge - 1);
    const std::uint64_t end = command.where + command.count * page_bytes;
    const std::size_t bytes = (end - first + huge - 1) & ~(huge - 1);
    void* const view = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(first));
    if (view == MAP_FAILED) return errno;
    for (std::uint32_t page = 0; page < command.count; ++page)
      static_cast<volatile unsigned char*>(view)[command.where - first + page * page_bytes + command.at] = value;
    munmap(view, bytes);
    return 0;
  }
  for (std::uint32_t page = 0; page < command.count; ++page) {
    const std::uint64_t where = command.where + page * page_bytes + command.at;
    ssize_t done = 0;
    if (command.kind == Command::Kind::write) {
      done = pwrite(fd, &value, 1, static_cast<off_t>(where));
    } else {
      unsigned char byte = value;
      const iovec from{&byte, 1};
      const iovec into{reinterpret_cast<void*>(where), 1};
      done = process_vm_writev(parent, &from, 1, &into, 1, 0);
    }
    if (done != 1) return done < 0 ? errno : EIO;
  }
  return 0;
}

int Helper::send(const Command& command, int fd) {
  Command copy = command;
  iovec part{&copy, sizeof copy};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  if (sendmsg(socket_, &message, MSG_NOSIGNAL) != sizeof copy) return errno != 0 ? errno : EIO;
  int result = 0;
  ssize_t got = 0;
  do
    got = recv(socket_, &result, sizeof result, 0);
  while (got < 0 && errno == EINTR);
  return got == sizeof result ? result : ESRCH;
}

int Helper::store(int fd, std::uint64_t offset, std::uint32_t count, std::uint32_t at, std::uint8_t value) {
  return send({.kind = Command::Kind::store, .count = count, .where = offset, .at = at, .value = value}, fd);
}
int Helper::write(int fd, std::uint64_t offset, std::uint32_t count, std::uint32_t at, std::uint8_t value) {
  return send({.kind = Command::Kind::write, .count = count, .where = offset, .at = at, .value = value}, fd);
}
int Helper::write_process(void* host, std::uint32_t count, std::uint32_t at, std::uint8_t value) {
  return send({.kind = Command::Kind::write_process,
               .count = count,
               .where = reinterpret_cast<std::uintptr_t>(host),
               .at = at,
               .value = value},
              -1);
}

} // namespace cppvmm::oracle
