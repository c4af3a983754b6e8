#include <array>
#include <atomic>
#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <optional>
#include <sys/mman.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"

import cppvmm.guest_memory;

// The handlers that a FaultGuard installs: what they mend, and what they leave to others.

using namespace cppvmm;

namespace {

constexpr std::uint64_t bytes = 4 * page_size;

/// Adopted memory of which no byte can be accessed.
class Inaccessible {
public:
  Inaccessible() : host_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    map_ = *MemoryMap::make({*Region::adopt(GuestAddress(0), {host_, bytes, Backing::anonymous, -1, 0})});
    mprotect(host_, bytes, PROT_NONE);
  }
  Inaccessible(const Inaccessible&) = delete;
  Inaccessible& operator=(const Inaccessible&) = delete;
  ~Inaccessible() { munmap(host_, bytes); }

  [[nodiscard]] const MemoryMap& map() const { return map_; }
  [[nodiscard]] volatile char* host() const { return static_cast<volatile char*>(host_); }

private:
  void* host_;
  MemoryMap map_;
};

/// A handler of the test's own, and what was there before it.
class Handler {
public:
  Handler(int number, struct sigaction action) : number_(number) { EXPECT_EQ(sigaction(number, &action, &before_), 0); }
  Handler(const Handler&) = delete;
  Handler& operator=(const Handler&) = delete;
  ~Handler() { EXPECT_EQ(sigaction(number_, &before_, nullptr), 0); }
  [[nodiscard]] const struct sigaction& before() const { return before_; }

private:
  int number_;
  struct sigaction before_{};
};

struct sigaction now(int number) {
  struct sigaction action{};
  EXPECT_EQ(sigaction(number, nullptr, &action), 0);
  return action;
}

sigjmp_buf back;
volatile std::sig_atomic_t came = 0;
void* volatile address_of_fault = nullptr;

void leap(int, siginfo_t* info, void*) {
  came = came + 1;
  address_of_fault = info->si_addr;
  siglongjmp(back, 1);
}
void leap_plainly(int) {
  came = came + 1;
  siglongjmp(back, 1);
}
void note(int) { came = came + 1; }

struct sigaction with_info(void (*handler)(int, siginfo_t*, void*), int flags = 0) {
  struct sigaction action{};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | flags;
  return action;
}
struct sigaction plain(void (*handler)(int), int flags = 0) {
  struct sigaction action{};
  action.sa_handler = handler;
  action.sa_flags = flags;
  return action;
}

/// What a process ends with that dies of the signal; a sanitizer's own handler ends it otherwise.
auto died_of(int number) {
  return [number](int status) {
    return WIFSIGNALED(status) ? WTERMSIG(status) == number : WIFEXITED(status) && WEXITSTATUS(status) != 0;
  };
}

TEST(FaultGuard, IsThereFromTheFirstToTheLast) {
  EXPECT_FALSE(FaultGuard::is_installed());
  const auto before = now(SIGSEGV);
  auto first = FaultGuard::install();
  ASSERT_TRUE(first) << first.error().message();
  EXPECT_TRUE(FaultGuard::is_installed());
  std::optional<FaultGuard> moved(std::move(*first));
  auto second = FaultGuard::install();
  ASSERT_TRUE(second);
  moved.reset();
  EXPECT_TRUE(FaultGuard::is_installed());
  EXPECT_NE(now(SIGSEGV).sa_sigaction, before.sa_sigaction);
  moved.emplace(std::move(*second));
  moved.reset();
  EXPECT_FALSE(FaultGuard::is_installed());
  EXPECT_EQ(now(SIGSEGV).sa_sigaction, before.sa_sigaction);
  EXPECT_EQ(now(SIGSEGV).sa_flags & SA_SIGINFO, before.sa_flags & SA_SIGINFO);
}

