#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <gtest/gtest.h>
#include <mutex>
#include <ostream>
#include <pthread.h>
#include <random>
#include <sched.h>
#include <string>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "support/bare_guest.hpp"

namespace cppvmm::test {
namespace {

// Far beyond what any of this takes: a test that gets here has lost a request, and must end all the same.
constexpr std::chrono::seconds lost{60};

constexpr std::uint64_t flag = layout::free; // a guest that only looks at this byte ends with HLT when it is not zero

// cmp byte [flag], 0; je to itself; hlt; and again
Code spin_until_flag(Code code = {}) {
  return code.raw({0x80, 0x3C, 0x25})
      .value(static_cast<std::uint32_t>(flag))
      .raw({0x00, 0x74, 0xF6})
      .hlt()
      .raw({0xEB, 0xF3});
}

class StopTest : public BareGuestTest {
protected:
  void release_guest() { std::atomic_ref(*reinterpret_cast<std::uint8_t*>(memory.data() + flag)).store(1); }

  // A thread that runs the vCPU, in a guest that writes to a port and then never comes out by itself.
  class Runner {
  public:
    Runner(StopTest& test, Vcpu& vcpu, bool block_signals = false)
        : test_(test), thread_([this, &vcpu, block_signals] { work(vcpu, block_signals); }) {
      started_.wait(false);
    }

    // Joins the thread; whether the vCPU's run ended with an acknowledged request.
    bool stopped() {
      {
        std::unique_lock lock(mutex_);
        if (!changed_.wait_for(lock, lost, [&] { return ended_; })) test_.release_guest();
      }
      thread_.join();
      return stopped_;
    }

  private:
    void work(Vcpu& vcpu, bool block_signals) {
      if (block_signals) {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, nullptr);
      }
      const auto started = run_on(vcpu);
      started_ = true;
      started_.notify_one();
      if (started && std::holds_alternative<IoOut>(*started)) {
        const auto exit = run_on(vcpu);
        stopped_ = exit && std::holds_alternative<Interrupted>(*exit);
      }
      const std::lock_guard lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }

