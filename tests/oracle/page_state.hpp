// What is certain of a page while others write: shared with other processes, which are children here.
#pragma once

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <new>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

namespace cppvmm::oracle {

/// What is certain of a page: `writes` counts the writes, and is odd while the page holds data. It becomes odd after
/// the write, and even before the discard; so that one that is odd and the same before and after a survey held data all
/// the while.
struct PageState {
  std::atomic<std::uint32_t> writes = 0;

  /// The page was written.
  void publish_written() { writes.fetch_add(1, std::memory_order_release); }
  /// It is about to be discarded.
  void publish_discard() { writes.fetch_add(1, std::memory_order_seq_cst); }
  [[nodiscard]] std::uint32_t now() const { return writes.load(std::memory_order_seq_cst); }
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "used between processes");

[[nodiscard]] constexpr bool holds_data(std::uint32_t state) { return state % 2 == 1; }
/// Whether it held data all the while, by its states before and after.
[[nodiscard]] constexpr bool held_data(std::uint32_t before, std::uint32_t after) {
  return holds_data(before) && before == after;
}

/// One that children share.
template <class Value>
class SharedMapping {
public:
  SharedMapping() {
    void* const at = mmap(nullptr, sizeof(Value), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    value_ = new (at) Value;
  }
  SharedMapping(const SharedMapping&) = delete;
  SharedMapping& operator=(const SharedMapping&) = delete;
  ~SharedMapping() { munmap(value_, sizeof(Value)); }
  Value* operator->() const { return value_; }
  Value& operator*() const { return *value_; }

private:
  Value* value_;
};

/// A child that is killed and waited for at the end.
class Child {
public:
  template <class Work>
  explicit Child(Work work) {
    const pid_t parent = getpid();
    pid_ = fork();
    if (pid_ != 0) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() == parent) work();
    _exit(0);
  }
  Child(Child&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
  Child& operator=(Child&&) = delete;
  ~Child() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    while (waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
    }
  }
  [[nodiscard]] bool started() const { return pid_ > 0; }

private:
  pid_t pid_ = -1;
};

} // namespace cppvmm::oracle