// A snapshot's file that somebody truncates, against the promise.
TEST(FaultGuard, MendsAccessesToMemoryOfOurOwn) {
  const test::Descriptor file(memfd_create("snapshot", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(file.number(), bytes), 0);
  const MemoryMap map = *MemoryMap::make({*Region::private_file(GuestAddress(0), bytes, file.number(), 0)});
  ASSERT_EQ(ftruncate(file.number(), page_size), 0);
  EXPECT_EXIT(static_cast<void>(map.read_value<std::uint8_t>(GuestAddress(page_size))), died_of(SIGBUS), "");
  const auto guard = FaultGuard::install();
  ASSERT_TRUE(guard);
  std::array<std::byte, 100> into{};
  for (const auto& result :
       {map.read(GuestAddress(page_size - 60), into), map.write(GuestAddress(page_size - 60), into),
        map.load(GuestAddress(page_size - 60), into)}) {
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, MemoryErrc::inaccessible);
    EXPECT_EQ(result.error().os_error, EFAULT);
    EXPECT_EQ(result.error().completed, 60U);
    EXPECT_EQ(result.error().address, page_size);
  }
}

TEST(FaultGuard, LeavesOtherFaultsToTheHandlerBefore) {
  const Inaccessible memory;
  for (const struct sigaction& action :
       {with_info(leap), plain(leap_plainly), with_info(leap, SA_NODEFER | SA_ONSTACK)}) {
    const Handler handler(SIGSEGV, action);
    const auto guard = FaultGuard::install();
    ASSERT_TRUE(guard);
    came = 0;
    address_of_fault = nullptr;
    if (sigsetjmp(back, 1) == 0) {
      static_cast<void>(memory.host()[page_size + 5]);
      FAIL() << "the read came back";
    }
    EXPECT_EQ(came, 1);
    if ((action.sa_flags & SA_SIGINFO) != 0) EXPECT_EQ(address_of_fault, memory.host() + page_size + 5);
    EXPECT_FALSE(memory.map().read_value<char>(GuestAddress(0)));
    EXPECT_EQ(came, 1) << "one that was mended is nobody else's";
  }
}

TEST(FaultGuard, LeavesSignalsThatAreSentToTheHandlerBefore) {
  const Inaccessible memory;
  for (const int number : {SIGSEGV, SIGBUS}) {
    const Handler handler(number, plain(note));
    const auto guard = FaultGuard::install();
    ASSERT_TRUE(guard);
    came = 0;
    EXPECT_EQ(raise(number), 0);
    EXPECT_EQ(came, 1);
    EXPECT_FALSE(memory.map().read_value<char>(GuestAddress(0)));
  }
}

TEST(FaultGuard, CallsAHandlerForOneSignalOnce) {
  EXPECT_EXIT(
      {
        const Handler handler(SIGBUS, plain(note, static_cast<int>(SA_RESETHAND)));
        const auto guard = FaultGuard::install();
        came = 0;
        raise(SIGBUS);
        if (came != 1) std::exit(0);
        raise(SIGBUS);
        std::exit(0);
      },
      died_of(SIGBUS), "");
}

TEST(FaultGuard, TakesTheDefaultAction) {
  const Inaccessible memory;
  const auto with_default = [](auto action) {
    const Handler segv(SIGSEGV, plain(SIG_DFL));
    const Handler bus(SIGBUS, plain(SIG_DFL));
    const auto guard = FaultGuard::install();
    action();
    std::exit(0);
  };
  EXPECT_EXIT(with_default([&] { static_cast<void>(*memory.host()); }), died_of(SIGSEGV), "");
  EXPECT_EXIT(with_default([] { raise(SIGSEGV); }), died_of(SIGSEGV), "");
  EXPECT_EXIT(with_default([] { raise(SIGBUS); }), died_of(SIGBUS), "");
  EXPECT_EXIT(with_default([&] {
                const bool is_error = !memory.map().read_value<char>(GuestAddress(0));
                std::_Exit(is_error ? 42 : 0);
              }),
              testing::ExitedWithCode(42), "");
}