    StopTest& test_;
    std::atomic<bool> started_ = false;
    bool stopped_ = false;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool ended_ = false;
    std::thread thread_;
  };
};

TEST_F(StopTest, ARequestBeforeTheRunStopsItBeforeTheGuestExecutesAnything) {
  Vcpu vcpu = make_vcpu();
  load(Code().out(0x33).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  const StopHandle handle = vcpu.stop_handle();
  EXPECT_FALSE(handle.stop_requested());
  handle.request_stop();
  handle.request_stop(); // counts as one
  EXPECT_TRUE(handle.stop_requested());
  {
    ASSERT_RUN(Interrupted, interrupted, vcpu);
    EXPECT_TRUE(interrupted.stop_requested);
  }
  EXPECT_FALSE(handle.stop_requested());
  EXPECT_EQ(vcpu.registers()->rip, layout::code);
  ASSERT_RUN(IoOut, out, vcpu);
}

TEST_F(StopTest, ARequestDuringAnExitIsSeenByTheNextRunWhichFinishesTheExit) {
  Vcpu vcpu = make_vcpu();
  load(Code{0xE4, 0x10}.out(0x33).hlt()); // in al, 0x10
  ASSERT_KVM_OK(start_long_mode(vcpu));
  ASSERT_RUN(IoIn, in, vcpu);
  vcpu.stop_handle().request_stop();
  ASSERT_KVM_OK(vcpu.complete_io_in(std::array{std::byte{0x42}}));
  ASSERT_RUN(Interrupted, interrupted, vcpu);
  EXPECT_TRUE(interrupted.stop_requested);
  EXPECT_EQ(vcpu.registers()->rax & 0xFF, 0x42U);
  EXPECT_EQ(vcpu.registers()->rip, layout::code + 2);
  ASSERT_RUN(IoOut, out, vcpu);
}

TEST_F(StopTest, ARequestCanBeTakenBack) {
  Vcpu vcpu = make_vcpu();
  load(Code().out(0x33).hlt());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  EXPECT_FALSE(vcpu.acknowledge_stop());
  vcpu.stop_handle().request_stop();
  EXPECT_TRUE(vcpu.acknowledge_stop());
  ASSERT_RUN(IoOut, out, vcpu);
}

TEST_F(StopTest, AnotherSignalInterruptsButIsNoRequest) {
  Vcpu vcpu = make_vcpu();
  load(Code().out(0x33).spin());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  struct sigaction action{};
  struct sigaction before{};
  action.sa_handler = [](int) {};
  ASSERT_EQ(sigaction(SIGUSR2, &action, &before), 0);
  std::atomic<bool> running = false;
  std::atomic<bool> done = false;
  const pthread_t self = pthread_self();
  std::thread other([&] {
    running.wait(false);
    while (!done.load()) {
      pthread_kill(self, SIGUSR2);
      sched_yield();
    }
  });
  {
    ASSERT_RUN(IoOut, out, vcpu);
  }
  running = true;
  running.notify_one();
  const auto exit = vcpu.run(); // a guest that never ends by itself
  done = true;
  other.join();
  sigaction(SIGUSR2, &before, nullptr);
  ASSERT_KVM_OK(exit);
  ASSERT_TRUE(std::holds_alternative<Interrupted>(*exit)) << exit_name(*exit);
  EXPECT_FALSE(std::get<Interrupted>(*exit).stop_requested);
}

TEST_F(StopTest, AHandleOutlivesItsVcpu) {
  StopHandle handle;
  handle.request_stop(); // of nothing
  EXPECT_FALSE(handle.stop_requested());
  {
    const Vcpu vcpu = make_vcpu();
    handle = vcpu.stop_handle();
  }
  handle.request_stop();
}

TEST_F(StopTest, TheSignalCannotBeChosenOnceAVcpuExists) {
  const auto bad = set_stop_signal(SIGKILL);
  ASSERT_FALSE(bad);
  EXPECT_EQ(bad.error().code, KvmErrc::invalid_argument);
  EXPECT_FALSE(set_stop_signal(0));
  EXPECT_FALSE(set_stop_signal(SIGRTMAX + 1));
  const Vcpu vcpu = make_vcpu();
  const auto late = set_stop_signal(SIGUSR2);
  ASSERT_FALSE(late);
  EXPECT_EQ(late.error().code, KvmErrc::bad_state);
  struct sigaction present{};
  ASSERT_EQ(sigaction(stop_signal(), nullptr, &present), 0);
  EXPECT_NE(present.sa_handler, SIG_DFL);
}

TEST_F(StopTest, AThreadThatBlocksAllSignalsIsStoppedAllTheSame) {
  Vcpu vcpu = make_vcpu();
  load(spin_until_flag(Code().out(0x33)));
  ASSERT_KVM_OK(start_long_mode(vcpu));
  Runner runner(*this, vcpu, true);
  vcpu.stop_handle().request_stop();
  EXPECT_TRUE(runner.stopped());
}

TEST_F(StopTest, AVcpuThatHaltsInsideKvmIsStopped) {
  if (!kvm->capabilities().interrupt_controller) GTEST_SKIP() << "this KVM has no KVM_CAP_IRQCHIP";
  ASSERT_KVM_OK(vm->create_interrupt_controller());
  Vcpu vcpu = make_vcpu();
  load(Code().out(0x33).hlt().loop());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  Runner runner(*this, vcpu);
  vcpu.stop_handle().request_stop();
  EXPECT_TRUE(runner.stopped());
}

// The user's queue of pending signals is full, so that real-time signals are refused: the request goes on trying.
TEST_F(StopTest, ARequestIsNotLostWhileTheSignalQueueIsFull) {
  Vcpu vcpu = make_vcpu();
  load(spin_until_flag(Code().out(0x33)));
  ASSERT_KVM_OK(start_long_mode(vcpu));
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_SIGPENDING, &before), 0);
  Runner runner(*this, vcpu);
  std::atomic<bool> requesting = false;
  const rlimit none{.rlim_cur = 0, .rlim_max = before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_SIGPENDING, &none), 0);
  std::thread requester([&] {
    requesting = true;
    requesting.notify_one();
    vcpu.stop_handle().request_stop();
  });
  requesting.wait(false);
  for (int i = 0; i < 100; ++i)
    sched_yield();
  EXPECT_EQ(setrlimit(RLIMIT_SIGPENDING, &before), 0);
  requester.join();
  EXPECT_TRUE(runner.stopped());
}

// Counts the stops that a vCPU acknowledged, and lets others wait for the next.
class Acknowledgements {
public:
  void add() {
    const std::lock_guard lock(mutex_);
    ++count_;
    changed_.notify_all();
  }
  [[nodiscard]] std::uint64_t count() {
    const std::lock_guard lock(mutex_);
    return count_;
  }
  // Whether the count came above `number`.
  bool wait_beyond(std::uint64_t number) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, lost, [&] { return count_ > number; });
  }

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t count_ = 0;
};

void idle(unsigned turns) {
  for (unsigned i = 0; i < turns; ++i)
    std::atomic_signal_fence(std::memory_order_seq_cst);
}

