#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <functional>
#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <stop_token>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "support/descriptor.hpp"
#include "support/each_system_call.hpp"
#include "support/failing_allocations.hpp"
#include "support/kernel_files.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_calls;

// What a guest's calls can use up: each allocation and each system call of a hypercall fails in turn, and many vCPUs
// call at once.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;
constexpr std::uint64_t query = 0x8001;
constexpr std::uint64_t boot_zeroed = 0x8002;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

/// vCPUs that ask. Those that are answered stay in on_answer until they are let go.
class Vcpus : public testing::Test {
protected:
  Vcpus() {
    // Enough ranges that a survey takes some megabytes.
    constexpr std::uint64_t extents = 150'000;
    const Region region = *Region::anonymous(GuestAddress(0), (2 * extents + 2) * page_size);
    madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
    for (std::uint64_t page = 1; page < 2 * extents; page += 2)
      static_cast<volatile char*>(region.host_address())[page * page_size] = 1;
    memory.replace(*MemoryMap::make({region}));
  }

  SurveyOptions options_of_next() {
    const std::lock_guard lock(mutex);
    // A call asks again when it makes a survey itself.
    begun.insert(gettid());
    changed.notify_all();
    return options;
  }

  void meet(const BootZeroedAnswer& answer) {
    std::unique_lock lock(mutex);
    if (!is_let_go) surveys.insert(&answer.survey);
    costs.insert(answer.survey.cost);
    ranges_of_last = answer.ranges.size();
    ++answered;
    changed.notify_all();
    changed.wait(lock, [&] { return is_let_go; });
  }

  static HvCheckedCall call_to(GuestAddress output) {
    HvCheckedCall call;
    call.output = output;
    return call;
  }
  /// Another vCPU, which asks.
  std::jthread ask() {
    const GuestAddress output = output_of(++asked);
    return std::jthread([this, output] { EXPECT_EQ(row.handler(call_to(output)).status, HvStatus::success); });
  }
  /// Of the vCPU that asks as the so manieth; nobody has written there.
  static GuestAddress output_of(std::uint64_t vcpu) { return GuestAddress((4 * vcpu + 2) * page_size); }
  void wait_until_answered(int reaches) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return answered >= reaches; });
  }
  /// Until so many have called, and sleep: held in on_answer, or waiting for others.
  void wait_until_asleep(std::size_t calls) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return begun.size() >= calls; });
    for (const pid_t thread : begun) {
      const std::string stat = "/proc/self/task/" + std::to_string(thread) + "/stat";
      // 123 (name) S
      for (std::string text; !text.contains(") S "); text = test::kernel_text(stat)) {
        lock.unlock();
        std::this_thread::yield();
        lock.lock();
      }
    }
  }
  void let_go() {
    const std::lock_guard lock(mutex);
    is_let_go = true;
    changed.notify_all();
  }

  GuestMemory memory;
  std::mutex mutex; // guards the next ones
  std::condition_variable changed;
  SurveyOptions options;
  std::set<pid_t> begun; // threads that have called
  int answered = 0;
  bool is_let_go = false;
  std::set<const Survey*> surveys;          // of the first answers, which are not over
  std::set<std::chrono::nanoseconds> costs; // which tell surveys apart: hardly two take the same
  std::size_t ranges_of_last = 0;
  std::uint64_t asked = 0;
  HvCallRow row =
      boot_zeroed_memory_row(memory, {.survey = [this] { return options_of_next(); },
                                      .on_answer = [this](const BootZeroedAnswer& answer) { meet(answer); }});
};

// Two are answered and kept; the others have nothing then, but what they share.
TEST_F(Vcpus, ShareSurveysOfWhichThereAreTwo) {
  const auto growth_of = [&](auto ask_all) {
    const std::size_t before = test::bytes_held;
    test::most_bytes_held = before;
    ask_all();
    return test::most_bytes_held - before;
  };
  std::vector<std::jthread> vcpus;
  const std::size_t of_two = growth_of([&] {
    for (int i = 1; i <= 2; ++i) {
      vcpus.push_back(ask());
      wait_until_answered(i);
    }
  });
  EXPECT_EQ(surveys.size(), 2U);
  if (test::replaces_allocations) {
    EXPECT_GT(of_two, std::size_t{4} << 20);
  }
  for (int i = 0; i < 6; ++i)
    vcpus.push_back(ask());
  wait_until_asleep(8);
  EXPECT_EQ(answered, 2);
  const std::size_t of_all = growth_of([&] {
    let_go();
    vcpus.clear();
  });
  EXPECT_EQ(answered, 8);
  EXPECT_EQ(costs.size(), 3U) << "those who waited share one";
  if (test::replaces_allocations) {
    EXPECT_LT(of_all, of_two / 2) << "more than another one of what there were two of";
  }
}

