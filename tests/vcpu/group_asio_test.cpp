#include <boost/asio.hpp>
#include <chrono>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <thread>
#include <vector>

#include "support/bare_guest.hpp"

import cppvmm.vcpu_group;

namespace cppvmm::test {
namespace {

namespace asio = boost::asio;

class VcpuGroupAsioTest : public BareGuestTest {
protected:
  VcpuGroup start_group(VcpuGroup::executor_type executor, std::size_t count = 2) {
    load(Code().spin());
    std::vector<Vcpu> vcpus;
    for (std::uint32_t id = 0; id < count; ++id) {
      vcpus.push_back(make_vcpu(id));
      if (const auto started = start_long_mode(vcpus.back()); !started)
        throw std::runtime_error(started.error().message());
    }
    auto group =
        VcpuGroup::start(std::move(vcpus), [](Vcpu&, const Exit&) { return VcpuAction::resume; }, std::move(executor));
    if (!group) throw std::runtime_error(group.error().message());
    return std::move(*group);
  }
};

TEST_F(VcpuGroupAsioTest, ACallbackRunsOnTheGroupsExecutorWhichHasWorkUntilThen) {
  asio::io_context context;
  VcpuGroup group = start_group(context.get_executor());
  EXPECT_EQ(group.get_executor(), VcpuGroup::executor_type(context.get_executor()));
  std::thread::id ran_on;
  std::size_t ends = 0;
  group.async_wait([&](VcpuEnds given) {
    ran_on = std::this_thread::get_id();
    ends = given.size();
  });
  EXPECT_EQ(context.poll(), 0U);
  EXPECT_FALSE(context.stopped()) << "there is work to wait for";
  group.stop();
  context.run();
  EXPECT_EQ(ran_on, std::this_thread::get_id());
  EXPECT_EQ(ends, 2U);
}

TEST_F(VcpuGroupAsioTest, AHandlersOwnExecutorComesFirst) {
  asio::io_context of_group;
  asio::io_context of_handler;
  VcpuGroup group = start_group(of_group.get_executor());
  bool called = false;
  group.async_wait(asio::bind_executor(of_handler.get_executor(), [&](VcpuEnds) { called = true; }));
  group.stop();
  EXPECT_EQ(of_handler.run(), 1U);
  EXPECT_TRUE(called);
  EXPECT_EQ(of_group.run(), 0U);
}

TEST_F(VcpuGroupAsioTest, AfterTheEndACallbackIsPostedAndNotCalledInPlace) {
  asio::io_context context;
  VcpuGroup group = start_group(context.get_executor());
  group.stop();
  ASSERT_KVM_OK(group.wait());
  bool called = false;
  group.async_wait([&](VcpuEnds) { called = true; });
  EXPECT_FALSE(called);
  context.run();
  EXPECT_TRUE(called);
}

TEST_F(VcpuGroupAsioTest, AnyNumberMayWaitAndMoveOnlyHandlersMayToo) {
  asio::io_context context;
  VcpuGroup group = start_group(context.get_executor());
  unsigned called = 0;
  group.async_wait([&, owned = std::make_unique<int>(1)](VcpuEnds) { called += static_cast<unsigned>(*owned); });
  group.async_wait([&](const VcpuEnds&) { ++called; });
  group.stop();
  context.run();
  EXPECT_EQ(called, 2U);
}

TEST_F(VcpuGroupAsioTest, AFutureHoldsTheEnds) {
  VcpuGroup group = start_group(asio::system_executor());
  std::future<VcpuEnds> ends = group.async_wait(asio::use_future);
  group.stop();
  EXPECT_EQ(ends.get().size(), 2U);
}

TEST_F(VcpuGroupAsioTest, ACoroutineAwaitsTheEnds) {
  asio::io_context context;
  VcpuGroup group = start_group(context.get_executor());
  std::size_t ends = 0;
  asio::co_spawn(
      context,
      [&]() -> asio::awaitable<void> {
        group.stop();
        ends = (co_await group.async_wait(asio::use_awaitable)).size();
      },
      asio::detached);
  context.run();
  EXPECT_EQ(ends, 2U);
}

TEST_F(VcpuGroupAsioTest, ATimerOnTheSameContextStopsTheGroup) {
  asio::io_context context;
  VcpuGroup group = start_group(context.get_executor());
  asio::steady_timer timer(context, std::chrono::milliseconds(1));
  timer.async_wait([&](boost::system::error_code) { group.stop(); });
  VcpuEnds ends;
  group.async_wait([&](VcpuEnds given) { ends = std::move(given); });
  context.run();
  ASSERT_EQ(ends.size(), 2U);
  EXPECT_EQ(ends[0].reason, VcpuEndReason::stopped);
}

TEST_F(VcpuGroupAsioTest, ADestroyedGroupStillCompletes) {
  asio::io_context context;
  std::size_t ends = 0;
  {
    VcpuGroup group = start_group(context.get_executor());
    group.async_wait([&](VcpuEnds given) { ends = given.size(); });
  }
  context.run();
  EXPECT_EQ(ends, 2U);
}

} // namespace
} // namespace cppvmm::test
