// A 16550A serial port, as far as a driver and a console need one. Pure: what it sends and its interrupt are callbacks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

namespace cppvmm::boot {

/// The line is never busy, has no errors, and a peer that is always ready. All members may be called from any thread;
/// the callbacks are called with a lock held and must not call back.
class Serial {
public:
  static constexpr std::uint16_t ports = 8;
  /// Bytes that wait for the guest: more than the chip's 16, for a person who types while the guest is busy.
  static constexpr std::size_t queue_bytes = 1024;

  struct Callbacks {
    std::function<void(char)> transmit;
    std::function<void(bool active)> interrupt; ///< Called when the line changes.
    std::function<void()> room;                 ///< There is room again after there was none.
  };
  explicit Serial(Callbacks callbacks) : callbacks_(std::move(callbacks)) {}

  /// The guest reads or writes register `offset`, below `ports`.
  [[nodiscard]] std::uint8_t read(std::uint16_t offset);
  void write(std::uint16_t offset, std::uint8_t value);

  /// Bytes for the guest; takes as many as there is room for and says how many.
  std::size_t receive(std::span<const char> bytes);
  [[nodiscard]] std::size_t room() const;

  /// The registers and what waits for the guest, for another one to go on from; its interrupt line is as it was.
  [[nodiscard]] std::vector<std::uint8_t> state() const;
  /// False, and nothing is changed, for bytes that are no state.
  [[nodiscard]] bool restore(std::span<const std::uint8_t> state);

private:
  [[nodiscard]] std::uint8_t interrupt_cause() const;
  [[nodiscard]] std::uint8_t modem_status() const;
  void update_interrupt();

  Callbacks callbacks_;
  mutable std::mutex mutex_;
  std::deque<char> received_;
  std::uint8_t interrupt_enable_ = 0;
  bool fifo_enabled_ = false;
  std::uint8_t line_control_ = 0;
  std::uint8_t modem_control_ = 0;
  std::uint8_t scratch_ = 0;
  std::uint16_t divisor_ = 12;       // 9600 baud
  bool transmitter_emptied_ = false; // and the guest has not been told
  bool line_active_ = false;
};

} // namespace cppvmm::boot