// An answer that was written is data, and so no other names its page, however late its call came.
TEST_F(Vcpus, LeaveOutEachOthersOutputs) {
  std::vector<std::jthread> vcpus;
  for (int i = 1; i <= 2; ++i) {
    vcpus.push_back(ask());
    wait_until_answered(i);
  }
  for (int i = 3; i <= 6; ++i)
    vcpus.push_back(ask());
  wait_until_asleep(6);
  let_go();
  vcpus.clear();
  // The first two were written before the others came.
  for (std::uint64_t asking = 3; asking <= 6; ++asking) {
    const auto count = *memory.read_value<std::uint64_t>(output_of(asking));
    EXPECT_EQ(count, 255U);
    for (std::uint64_t range = 0; range < std::min<std::uint64_t>(count, 255); ++range) {
      const GuestAddress at(output_of(asking).value() + 8 + 16 * range);
      const auto first = *memory.read_value<std::uint64_t>(at);
      for (std::uint64_t other = 1; other <= 6; ++other)
        EXPECT_NE(first, output_of(other).page().value()) << asking << ", " << other;
    }
  }
}

// One that begins while another is written may be written first.
TEST_F(Vcpus, LeaveOutTheOutputOfACallThatBeginsWhileTheyAreWritten) {
  test::Descriptor faults(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY)));
  uffdio_api api{.api = UFFD_API, .features = 0, .ioctls = 0};
  if (!faults.is_open() || ioctl(faults.number(), UFFDIO_API, &api) != 0)
    GTEST_SKIP() << "no userfaultfd: errno " << errno;
  const PageNumber next = memory.snapshot()->regions().back().pages().end();
  const Region slow = *Region::anonymous(GuestAddress(next.value() * page_size), page_size);
  ASSERT_TRUE(memory.add_region(slow));
  uffdio_register watched{};
  watched.range = {.start = reinterpret_cast<std::uintptr_t>(slow.host_address()), .len = page_size};
  watched.mode = UFFDIO_REGISTER_MODE_MISSING;
  ASSERT_EQ(ioctl(faults.number(), UFFDIO_REGISTER, &watched), 0);
  let_go();

  std::jthread first([&] { EXPECT_EQ(row.handler(call_to(slow.start())).status, HvStatus::success); });
  uffd_msg fault{};
  ASSERT_EQ(read(faults.number(), &fault, sizeof fault), static_cast<ssize_t>(sizeof fault));
  EXPECT_EQ(row.handler(call_to(output_of(1))).status, HvStatus::success);
  uffdio_zeropage filled{.range = watched.range, .mode = 0, .zeropage = 0};
  ASSERT_EQ(ioctl(faults.number(), UFFDIO_ZEROPAGE, &filled), 0);
  first.join();
  EXPECT_EQ(*memory.read_value<std::uint64_t>(slow.start()), 255U);
  for (std::uint64_t range = 0; range < 255; ++range)
    EXPECT_NE(*memory.read_value<std::uint64_t>(GuestAddress(slow.start().value() + 8 + 16 * range)),
              output_of(1).page().value());
}

TEST_F(Vcpus, WaitNoLongerThanTheyAreToldTo) {
  std::jthread first = ask();
  wait_until_answered(1);
  std::stop_source stop;
  options.stop = stop.get_token();
  std::jthread second = ask();
  wait_until_answered(2);
  EXPECT_EQ(ranges_of_last, 255U);
  // Neither has let go of its survey.
  std::jthread third = ask();
  wait_until_asleep(3);
  EXPECT_EQ(answered, 2);
  stop.request_stop();
  wait_until_answered(3);
  EXPECT_EQ(ranges_of_last, 0U);
  options.stop = {};
  options.max_time = std::chrono::milliseconds(1);
  std::jthread fourth = ask();
  wait_until_answered(4);
  EXPECT_EQ(ranges_of_last, 0U);
  let_go();
}

