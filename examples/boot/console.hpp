// Where a guest's serial port ends: this program's standard input and output.
#pragma once

#include <boost/asio/io_context.hpp>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>

namespace cppvmm::boot {

/// Writes a character of the guest's to `descriptor`, in full. What cannot be written is lost.
void write_to_console(int descriptor, char character);

/// Standard input for a guest: what is typed comes at once and is not echoed, while the keys for signals keep working.
/// Nothing comes from a descriptor that cannot be waited for (a file, /dev/null), nor from the terminal of another
/// foreground process. The terminal is as it was when the object is gone.
class ConsoleInput {
public:
  /// `receive` takes bytes and says how many it took; those that it did not are kept until `resume`. Called by the
  /// thread that runs `io`, where the object is destroyed too: then nothing is received any more, and what was kept is
  /// lost.
  ConsoleInput(boost::asio::io_context& io, std::function<std::size_t(std::span<const char>)> receive);
  ConsoleInput(const ConsoleInput&) = delete;
  ConsoleInput& operator=(const ConsoleInput&) = delete;
  ~ConsoleInput();

  /// There is room again. From any thread.
  void resume();

private:
  struct State;
  std::shared_ptr<State> state_;
};

} // namespace cppvmm::boot