struct Race {
  const char* name;
  int requesters;
  bool exits; // the guest comes out by itself all the time: HLT, port reads
  std::uint64_t requests_each;

  friend std::ostream& operator<<(std::ostream& to, const Race& race) { return to << race.name; }
};

// One thread runs the vCPU without end. Others ask it to stop, at random moments, and wait each time for a stop that is
// acknowledged after they began to ask. One requester alone sees that there is exactly one for each request.
class StopRaceTest : public StopTest, public testing::WithParamInterface<Race> {};

INSTANTIATE_TEST_SUITE_P(Guests, StopRaceTest,
                         testing::Values(Race{"Spinning", 1, false, 2000}, Race{"Exiting", 1, true, 5000},
                                         Race{"SpinningManyRequesters", 4, false, 1000},
                                         Race{"ExitingManyRequesters", 4, true, 2000}),
                         [](const auto& chosen) { return std::string(chosen.param.name); });

TEST_P(StopRaceTest, NoRequestIsLost) {
  const Race race = GetParam();
  Vcpu vcpu = make_vcpu();
  // Exiting: hlt; in al, 0x10; and again
  load(race.exits ? Code().hlt().raw({0xE4, 0x10}).raw({0xEB, 0xFB}) : spin_until_flag());
  ASSERT_KVM_OK(start_long_mode(vcpu));

  const StopHandle handle = vcpu.stop_handle();
  Acknowledgements acknowledged;
  std::atomic<bool> done = false;
  std::string failure;
  std::thread runner([&] {
    while (!done.load()) {
      const auto exit = vcpu.run();
      if (!exit) {
        failure = exit.error().message();
        return;
      }
      if (const auto* const interrupted = std::get_if<Interrupted>(&*exit);
          interrupted != nullptr && interrupted->stop_requested)
        acknowledged.add();
    }
  });

  std::atomic<std::uint64_t> lost_requests = 0;
  std::vector<std::thread> requesters;
  for (int i = 0; i < race.requesters; ++i)
    requesters.emplace_back([&, i] {
      std::minstd_rand random(static_cast<unsigned>(i + 1));
      for (std::uint64_t k = 0; k < race.requests_each && lost_requests == 0; ++k) {
        const std::uint64_t before = acknowledged.count();
        handle.request_stop();
        if (!acknowledged.wait_beyond(before)) ++lost_requests;
        idle(static_cast<unsigned>(random() % 20'000));
      }
    });
  for (std::thread& requester : requesters)
    requester.join();
  EXPECT_EQ(lost_requests, 0U);
  if (race.requesters == 1) EXPECT_EQ(acknowledged.count(), race.requests_each) << "one for each request";

  done = true;
  release_guest();
  handle.request_stop();
  runner.join();
  EXPECT_EQ(failure, "");
}

thread_local bool runs_a_vcpu = false;
std::atomic<unsigned> signals_gone_astray = 0;

// Threads that run the vCPU come and go, while requests are made all the time.
TEST_F(StopTest, NoThreadIsSignalledButOneThatRunsTheVcpu) {
  Vcpu vcpu = make_vcpu();
  load(Code().spin());
  ASSERT_KVM_OK(start_long_mode(vcpu));
  struct sigaction action{};
  struct sigaction before{};
  action.sa_handler = [](int) {
    if (!runs_a_vcpu) ++signals_gone_astray;
  };
  ASSERT_EQ(sigaction(stop_signal(), &action, &before), 0);
  signals_gone_astray = 0;

  const StopHandle handle = vcpu.stop_handle();
  std::atomic<bool> done = false;
  std::thread requester([&] {
    while (!done.load()) {
      handle.request_stop();
      std::this_thread::sleep_for(std::chrono::microseconds(10)); // the lock is to be had by others too
    }
  });
  unsigned stopped = 0;
  constexpr unsigned threads = 300;
  for (unsigned i = 0; i < threads; ++i)
    std::thread([&] {
      runs_a_vcpu = true;
      const auto exit = run_on(vcpu);
      if (exit && std::holds_alternative<Interrupted>(*exit)) ++stopped;
      syscall(SYS_getppid); // the signals that were sent before run() ended have been taken when this returns
      runs_a_vcpu = false;
      for (int k = 0; k < 1000; ++k)
        syscall(SYS_getppid);
    }).join();
  done = true;
  requester.join();
  EXPECT_EQ(stopped, threads);
  EXPECT_EQ(signals_gone_astray, 0U);
  sigaction(stop_signal(), &before, nullptr);
}

} // namespace
} // namespace cppvmm::test