/// Two regions, with data in some pages; the output goes to page 0.
class Exhaustion : public testing::Test {
protected:
  Exhaustion() {
    const Region low = *Region::anonymous(GuestAddress(0), 2 * mib);
    const Region high = *Region::memfd(GuestAddress(4 * mib), 2 * mib);
    for (const Region& region : {low, high})
      madvise(region.host_address(), region.bytes(), MADV_NOHUGEPAGE);
    memory.replace(*MemoryMap::make({low, high}));
    data.add(pages(0, 1));
    for (std::uint64_t page = 1; page < 2000; page += 7)
      if (memory.write_value(GuestAddress(page * page_size), std::uint64_t{1})) data.add(pages(page, 1));
  }

  std::uint64_t call(ExtendedHypercalls& hypercalls, std::uint64_t control) {
    return *hypercalls.handle({.control = control, .output = GuestAddress(0)});
  }

  /// The pages of the answer in page 0.
  [[nodiscard]] PageSet answered() const {
    PageSet set;
    const std::uint64_t count = *memory.read_value<std::uint64_t>(GuestAddress(0));
    EXPECT_LE(count, 255U);
    for (std::uint64_t i = 0; i < std::min<std::uint64_t>(count, 255); ++i)
      set.add(pages(*memory.read_value<std::uint64_t>(GuestAddress(8 + 16 * i)),
                    *memory.read_value<std::uint64_t>(GuestAddress(16 + 16 * i))));
    return set;
  }

  /// What the guest finds where there is no answer.
  static constexpr std::uint64_t nothing = 0x1234;
  void clear_output() { ASSERT_TRUE(memory.write_value(GuestAddress(0), nothing)); }

  void expect_right(std::uint64_t status, const PageSet& at_most) {
    if (status != 0) {
      EXPECT_EQ(*memory.read_value<std::uint64_t>(GuestAddress(0)), nothing);
      return;
    }
    PageSet more = answered();
    more.remove(at_most);
    EXPECT_TRUE(more.empty());
  }

  PageSet data;
  GuestMemory memory;
};

TEST_F(Exhaustion, EachAllocationMayFail) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  auto hypercalls = *ExtendedHypercalls::create(memory);
  EXPECT_EQ(call(hypercalls, boot_zeroed), 0U);
  const PageSet clean = answered();
  EXPECT_FALSE(clean.empty());
  test::expect_nothing_left([&] {
    if (!memory.write_value(GuestAddress(0), nothing)) return false;
    const std::uint64_t status = call(hypercalls, boot_zeroed);
    const bool ran_out = status != 0;
    test::allocations_left = -1;
    if (ran_out) {
      EXPECT_EQ(status, hv_result(HvStatus::insufficient_memory));
    }
    expect_right(status, clean);
    return ran_out;
  });
  EXPECT_EQ(call(hypercalls, boot_zeroed), 0U);
  EXPECT_EQ(answered(), clean);
}

TEST_F(Exhaustion, EachSystemCallMayFail) {
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  test::keep_heap();
  auto hypercalls = *ExtendedHypercalls::create(memory);
  ASSERT_EQ(call(hypercalls, boot_zeroed), 0U);
  const PageSet clean = answered();
  PageSet unsound = clean;
  unsound.intersect(data);
  ASSERT_TRUE(unsound.empty());
  std::uint64_t status = 0;
  const std::size_t faults = test::fail_each_system_call({.prepare = [this] { clear_output(); },
                                                          .work = [&] { status = call(hypercalls, boot_zeroed); },
                                                          .check = [&] { expect_right(status, clean); }});
  EXPECT_GT(faults, 0U);
  ASSERT_EQ(call(hypercalls, boot_zeroed), 0U);
  EXPECT_EQ(answered(), clean);
}

/// Hints of each kind, of memory of both regions.
class HintExhaustion : public Exhaustion, public testing::WithParamInterface<HvMemoryHeat> {
protected:
  static constexpr GuestAddress list{3 * page_size};
  static constexpr std::uint64_t reps = 3;

