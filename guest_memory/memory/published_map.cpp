module;
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <linux/membarrier.h>
#include <memory>
#include <mutex>
#include <new>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>
#include <vector>
module cppvmm.guest_memory:published_map.impl;
import :memory_map;
import :published_map;

namespace cppvmm {

/// Which map a thread reads just now. It is never freed, and serves another thread when its own has ended.
struct alignas(64) ReadSlot {
  std::atomic<const MemoryMap*> map = nullptr;
  /// Whose map: another's may come to lie where one was that is named a moment too long.
  std::atomic<const PublishedMap*> owner = nullptr;
  std::atomic<bool> is_taken = true;
  ReadSlot* next = nullptr;
};

static std::atomic<ReadSlot*> all_slots = nullptr;

static ReadSlot* take_slot() {
  for (ReadSlot* each = all_slots.load(std::memory_order_acquire); each != nullptr; each = each->next)
    if (!each->is_taken.load(std::memory_order_relaxed) && !each->is_taken.exchange(true, std::memory_order_acquire))
      return each;
  auto* const made = new (std::nothrow) ReadSlot;
  if (made == nullptr) return nullptr;
  made->next = all_slots.load(std::memory_order_relaxed);
  while (!all_slots.compare_exchange_weak(made->next, made, std::memory_order_release, std::memory_order_relaxed)) {
  }
  return made;
}

// A plain pointer, so that an access asks for no initialisation.
static constinit thread_local ReadSlot* own_slot = nullptr;
static constinit thread_local bool is_ending = false;

/// Gives a thread's slot back at its end.
struct SlotOfThread {
  ~SlotOfThread() {
    is_ending = true;
    if (ReadSlot* const slot = std::exchange(own_slot, nullptr)) slot->is_taken.store(false, std::memory_order_release);
  }
};

/// In a forked child: of the other threads, which it does not have.
static void clear_slots_of_others() {
  for (ReadSlot* each = all_slots.load(std::memory_order_acquire); each != nullptr; each = each->next) {
    if (each == own_slot) continue;
    each->map.store(nullptr, std::memory_order_relaxed);
    each->is_taken.store(false, std::memory_order_relaxed);
  }
}

[[gnu::noinline]] static ReadSlot* first_slot() {
  if (is_ending) return nullptr;
  [[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, clear_slots_of_others);
  static thread_local SlotOfThread at_end;
  static_cast<void>(&at_end);
  own_slot = take_slot();
  return own_slot;
}

/// Null where there is none to be had, or the thread is reading already.
static ReadSlot* free_slot() {
  ReadSlot* slot = own_slot;
  if (slot == nullptr) slot = first_slot();
  return slot == nullptr || slot->map.load(std::memory_order_relaxed) != nullptr ? nullptr : slot;
}

// Every thread of this process passes a full barrier meanwhile (kernel/sched/membarrier.c,
// membarrier_private_expedited).
int PublishedMap::pass_barriers() {
  const bool are_passed = syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) == 0 ||
                          (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0 &&
                           syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) == 0);
  return are_passed ? 0 : errno;
}

PublishedMap::PublishedMap(MemoryMap map)
    : owner_(std::make_shared<const MemoryMap>(std::move(map))), current_(owner_.get()),
      is_asymmetric_(pass_barriers() == 0) {}

// Between the store that names a map and the load that tells whether it is still the current one, and between the store
// that names none any more and the load that tells whether it was replaced. The other side of both is in publish().
[[gnu::always_inline]] static inline void reader_barrier(bool is_asymmetric) {
  if (is_asymmetric)
    std::atomic_signal_fence(std::memory_order_seq_cst);
  else
    std::atomic_thread_fence(std::memory_order_seq_cst);
}

PublishedMap::Reader::Reader(const PublishedMap& published) : published_(published), slot_(free_slot()) {
  if (slot_ == nullptr) {
    kept_ = published.snapshot();
    map_ = kept_.get();
    return;
  }
  slot_->owner.store(&published, std::memory_order_relaxed);
  map_ = published.current_.load(std::memory_order_acquire);
  for (;;) {
    slot_->map.store(map_, std::memory_order_release);
    reader_barrier(published.is_asymmetric_);
    const MemoryMap* const now = published.current_.load(std::memory_order_acquire);
    if (now == map_) return;
    map_ = now;
    named_another_ = true;
  }
}

PublishedMap::Reader::~Reader() {
  if (slot_ == nullptr) return;
  slot_->map.store(nullptr, std::memory_order_release);
  reader_barrier(published_.is_asymmetric_);
  if (named_another_ || published_.current_.load(std::memory_order_relaxed) != map_) published_.let_go();
}

std::shared_ptr<const MemoryMap> PublishedMap::snapshot() const {
  const std::lock_guard lock(mutex_);
  return owner_;
}

void PublishedMap::replace(MemoryMap map) {
  Maps unread;
  auto next = std::make_shared<const MemoryMap>(std::move(map));
  const std::lock_guard lock(mutex_);
  static_cast<void>(publish(std::move(next), unread));
}

std::shared_ptr<const MemoryMap> PublishedMap::publish(std::shared_ptr<const MemoryMap> next, Maps& unread) {
  retired_.reserve(retired_.size() + 1);
  unread.reserve(retired_.size() + 1);
  auto previous = std::exchange(owner_, std::move(next));
  current_.store(owner_.get(), std::memory_order_seq_cst);
  retired_.push_back({.map = previous});
  take_unread(unread);
  return previous;
}

void PublishedMap::take_unread(Maps& unread) const {
  const bool are_announced = std::ranges::all_of(retired_, &Retired::is_announced);
  // Who has passed no barrier may read any of them: where it is refused, they go with a later change.
  if (!are_announced && (!is_asymmetric_ || pass_barriers() == 0))
    for (Retired& each : retired_)
      each.is_announced = true;
  if (!is_asymmetric_) std::atomic_thread_fence(std::memory_order_seq_cst);
  const auto is_kept = [this](const Retired& retired) {
    if (!retired.is_announced) return true;
    for (const ReadSlot* each = all_slots.load(std::memory_order_acquire); each != nullptr; each = each->next)
      if (each->map.load(std::memory_order_acquire) == retired.map.get() &&
          each->owner.load(std::memory_order_relaxed) == this)
        return true;
    return false;
  };
  const auto gone = std::ranges::partition(retired_, is_kept);
  for (Retired& each : gone)
    unread.push_back(std::move(each.map));
  retired_.erase(gone.begin(), gone.end());
}

void PublishedMap::let_go() const noexcept {
  Maps unread;
  try {
    const std::lock_guard lock(mutex_);
    unread.reserve(retired_.size());
    take_unread(unread);
  } catch (const std::exception&) {
    return; // No memory for the list: they go with the next change.
  }
}

} // namespace cppvmm
