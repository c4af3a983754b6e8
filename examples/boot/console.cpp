#include "console.hpp"

#include <array>
#include <boost/asio/buffer.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/system/error_code.hpp>
#include <cerrno>
#include <cstddef>
#include <fcntl.h>
#include <optional>
#include <poll.h>
#include <termios.h>
#include <unistd.h>
#include <utility>

namespace cppvmm::boot {

void write_to_console(int descriptor, char character) {
  while (write(descriptor, &character, 1) != 1) {
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return;
    pollfd writable{.fd = descriptor, .events = POLLOUT, .revents = 0};
    if (poll(&writable, 1, -1) < 0 && errno != EINTR) return;
  }
}

struct ConsoleInput::State : std::enable_shared_from_this<State> {
  boost::asio::posix::stream_descriptor input;
  std::function<std::size_t(std::span<const char>)> receive;
  std::array<char, 256> buffer{};
  std::span<const char> waiting; // in `buffer`, for there was no room
  std::optional<termios> terminal_before;

  State(boost::asio::io_context& io, std::function<std::size_t(std::span<const char>)> receiver)
      : input(io), receive(std::move(receiver)) {}

  void read() {
    input.async_read_some(boost::asio::buffer(buffer),
                          [self = shared_from_this()](const boost::system::error_code& error, std::size_t count) {
                            if (error) return; // the end of the input
                            self->waiting = std::span(self->buffer).first(count);
                            self->deliver();
                          });
  }

  void deliver() {
    if (!input.is_open()) return; // gone, while this was on its way
    waiting = waiting.subspan(receive(waiting));
    if (waiting.empty()) read();
  }
};

ConsoleInput::ConsoleInput(boost::asio::io_context& io, std::function<std::size_t(std::span<const char>)> receive)
    : state_(std::make_shared<State>(io, std::move(receive))) {
  const bool terminal = isatty(STDIN_FILENO) == 1;
  // -1: it is not the terminal that controls this process, and anybody may read from it.
  if (const pid_t foreground = terminal ? tcgetpgrp(STDIN_FILENO) : -1; foreground >= 0 && foreground != getpgrp())
    return;
  // Opened anew: waiting makes it non-blocking, which the one that is shared with the shell and with standard output
  // must not become.
  const int own = open("/proc/self/fd/0", O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
  if (own < 0) return;
  boost::system::error_code error;
  if (state_->input.assign(own, error)) {
    close(own);
    return;
  }
  termios mode{};
  if (terminal && tcgetattr(STDIN_FILENO, &mode) == 0) {
    state_->terminal_before = mode;
    mode.c_iflag &= ~static_cast<tcflag_t>(ICRNL | INLCR);
    mode.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO | IEXTEN);
    tcsetattr(STDIN_FILENO, TCSANOW, &mode);
  }
  state_->read();
}

ConsoleInput::~ConsoleInput() {
  boost::system::error_code error;
  [[maybe_unused]] const auto closed = state_->input.close(error); // it is gone in any case
  if (state_->terminal_before) tcsetattr(STDIN_FILENO, TCSANOW, &*state_->terminal_before);
}

void ConsoleInput::resume() {
  boost::asio::post(state_->input.get_executor(), [state = state_] {
    if (!state->waiting.empty()) state->deliver();
  });
}

} // namespace cppvmm::boot
