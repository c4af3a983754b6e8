#include <atomic>
#include <gtest/gtest.h>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <time.h>
#include <vector>

#include "support/bare_guest.hpp"

import cppvmm.vcpu_group;

namespace cppvmm::test {
namespace {

// Two guests: one spins, one writes to a port without end.
class VcpuGroupTest : public BareGuestTest {
protected:
  static constexpr std::uint64_t spinning = layout::free;
  static constexpr std::uint64_t writing = layout::free + 0x100;

  void SetUp() override {
    BareGuestTest::SetUp();
    load(Code().spin(), spinning);
    load(Code().out(0x33).loop(), writing);
  }

  std::vector<Vcpu> make_vcpus(std::initializer_list<std::uint64_t> entries) {
    std::vector<Vcpu> vcpus;
    for (const std::uint64_t rip : entries) {
      vcpus.push_back(make_vcpu(static_cast<std::uint32_t>(vcpus.size())));
      if (const auto started = start_long_mode(vcpus.back(), rip); !started)
        throw std::runtime_error(started.error().message());
    }
    return vcpus;
  }
};

VcpuAction go_on(Vcpu&, const Exit&) { return VcpuAction::resume; }

TEST_F(VcpuGroupTest, StopsAllFromOutside) {
  auto group = VcpuGroup::start(make_vcpus({spinning, writing}), go_on);
  ASSERT_KVM_OK(group);
  EXPECT_FALSE(group->ended());
  group->stop();
  const auto ends = group->wait();
  ASSERT_KVM_OK(ends);
  EXPECT_TRUE(group->ended());
  ASSERT_EQ(ends->size(), 2U);
  for (std::uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ((*ends)[i].id, i);
    EXPECT_EQ((*ends)[i].reason, VcpuEndReason::stopped);
    EXPECT_TRUE((*ends)[i].ticks.has_value());
    EXPECT_FALSE((*ends)[i].error.has_value());
  }
}

TEST_F(VcpuGroupTest, StoppingAgainAndAfterTheEndIsHarmless) {
  auto group = VcpuGroup::start(make_vcpus({spinning}), go_on);
  ASSERT_KVM_OK(group);
  group->stop();
  group->stop();
  ASSERT_KVM_OK(group->wait());
  group->stop();
  ASSERT_KVM_OK(group->wait());
}

TEST_F(VcpuGroupTest, AGroupOfNoneHasEnded) {
  auto group = VcpuGroup::start({}, go_on);
  ASSERT_KVM_OK(group);
  EXPECT_TRUE(group->ended());
  EXPECT_TRUE(group->wait().value().empty());
}

TEST_F(VcpuGroupTest, AHandlerEndsItsOwnVcpuAlone) {
  std::atomic<bool> ending = false;
  std::atomic<unsigned> exits = 0;
  auto group = VcpuGroup::start(make_vcpus({writing, writing}), [&](Vcpu& vcpu, const Exit& exit) {
    EXPECT_TRUE(std::holds_alternative<IoOut>(exit)) << exit_name(exit);
    if (vcpu.id() == 0) {
      ending = true;
      ending.notify_all();
      return VcpuAction::end_vcpu;
    }
    ++exits;
    exits.notify_all();
    return VcpuAction::resume;
  });
  ASSERT_KVM_OK(group);
  ending.wait(false);
  const unsigned seen = exits;
  exits.wait(seen); // the other one goes on
  EXPECT_FALSE(group->ended());
  group->stop();
  const auto ends = group->wait().value();
  EXPECT_EQ(ends[0].reason, VcpuEndReason::handler);
  EXPECT_EQ(ends[1].reason, VcpuEndReason::stopped);
}

TEST_F(VcpuGroupTest, AHandlerStopsTheGroup) {
  auto group = VcpuGroup::start(make_vcpus({spinning, writing, spinning}),
                                [](Vcpu&, const Exit&) { return VcpuAction::stop_group; });
  ASSERT_KVM_OK(group);
  const auto ends = group->wait().value();
  EXPECT_EQ(ends[0].reason, VcpuEndReason::stopped);
  EXPECT_EQ(ends[1].reason, VcpuEndReason::handler);
  EXPECT_EQ(ends[2].reason, VcpuEndReason::stopped);
}

TEST_F(VcpuGroupTest, AHandlerMayCallStopAndMayNotWait) {
  std::mutex mutex; // held until the handler can see the group
  std::unique_lock lock(mutex);
  VcpuGroup* group = nullptr;
  std::optional<KvmErrc> waited;
  auto started = VcpuGroup::start(make_vcpus({spinning, writing}), [&](Vcpu&, const Exit&) {
    const std::lock_guard guard(mutex);
    group->stop();
    if (const auto ends = group->wait(); !ends) waited = ends.error().code;
    return VcpuAction::resume;
  });
  ASSERT_KVM_OK(started);
  group = &*started;
  lock.unlock();
  const auto ends = started->wait().value();
  EXPECT_EQ(waited, KvmErrc::bad_state);
  EXPECT_EQ(ends[0].reason, VcpuEndReason::stopped);
  EXPECT_EQ(ends[1].reason, VcpuEndReason::stopped);
}

TEST_F(VcpuGroupTest, AnExceptionOfTheHandlerIsKeptAndStopsTheGroup) {
  auto group = VcpuGroup::start(make_vcpus({spinning, writing}),
                                [](Vcpu&, const Exit&) -> VcpuAction { throw std::runtime_error("as told"); });
  ASSERT_KVM_OK(group);
  const auto ends = group->wait().value();
  EXPECT_EQ(ends[0].reason, VcpuEndReason::stopped);
  ASSERT_EQ(ends[1].reason, VcpuEndReason::threw);
  EXPECT_THROW(std::rethrow_exception(ends[1].exception), std::runtime_error);
}

TEST_F(VcpuGroupTest, AFailureToRunIsKeptAndStopsTheGroup) {
  auto vcpus = make_vcpus({spinning, writing});
  ASSERT_KVM_OK(vcpus[1].use_user_hypercalls(0x33));
  auto group = VcpuGroup::start(std::move(vcpus), go_on); // which does not answer the hypercall
  ASSERT_KVM_OK(group);
  const auto ends = group->wait().value();
  EXPECT_EQ(ends[0].reason, VcpuEndReason::stopped);
  ASSERT_EQ(ends[1].reason, VcpuEndReason::failed);
  ASSERT_TRUE(ends[1].error.has_value());
  EXPECT_EQ(ends[1].error->code, KvmErrc::bad_state);
}

TEST_F(VcpuGroupTest, AStopHandleEndsOneVcpu) {
  auto vcpus = make_vcpus({spinning, spinning});
  const StopHandle first = vcpus[0].stop_handle();
  auto group = VcpuGroup::start(std::move(vcpus), go_on);
  ASSERT_KVM_OK(group);
  first.request_stop();
  while (first.stop_requested())
    std::this_thread::yield();
  EXPECT_FALSE(group->ended());
  group->stop();
  EXPECT_EQ(group->wait().value()[0].reason, VcpuEndReason::stopped);
}

TEST_F(VcpuGroupTest, VcpusComeBackAndRunAgain) {
  auto group = VcpuGroup::start(make_vcpus({writing, writing}), [](Vcpu& vcpu, const Exit&) {
    return vcpu.id() == 0 ? VcpuAction::stop_group : VcpuAction::resume;
  });
  ASSERT_KVM_OK(group);
  ASSERT_KVM_OK(group->wait());
  auto vcpus = group->take_vcpus();
  ASSERT_KVM_OK(vcpus);
  ASSERT_EQ(vcpus->size(), 2U);
  EXPECT_FALSE(group->take_vcpus()) << "taken already";
  for (std::uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ((*vcpus)[i].id(), i);
    EXPECT_FALSE((*vcpus)[i].stop_handle().stop_requested());
    ASSERT_RUN(IoOut, out, (*vcpus)[i]);
  }
}

TEST_F(VcpuGroupTest, VcpusDoNotComeBackWhileTheyRun) {
  auto group = VcpuGroup::start(make_vcpus({spinning}), go_on);
  ASSERT_KVM_OK(group);
  const auto vcpus = group->take_vcpus();
  ASSERT_FALSE(vcpus);
  EXPECT_EQ(vcpus.error().code, KvmErrc::bad_state);
}

TEST_F(VcpuGroupTest, TheDestructorStops) {
  for (int i = 0; i < 50; ++i) {
    auto group = VcpuGroup::start(make_vcpus({}), go_on);
    ASSERT_KVM_OK(group);
  }
  std::atomic<unsigned> handlers = 0;
  {
    auto group = VcpuGroup::start(make_vcpus({spinning, writing}), [&](Vcpu&, const Exit&) {
      ++handlers;
      handlers.notify_all();
      return VcpuAction::resume;
    });
    ASSERT_KVM_OK(group);
    handlers.wait(0);
  }
  const unsigned then = handlers;
  std::this_thread::yield();
  EXPECT_EQ(handlers, then) << "no handler runs any more";
}

// Started and stopped over and over, at once: requests meet threads that have not begun.
TEST_F(VcpuGroupTest, AStopBeforeTheThreadsRunIsNotLost) {
  auto vcpus = make_vcpus({spinning, writing});
  for (int i = 0; i < 200; ++i) {
    auto group = VcpuGroup::start(std::move(vcpus), go_on);
    ASSERT_KVM_OK(group);
    group->stop();
    const auto ends = group->wait().value();
    ASSERT_EQ(ends[0].reason, VcpuEndReason::stopped);
    ASSERT_EQ(ends[1].reason, VcpuEndReason::stopped);
    vcpus = group->take_vcpus().value();
  }
}

TEST_F(VcpuGroupTest, AMovedFromGroupIsEmpty) {
  auto started = VcpuGroup::start(make_vcpus({spinning}), go_on);
  ASSERT_KVM_OK(started);
  VcpuGroup group = std::move(*started);
  EXPECT_TRUE(started->ended());
  started->stop();
  EXPECT_FALSE(started->wait());
  EXPECT_FALSE(started->take_vcpus());
  EXPECT_FALSE(group.ended());
}

// The clock that the kernel makes the ticks from.
double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

TEST_F(VcpuGroupTest, TicksAreTheProcessorTimeOfEachVcpusOwnThread) {
  std::atomic<double> at_last_exit = 0;
  std::atomic<bool> worked = false;
  const double here_before = thread_seconds();
  auto group = VcpuGroup::start(make_vcpus({writing, writing}), [&](Vcpu& vcpu, const Exit&) {
    if (vcpu.id() == 1) { // idles until the other one has worked
      worked.wait(false);
      return VcpuAction::end_vcpu;
    }
    at_last_exit = thread_seconds();
    if (at_last_exit < 0.2) return VcpuAction::resume;
    worked = true;
    worked.notify_all();
    return VcpuAction::end_vcpu;
  });
  ASSERT_KVM_OK(group);
  const auto ends = group->wait().value();
  EXPECT_LT(thread_seconds() - here_before, 0.2) << "not the waiting thread's";
  ASSERT_TRUE(ends[0].ticks && ends[1].ticks);
  const auto seconds = [](const VcpuTicks& ticks) {
    return static_cast<double>(ticks.user + ticks.system) / static_cast<double>(vcpu_ticks_per_second());
  };
  EXPECT_GE(std::chrono::duration<double>(ends[0].time).count(), at_last_exit);
  EXPECT_LT(std::chrono::duration<double>(ends[1].time).count(), 0.2) << "not the other thread's";
  const double two_ticks = 2.0 / static_cast<double>(vcpu_ticks_per_second()); // both counts are rounded down
  EXPECT_GE(seconds(*ends[0].ticks), at_last_exit - two_ticks);
  EXPECT_LT(seconds(*ends[1].ticks), 0.2) << "not the other thread's";
}

// Without any header of Boost here: a callback, on the group's own executor.
TEST_F(VcpuGroupTest, ACallbackIsCalledOnceWithTheEnds) {
  auto group = VcpuGroup::start(make_vcpus({spinning, spinning}), go_on);
  ASSERT_KVM_OK(group);
  std::atomic<unsigned> called = 0;
  VcpuEnds ends;
  group->async_wait([&](VcpuEnds given) {
    ends = std::move(given);
    ++called;
    called.notify_all();
  });
  EXPECT_EQ(called, 0U);
  group->stop();
  called.wait(0);
  EXPECT_EQ(called, 1U);
  ASSERT_EQ(ends.size(), 2U);
  EXPECT_EQ(ends[1].reason, VcpuEndReason::stopped);
}

} // namespace
} // namespace cppvmm::test
