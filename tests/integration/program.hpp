// Runs a program as a user does, and keeps what it prints.
#pragma once

#include <string>
#include <sys/types.h>
#include <vector>

namespace cppvmm::testing {

struct Ended {
  int status = -1; ///< Exit status; 128 + signal when a signal killed it.
  std::string out;
  std::string err;
};

/// What standard error is to the program.
enum class Stderr { file, terminal };

/// What standard input is to the program: /dev/null, a pipe, or a terminal that does not control it.
enum class Stdin { nothing, pipe, terminal };

/// A started program.
class Program {
public:
  Program(std::string path, std::vector<std::string> arguments, Stderr kind = Stderr::file,
          Stdin input = Stdin::nothing);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  /// Kills it if it still runs.
  ~Program();

  [[nodiscard]] pid_t pid() const { return pid_; }
  /// With a terminal: reads on until `text` was printed; false when the program ended before.
  [[nodiscard]] bool wait_for_stderr(const std::string& text);
  /// Writes to its standard input, which is not /dev/null.
  void send(const std::string& text);
  /// The other end of its standard input, or -1; of a terminal, tcgetattr tells the mode.
  [[nodiscard]] int input() const { return in_; }
  [[nodiscard]] Ended wait();

private:
  bool read_terminal();

  pid_t pid_ = -1;
  int in_ = -1;
  int out_ = -1;
  int err_ = -1;
  bool terminal_;
  std::string terminal_text_;
};

/// Without the lines in which cppvmm-boot says how far its guest is, every ten seconds: a slow machine's runs have
/// some.
[[nodiscard]] Ended run_program(const std::string& path, const std::vector<std::string>& arguments);

} // namespace cppvmm::testing
