#include "examples/boot/serial.hpp"

#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <linux/serial_reg.h>
#include <string>
#include <vector>

namespace {

using namespace cppvmm::boot;

class SerialPort : public testing::Test {
protected:
  [[nodiscard]] std::uint8_t cause() { return serial.read(UART_IIR) & 0x0F; }
  [[nodiscard]] bool line() const { return !edges.empty() && edges.back(); }
  void connect_interrupt() { serial.write(UART_MCR, UART_MCR_OUT2); }

  std::string sent;
  std::vector<bool> edges;
  int room_calls = 0;
  Serial serial{{.transmit = [this](char character) { sent += character; },
                 .interrupt = [this](bool active) { edges.push_back(active); },
                 .room = [this] { ++room_calls; }}};
};

TEST_F(SerialPort, SendsWhatIsWritten) {
  for (const char character : std::string("Linux\n"))
    serial.write(UART_TX, static_cast<std::uint8_t>(character));
  EXPECT_EQ(sent, "Linux\n");
  EXPECT_EQ(serial.read(UART_LSR), UART_LSR_THRE | UART_LSR_TEMT);
  EXPECT_TRUE(edges.empty()) << "no interrupt was asked for";
}

TEST_F(SerialPort, GivesWhatIsReceivedInOrder) {
  EXPECT_EQ(serial.receive(std::string("ab")), 2U);
  EXPECT_EQ(serial.read(UART_LSR) & UART_LSR_DR, UART_LSR_DR);
  EXPECT_EQ(serial.read(UART_RX), 'a');
  EXPECT_EQ(serial.read(UART_RX), 'b');
  EXPECT_EQ(serial.read(UART_LSR) & UART_LSR_DR, 0);
}

TEST_F(SerialPort, TheDivisorIsBehindItsLatch) {
  serial.write(UART_LCR, UART_LCR_DLAB | UART_LCR_WLEN8);
  serial.write(UART_DLL, 0x34);
  serial.write(UART_DLM, 0x12);
  EXPECT_EQ(serial.read(UART_DLL), 0x34);
  EXPECT_EQ(serial.read(UART_DLM), 0x12);
  serial.write(UART_LCR, UART_LCR_WLEN8);
  EXPECT_EQ(serial.read(UART_IER), 0);
  EXPECT_EQ(sent, "");
}

// What Linux's 8250 driver looks at before it believes in a 16550A.
TEST_F(SerialPort, PassesForA16550A) {
  serial.write(UART_IER, 0xFF);
  EXPECT_EQ(serial.read(UART_IER), 0x0F);
  serial.write(UART_IER, 0);
  EXPECT_EQ(serial.read(UART_IER), 0);
  serial.write(UART_MCR, UART_MCR_LOOP | UART_MCR_OUT2 | UART_MCR_RTS);
  EXPECT_EQ(serial.read(UART_MSR) & 0xF0, UART_MSR_DCD | UART_MSR_CTS);
  serial.write(UART_MCR, 0);
  EXPECT_EQ(serial.read(UART_MSR) & 0xF0, UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS);
  EXPECT_EQ(serial.read(UART_IIR) & 0xC0, 0);
  serial.write(UART_FCR, UART_FCR_ENABLE_FIFO);
  EXPECT_EQ(serial.read(UART_IIR) & 0xC0, 0xC0);
  serial.write(UART_SCR, 0x5A);
  EXPECT_EQ(serial.read(UART_SCR), 0x5A);
}

TEST_F(SerialPort, InterruptsWhenSomethingCameUntilItIsRead) {
  connect_interrupt();
  serial.write(UART_IER, UART_IER_RDI);
  EXPECT_FALSE(line());
  serial.receive(std::string("x"));
  EXPECT_TRUE(line());
  EXPECT_EQ(cause(), UART_IIR_RDI);
  EXPECT_TRUE(line()) << "looking at the cause changes nothing";
  EXPECT_EQ(serial.read(UART_RX), 'x');
  EXPECT_FALSE(line());
  EXPECT_EQ(cause(), UART_IIR_NO_INT);
}

TEST_F(SerialPort, InterruptsWhenItCanSendUntilTheCauseIsRead) {
  connect_interrupt();
  serial.write(UART_IER, UART_IER_THRI);
  EXPECT_TRUE(line()) << "it can send at once";
  EXPECT_EQ(cause(), UART_IIR_THRI);
  EXPECT_FALSE(line());
  EXPECT_EQ(cause(), UART_IIR_NO_INT);
  serial.write(UART_TX, 'x');
  EXPECT_TRUE(line());
}

TEST_F(SerialPort, EveryCharacterThatIsSentIsAnEdge) {
  connect_interrupt();
  serial.write(UART_IER, UART_IER_THRI);
  edges.clear();
  serial.write(UART_TX, 'a');
  serial.write(UART_TX, 'b');
  EXPECT_EQ(edges, (std::vector<bool>{false, true, false, true}));
}

TEST_F(SerialPort, ReceivingGoesBeforeSending) {
  connect_interrupt();
  serial.write(UART_IER, UART_IER_THRI | UART_IER_RDI);
  serial.receive(std::string("x"));
  EXPECT_EQ(cause(), UART_IIR_RDI);
  EXPECT_EQ(serial.read(UART_RX), 'x');
  EXPECT_EQ(cause(), UART_IIR_THRI);
}

TEST_F(SerialPort, Out2ConnectsTheInterruptLine) {
  serial.write(UART_IER, UART_IER_RDI);
  serial.receive(std::string("x"));
  EXPECT_FALSE(line());
  connect_interrupt();
  EXPECT_TRUE(line());
  serial.write(UART_MCR, 0);
  EXPECT_FALSE(line());
}

TEST_F(SerialPort, LoopsBackWithoutSending) {
  serial.write(UART_MCR, UART_MCR_LOOP);
  serial.write(UART_TX, 'x');
  EXPECT_EQ(sent, "");
  EXPECT_EQ(serial.read(UART_RX), 'x');
  for (std::size_t i = 0; i < 2 * Serial::queue_bytes; ++i)
    serial.write(UART_TX, 'x');
  EXPECT_EQ(serial.room(), 0U) << "a guest that talks to itself fills no more than the queue";
}

TEST_F(SerialPort, TakesNoMoreThanItHasRoomForAndSaysWhenThereIsAgain) {
  const std::string much(Serial::queue_bytes + 5, 'x');
  EXPECT_EQ(serial.receive(much), Serial::queue_bytes);
  EXPECT_EQ(serial.receive(much), 0U);
  EXPECT_EQ(room_calls, 0);
  EXPECT_EQ(serial.read(UART_RX), 'x');
  EXPECT_EQ(room_calls, 1);
  EXPECT_EQ(serial.read(UART_RX), 'x');
  EXPECT_EQ(room_calls, 1);
  EXPECT_EQ(serial.receive(much), 2U);
  serial.write(UART_FCR, UART_FCR_ENABLE_FIFO | UART_FCR_CLEAR_RCVR);
  EXPECT_EQ(room_calls, 2);
  EXPECT_EQ(serial.room(), Serial::queue_bytes);
}

} // namespace
