#include "serial.hpp"

#include <algorithm>
#include <linux/serial_reg.h>

namespace cppvmm::boot {
namespace {

constexpr std::uint8_t iir_fifos_enabled = 0xC0; // a 16550A's; <linux/serial_reg.h> has no name for it

} // namespace

std::uint8_t Serial::interrupt_cause() const {
  if ((interrupt_enable_ & UART_IER_RDI) != 0 && !received_.empty()) return UART_IIR_RDI;
  if ((interrupt_enable_ & UART_IER_THRI) != 0 && transmitter_emptied_) return UART_IIR_THRI;
  return UART_IIR_NO_INT;
}

std::uint8_t Serial::modem_status() const {
  if ((modem_control_ & UART_MCR_LOOP) == 0) return UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS;
  // The outputs are wired to the inputs.
  std::uint8_t status = 0;
  if ((modem_control_ & UART_MCR_DTR) != 0) status |= UART_MSR_DSR;
  if ((modem_control_ & UART_MCR_RTS) != 0) status |= UART_MSR_CTS;
  if ((modem_control_ & UART_MCR_OUT1) != 0) status |= UART_MSR_RI;
  if ((modem_control_ & UART_MCR_OUT2) != 0) status |= UART_MSR_DCD;
  return status;
}

// On a PC, OUT2 connects the chip to the interrupt line.
void Serial::update_interrupt() {
  const bool active = (modem_control_ & UART_MCR_OUT2) != 0 && interrupt_cause() != UART_IIR_NO_INT;
  if (active == line_active_) return;
  line_active_ = active;
  callbacks_.interrupt(active);
}

std::uint8_t Serial::read(std::uint16_t offset) {
  const std::lock_guard lock(mutex_);
  const bool divisor = (line_control_ & UART_LCR_DLAB) != 0;
  switch (offset) {
  case UART_RX: {
    if (divisor) return static_cast<std::uint8_t>(divisor_);
    if (received_.empty()) return 0;
    const bool was_full = received_.size() == queue_bytes;
    const auto value = static_cast<std::uint8_t>(received_.front());
    received_.pop_front();
    update_interrupt();
    if (was_full) callbacks_.room();
    return value;
  }
  case UART_IER:
    return divisor ? static_cast<std::uint8_t>(divisor_ >> 8) : interrupt_enable_;
  case UART_IIR: {
    const std::uint8_t cause = interrupt_cause();
    if (cause == UART_IIR_THRI) {
      transmitter_emptied_ = false;
      update_interrupt();
    }
    return cause | (fifo_enabled_ ? iir_fifos_enabled : 0);
  }
  case UART_LCR:
    return line_control_;
  case UART_MCR:
    return modem_control_;
  case UART_LSR:
    return static_cast<std::uint8_t>(UART_LSR_THRE | UART_LSR_TEMT | (received_.empty() ? 0 : UART_LSR_DR));
  case UART_MSR:
    return modem_status();
  case UART_SCR:
    return scratch_;
  default:
    return 0xFF;
  }
}

void Serial::write(std::uint16_t offset, std::uint8_t value) {
  const std::lock_guard lock(mutex_);
  const bool divisor = (line_control_ & UART_LCR_DLAB) != 0;
  switch (offset) {
  case UART_TX:
    if (divisor) {
      divisor_ = static_cast<std::uint16_t>((divisor_ & 0xFF00) | value);
      return;
    }
    if ((modem_control_ & UART_MCR_LOOP) == 0)
      callbacks_.transmit(static_cast<char>(value));
    else if (received_.size() < queue_bytes)
      received_.push_back(static_cast<char>(value));
    // Full for a moment, and empty again: an edge on the line, which is edge-triggered.
    transmitter_emptied_ = false;
    update_interrupt();
    transmitter_emptied_ = true;
    break;
  case UART_IER:
    if (divisor) {
      divisor_ = static_cast<std::uint16_t>(value << 8 | (divisor_ & 0xFF));
      return;
    }
    if ((value & ~interrupt_enable_ & UART_IER_THRI) != 0) transmitter_emptied_ = true;
    interrupt_enable_ = value & (UART_IER_RDI | UART_IER_THRI | UART_IER_RLSI | UART_IER_MSI);
    break;
  case UART_FCR:
    fifo_enabled_ = (value & UART_FCR_ENABLE_FIFO) != 0;
    if ((value & UART_FCR_CLEAR_RCVR) != 0) {
      const bool was_full = received_.size() == queue_bytes;
      received_.clear();
      if (was_full) callbacks_.room();
    }
    break;
  case UART_LCR:
    line_control_ = value;
    break;
  case UART_MCR:
    modem_control_ = value & (UART_MCR_LOOP | UART_MCR_OUT2 | UART_MCR_OUT1 | UART_MCR_RTS | UART_MCR_DTR);
    break;
  case UART_SCR:
    scratch_ = value;
    break;
  default:
    break;
  }
  update_interrupt();
}

std::size_t Serial::receive(std::span<const char> bytes) {
  const std::lock_guard lock(mutex_);
  const auto taken = bytes.first(std::min(bytes.size(), queue_bytes - received_.size()));
  received_.insert(received_.end(), taken.begin(), taken.end());
  update_interrupt();
  return taken.size();
}

// The registers' bytes, and then those that were received.
std::vector<std::uint8_t> Serial::state() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::uint8_t> state = {interrupt_enable_,
                                     static_cast<std::uint8_t>(fifo_enabled_),
                                     line_control_,
                                     modem_control_,
                                     scratch_,
                                     static_cast<std::uint8_t>(divisor_),
                                     static_cast<std::uint8_t>(divisor_ >> 8),
                                     static_cast<std::uint8_t>(transmitter_emptied_),
                                     static_cast<std::uint8_t>(line_active_)};
  for (const char each : received_)
    state.push_back(static_cast<std::uint8_t>(each));
  return state;
}

bool Serial::restore(std::span<const std::uint8_t> state) {
  constexpr std::size_t registers = 9;
  if (state.size() < registers || state.size() > registers + queue_bytes) return false;
  const std::lock_guard lock(mutex_);
  interrupt_enable_ = state[0];
  fifo_enabled_ = state[1] != 0;
  line_control_ = state[2];
  modem_control_ = state[3];
  scratch_ = state[4];
  divisor_ = static_cast<std::uint16_t>(state[5] | state[6] << 8);
  transmitter_emptied_ = state[7] != 0;
  line_active_ = state[8] != 0;
  received_.assign(state.begin() + registers, state.end());
  return true;
}

std::size_t Serial::room() const {
  const std::lock_guard lock(mutex_);
  return queue_bytes - received_.size();
}

} // namespace cppvmm::boot
