module;
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <expected>
#include <linux/userfaultfd.h>
#include <mutex>
#include <pthread.h>
#include <sys/ioctl.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>
module cppvmm.guest_memory:userfault.impl;
import :address;
import :book_files;
import :descriptor;
import :error;
import :memory_id;
import :userfault;

namespace cppvmm {

static std::mutex turns;

std::unique_lock<std::mutex> userfault_turn() {
  // A child of fork has a copy of the lock, and none of the thread that may hold it. fork takes the one that was
  // registered last first, as those do who take both.
  [[maybe_unused]] static const int registered = [] {
    prepare_books_for_fork();
    return pthread_atfork([] { turns.lock(); }, [] { turns.unlock(); }, [] { turns.unlock(); });
  }();
  return std::unique_lock(turns);
}

static std::uint64_t features_of(UserfaultUse use) {
  switch (use) {
  case UserfaultUse::asynchronous:
    return userfault_wp_hugetlbfs_shmem | userfault_wp_async;
  case UserfaultUse::held_discards:
    return userfault_wp_hugetlbfs_shmem | UFFD_FEATURE_EVENT_REMOVE;
  case UserfaultUse::lookups:
    break;
  }
  return userfault_wp_hugetlbfs_shmem;
}

Userfault::Userfault(std::unique_lock<std::mutex> turn, Descriptor descriptor, UserfaultUse use)
    : turn_(std::move(turn)), descriptor_(std::move(descriptor)), use_(use), memory_(memory_id()) {}

MemoryResult<Userfault> Userfault::open(UserfaultUse use) {
  const auto refuse = [](const char* operation) {
    const bool is_missing = errno == ENOSYS || errno == EINVAL;
    return std::unexpected(MemoryError{
        .code = is_missing ? MemoryErrc::unavailable : MemoryErrc::os, .os_error = errno, .operation = operation});
  };
  auto turn = userfault_turn();
  // Nothing is protected, so that there is no fault of the kernel's to resolve, and no privilege is needed.
  Descriptor own = open_userfaultfd();
  if (!own.is_open()) return refuse("userfaultfd");
  Userfault opened(std::move(turn), std::move(own), use);
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = features_of(use);
  if (ioctl(opened.descriptor_.number(), UFFDIO_API, &api) != 0)
    return refuse("write protection of huge pages by userfaultfd");
  return opened;
}

static int register_range(int descriptor, std::uint64_t start, std::uint64_t bytes) {
  uffdio_register request{};
  request.range = {.start = start, .len = bytes};
  request.mode = UFFDIO_REGISTER_MODE_WP;
  return ioctl(descriptor, UFFDIO_REGISTER, &request) == 0 ? 0 : errno;
}

int Userfault::enroll(std::uint64_t start, std::uint64_t bytes) {
  // Noted before the call, after which nothing may throw. What is another's must not be noted: before Linux 6.17, any
  // userfaultfd could unregister it.
  ranges_.push_back({start, bytes});
  const int refused = register_range(descriptor_.number(), start, bytes);
  if (refused != 0) ranges_.pop_back();
  return refused;
}

bool Userfault::holds(std::uint64_t start, std::uint64_t bytes) const {
  // ENOENT is what says that it is not. The file behind anonymous huge pages has none of its own; what a private
  // mapping of another file has of it is there already, or is mapped now, read-only and as the next look would have
  // found it.
  const int answer = map_cached(start, bytes);
  return (answer == EFAULT || answer == EEXIST || answer == 0) &&
         register_range(descriptor_.number(), start, bytes) == 0;
}

int Userfault::add(std::uint64_t start, std::uint64_t bytes) {
  // Only whole huge pages can be registered: which size they are of, the call says by refusing.
  int error = EINVAL;
  for (const std::uint64_t unit : {std::uint64_t{2} << 20, std::uint64_t{1} << 30}) {
    const std::uint64_t first = start / unit * unit;
    error = enroll(first, (start + bytes - first + unit - 1) / unit * unit);
    if (error != EINVAL) break;
  }
  return error;
}

int Userfault::map_cached(std::uint64_t start, std::uint64_t bytes) const {
  uffdio_continue request{};
  request.range = {.start = start, .len = bytes};
  request.mode = UFFDIO_CONTINUE_MODE_DONTWAKE;
  return ioctl(descriptor_.number(), UFFDIO_CONTINUE, &request) == 0 ? 0 : errno;
}

/// Those that wait go on once their event is read. Closing the descriptor would have the same effect, but not while a
/// forked child has it too.
void Userfault::let_discards_go() const {
  for (;;) {
    uffd_msg message{};
    while (read(descriptor_.number(), &message, sizeof message) == static_cast<ssize_t>(sizeof message)) {
    }
    // No discard begins to wait any more. One may be about to: as long as any is under way, the kernel refuses this
    // with EAGAIN, before it looks at what is asked for.
    uffdio_writeprotect nothing{};
    nothing.range = {.start = 0, .len = page_size};
    if (ioctl(descriptor_.number(), UFFDIO_WRITEPROTECT, &nothing) == 0 || errno != EAGAIN) return;
    // Not sched_yield: the one that is about to may be of a lower priority, on the same processor.
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

Userfault::~Userfault() {
  if (!descriptor_.is_open()) return;
  // In a forked child, the descriptor is of the parent's memory.
  if (memory_ != 0 && memory_id() == memory_) {
    for (const Range& range : ranges_) {
      uffdio_range request{.start = range.start, .len = range.bytes};
      // Where that fails, closing is what is left.
      static_cast<void>(ioctl(descriptor_.number(), UFFDIO_UNREGISTER, &request));
    }
    if (use_ == UserfaultUse::held_discards) let_discards_go();
  }
}

} // namespace cppvmm