TEST(FaultGuard, IgnoresWhatWasIgnoredButNoFault) {
  const Inaccessible memory;
  const auto with_ignored = [](auto action) {
    const Handler segv(SIGSEGV, plain(SIG_IGN));
    const auto guard = FaultGuard::install();
    action();
    std::_Exit(42);
  };
  EXPECT_EXIT(with_ignored([] { raise(SIGSEGV); }), testing::ExitedWithCode(42), "");
  EXPECT_EXIT(with_ignored([&] { static_cast<void>(*memory.host()); }), died_of(SIGSEGV), "");
}

// The kernel does not look at SA_SIGINFO where nothing is called.
TEST(FaultGuard, CallsNothingWhereNothingWasToBeCalled) {
  const auto raise_over = [](void (*standard)(int)) {
    const Handler segv(SIGSEGV, plain(standard, SA_SIGINFO));
    const auto guard = FaultGuard::install();
    raise(SIGSEGV);
    std::_Exit(42);
  };
  EXPECT_EXIT(raise_over(SIG_IGN), testing::ExitedWithCode(42), "");
  EXPECT_EXIT(raise_over(SIG_DFL), died_of(SIGSEGV), "");
}

struct sigaction covered{};
void pass_to_covered(int number, siginfo_t* info, void* context) {
  came = came + 1;
  covered.sa_sigaction(number, info, context);
}

TEST(FaultGuard, StaysUnderAHandlerThatCoversIt) {
  const Inaccessible memory;
  auto guard = FaultGuard::install();
  ASSERT_TRUE(guard);
  came = 0;
  {
    const Handler handler(SIGSEGV, with_info(pass_to_covered));
    covered = handler.before();
    EXPECT_FALSE(memory.map().read_value<char>(GuestAddress(0)));
    EXPECT_EQ(came, 1);
    {
      const FaultGuard ended = std::move(*guard);
    }
    EXPECT_EQ(now(SIGSEGV).sa_sigaction, pass_to_covered) << "not ours to take away";
    const auto again = FaultGuard::install();
    ASSERT_FALSE(again);
    EXPECT_EQ(again.error().code, MemoryErrc::unavailable);
    EXPECT_FALSE(FaultGuard::is_installed());
  }
  // It has put ours back.
  auto last = FaultGuard::install();
  ASSERT_TRUE(last) << last.error().message();
  EXPECT_FALSE(memory.map().read_value<char>(GuestAddress(0)));
}

TEST(FaultGuard, ServesThreadsAndChildren) {
  const Inaccessible memory;
  const auto guard = FaultGuard::install();
  ASSERT_TRUE(guard);
  const auto all_fail = [&] {
    for (int i = 0; i < 1000; ++i)
      if (memory.map().read_value<std::uint64_t>(GuestAddress(page_size)) ||
          memory.map().write_value(GuestAddress(page_size), std::uint64_t{1}))
        return false;
    return true;
  };
  std::atomic<int> failed = 0;
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] { failed += all_fail() ? 1 : 0; });
  threads.clear();
  EXPECT_EQ(failed, 4);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(all_fail() ? 42 : 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 42) << status;
}

TEST(FaultGuard, TearsNoAlignedValueOfAdoptedMemory) {
  void* const host = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(host, MAP_FAILED);
  {
    const MemoryMap map = *MemoryMap::make({*Region::adopt(GuestAddress(0), {host, bytes, Backing::anonymous, -1, 0})});
    const auto guard = FaultGuard::install();
    ASSERT_TRUE(guard);
    std::atomic<bool> is_over = false;
    std::jthread writer([&] {
      for (std::uint64_t value = 0; !is_over.load(std::memory_order_relaxed); value = ~value)
        static_cast<void>(map.write_value(GuestAddress(8), value));
    });
    int torn = 0;
    for (int i = 0; i < 200'000; ++i) {
      const std::uint64_t value = *map.read_value<std::uint64_t>(GuestAddress(8));
      if (value != 0 && value != ~std::uint64_t{0}) ++torn;
    }
    is_over = true;
    EXPECT_EQ(torn, 0);
  }
  munmap(host, bytes);
}

} // namespace
