// Work in a process of its own, for what cannot be undone: a user, a folder, a filter of system calls.
#pragma once

#include "descriptor.hpp"

#include <array>
#include <cstddef>
#include <exception>
#include <fcntl.h>
#include <functional>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

namespace cppvmm::test {

/// Runs it in a forked child: what it complains of, or how the child ended. Empty: all is well.
inline std::string in_child(const std::function<std::string()>& work) {
  std::array<int, 2> ends{};
  if (pipe2(ends.data(), O_CLOEXEC) != 0) return "pipe2";
  Descriptor from(ends[0]);
  Descriptor to(ends[1]);
  const pid_t child = fork();
  if (child < 0) return "fork";
  if (child == 0) {
    std::string said;
    try {
      said = work();
    } catch (const std::exception& thrown) {
      said = std::string("thrown: ") + thrown.what();
    }
    _exit(said.empty() ? 0 : (write(to.number(), said.data(), said.size()) > 0 ? 1 : 2));
  }
  to = Descriptor();
  std::string said;
  std::array<char, 4096> buffer;
  for (ssize_t got = 0; (got = read(from.number(), buffer.data(), buffer.size())) > 0;)
    said.append(buffer.data(), static_cast<std::size_t>(got));
  int status = 0;
  if (waitpid(child, &status, 0) != child) return "waitpid";
  if (said.empty() && status != 0) return "the child ended with status " + std::to_string(status);
  return said;
}

} // namespace cppvmm::test