  HintExhaustion() {
    const std::array<std::uint64_t, 1 + reps> words = {static_cast<std::uint64_t>(GetParam()), 100 << 12 | 199,
                                                       400 << 12, 1100 << 12 | 299};
    EXPECT_TRUE(memory.write(list, std::as_bytes(std::span(words))));
    named.add(pages(100, 200));
    named.add(pages(400, 1));
    named.add(pages(1100, 300));
  }

  void write_data() {
    for (const PageRange& range : data.ranges())
      for (std::uint64_t i = 0; i < range.count(); ++i)
        static_cast<void>(memory.write_value(GuestAddress((range.first().value() + i) * page_size), std::uint64_t{1}));
  }
  [[nodiscard]] PageSet lost_data() const {
    PageSet lost;
    for (const PageRange& range : data.ranges())
      for (std::uint64_t i = 0; i < range.count(); ++i)
        if (const PageNumber page(range.first().value() + i);
            *memory.read_value<std::uint64_t>(GuestAddress(page.value() * page_size)) == 0)
          lost.add(pages(page.value(), 1));
    return lost;
  }
  /// Nothing but what is named is gone, and no answer names what is there.
  void expect_right(HvStatus status) {
    PageSet more = lost_data();
    if (GetParam() == HvMemoryHeat::cold_discard) {
      PageSet left = data;
      left.intersect(named);
      left.remove(more);
      const std::uint64_t kept = hypercalls.heat_counts().done.kept_pages;
      EXPECT_TRUE(status != HvStatus::success || left.empty() || kept != kept_before) << "what is left is told";
      kept_before = kept;
      more.remove(named);
    }
    EXPECT_TRUE(more.empty());
    clear_output();
    ASSERT_EQ(call(hypercalls, boot_zeroed), 0U);
    PageSet unsound = answered();
    unsound.intersect(data);
    unsound.remove(lost_data());
    EXPECT_TRUE(unsound.empty());
    clear_output();
  }
  [[nodiscard]] HvStatus hinted() {
    const std::uint64_t result = *hypercalls.handle({.control = 0x8003 | reps << 32, .input = list});
    EXPECT_LE(result >> 32, reps);
    return static_cast<HvStatus>(result & 0xFFFF);
  }

  ExtendedHypercalls hypercalls =
      *ExtendedHypercalls::create(memory, {.memory_heat = {.policy = standard_heat_policy(memory)}});
  PageSet named;
  std::uint64_t kept_before = 0;
};

TEST_P(HintExhaustion, EachAllocationMayFail) {
  if (!test::replaces_allocations) GTEST_SKIP() << test::allocations_are_not_replaced;
  test::expect_nothing_left([&] {
    write_data();
    HvStatus status{};
    const long allowed = test::allocations_left;
    status = hinted();
    test::allocations_left = -1;
    if (status != HvStatus::success) {
      EXPECT_EQ(status, HvStatus::insufficient_memory) << allowed;
    }
    expect_right(status);
    return status != HvStatus::success;
  });
}

TEST_P(HintExhaustion, EachSystemCallMayFail) {
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  test::keep_heap();
  HvStatus status{};
  const std::size_t faults = test::fail_each_system_call({.prepare = [this] { write_data(); },
                                                          .work = [&] { status = hinted(); },
                                                          .check = [&] { expect_right(status); }});
  EXPECT_GT(faults, 0U);
  write_data();
  EXPECT_EQ(hinted(), HvStatus::success);
  expect_right(HvStatus::success);
}

INSTANTIATE_TEST_SUITE_P(Heats, HintExhaustion,
                         testing::Values(HvMemoryHeat::cold, HvMemoryHeat::hot, HvMemoryHeat::cold_discard),
                         [](const auto& info) {
                           return info.param == HvMemoryHeat::cold  ? "cold"
                                  : info.param == HvMemoryHeat::hot ? "hot"
                                                                    : "cold_discard";
                         });

// It asks the kernel nothing.
TEST_F(Exhaustion, TheCapabilitiesNeedNoSystemCall) {
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  auto hypercalls = *ExtendedHypercalls::create(memory);
  ASSERT_EQ(call(hypercalls, query), 0U);
  EXPECT_TRUE(test::record_system_calls([&] { static_cast<void>(call(hypercalls, query)); }).empty());
}

} // namespace
