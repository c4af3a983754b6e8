#include "program.hpp"

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <fcntl.h>
#include <spawn.h>
#include <sstream>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <sys/wait.h>
#include <system_error>
#include <tuple>
#include <unistd.h>
#include <utility>

extern char** environ;

namespace cppvmm::testing {
namespace {

int check(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

std::string contents(int fd) {
  std::string text;
  char buffer[4096];
  for (off_t at = 0;;) {
    const ssize_t count = pread(fd, buffer, sizeof buffer, at);
    if (count <= 0) return text;
    text.append(buffer, static_cast<std::size_t>(count));
    at += count;
  }
}

/// The two ends of a terminal: the one that types, and the program's.
std::pair<int, int> make_terminal() {
  const int near = check(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC), "posix_openpt");
  check(grantpt(near), "grantpt");
  check(unlockpt(near), "unlockpt");
  char name[64];
  if (const int error = ptsname_r(near, name, sizeof name); error != 0)
    throw std::system_error(error, std::generic_category(), "ptsname_r");
  return {near, check(open(name, O_RDWR | O_NOCTTY | O_CLOEXEC), "open pts")};
}

std::string without_progress(const std::string& text) {
  std::istringstream lines(text);
  std::string kept;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("cppvmm-boot: the guest zeroes its memory, ") ||
        line == "cppvmm-boot: the guest finds out what to zero")
      continue;
    kept += line;
    if (!lines.eof()) kept += '\n';
  }
  return kept;
}

} // namespace

Program::Program(std::string path, std::vector<std::string> arguments, Stderr kind, Stdin input)
    : terminal_(kind == Stderr::terminal) {
  int child_in = -1;
  if (input == Stdin::pipe) {
    int ends[2];
    check(pipe2(ends, O_CLOEXEC), "pipe2");
    child_in = ends[0];
    in_ = ends[1];
  } else if (input == Stdin::terminal) {
    std::tie(in_, child_in) = make_terminal();
  }
  out_ = check(memfd_create("stdout", MFD_CLOEXEC), "memfd_create");
  int child_err = -1;
  if (terminal_) {
    std::tie(err_, child_err) = make_terminal();
  } else {
    err_ = check(memfd_create("stderr", MFD_CLOEXEC), "memfd_create");
    child_err = err_;
  }

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  if (child_in >= 0)
    posix_spawn_file_actions_adddup2(&actions, child_in, STDIN_FILENO);
  else
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, out_, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, child_err, STDERR_FILENO);
  std::vector<char*> argv{path.data()};
  for (auto& argument : arguments)
    argv.push_back(argument.data());
  argv.push_back(nullptr);
  const int error = posix_spawn(&pid_, path.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (terminal_) close(child_err);
  if (child_in >= 0) close(child_in);
  if (error != 0) throw std::system_error(error, std::generic_category(), path);
}

Program::~Program() {
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  if (in_ >= 0) close(in_);
  close(out_);
  close(err_);
}

void Program::send(const std::string& text) {
  check(static_cast<int>(write(in_, text.data(), text.size())), "write to standard input");
}

bool Program::read_terminal() {
  char buffer[512];
  const ssize_t count = read(err_, buffer, sizeof buffer); // EIO once the other end is closed
  if (count <= 0) return false;
  terminal_text_.append(buffer, static_cast<std::size_t>(count));
  return true;
}

bool Program::wait_for_stderr(const std::string& text) {
  while (terminal_text_.find(text) == std::string::npos)
    if (!read_terminal()) return false;
  return true;
}

Ended Program::wait() {
  if (terminal_)
    while (read_terminal()) {
    }
  int status = 0;
  while (waitpid(pid_, &status, 0) < 0)
    if (errno != EINTR) throw std::system_error(errno, std::generic_category(), "waitpid");
  pid_ = -1;
  return {.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
          .out = contents(out_),
          .err = terminal_ ? terminal_text_ : contents(err_)};
}

Ended run_program(const std::string& path, const std::vector<std::string>& arguments) {
  Ended ended = Program(path, arguments).wait();
  ended.err = without_progress(ended.err);
  return ended;
}

} // namespace cppvmm::testing
