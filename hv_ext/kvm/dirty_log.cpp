module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>
module cppvmm.hv_ext:dirty_log.impl;
import :dirty_log;
import :error;
import cppvmm.guest_memory;
import cppvmm.vcpu;

namespace cppvmm {

struct LoggedSlot {
  MemorySlot slot;
  /// All that KVM has shown since the start: reading its log clears it.
  std::vector<std::uint64_t> written;
  /// What of that the VMM has not read, if it keeps a log of its own; else empty.
  std::vector<std::uint64_t> unread;

  [[nodiscard]] std::uint64_t first_page() const { return slot.guest_address >> page_shift; }
  [[nodiscard]] std::uint64_t end_page() const { return first_page() + (slot.bytes >> page_shift); }
  [[nodiscard]] std::size_t words() const { return ((slot.bytes >> page_shift) + 63) / 64; }
  [[nodiscard]] bool is_kept() const { return !unread.empty(); }
  /// Sets the bits of all of its pages, and no other: none where there are no words.
  void fill(std::vector<std::uint64_t>& bits) const {
    std::ranges::fill(bits, ~std::uint64_t{0});
    if (const std::uint64_t rest = (slot.bytes >> page_shift) % 64; rest != 0 && !bits.empty())
      bits.back() = (std::uint64_t{1} << rest) - 1;
  }
};

struct DirtyLog::State {
  Vm& vm;
  GuestMemory& memory;
  std::mutex mutex; // of what follows, and of KVM's logs
  std::vector<LoggedSlot> slots;
  std::vector<std::uint64_t> read; // room for one slot's log
  bool is_on = true;

  State(Vm& logged_vm, GuestMemory& guest_memory) : vm(logged_vm), memory(guest_memory) {}
  [[nodiscard]] MemoryResult<void> collect(PageRange pages, std::span<std::uint64_t> bitmap);
  /// Reads KVM's log of the slot, for all who want it.
  [[nodiscard]] KvmResult<void> read_log(LoggedSlot& slot);
  [[nodiscard]] KvmResult<void> switch_logs(bool on);
  /// Null when there is none.
  [[nodiscard]] LoggedSlot* find(std::uint32_t number);
};

/// Copies the bits of the pages that both have; true bits of `into` stay.
static void add_bits(const LoggedSlot& from, PageRange pages, std::span<std::uint64_t> into) {
  const std::uint64_t begin = std::max(from.first_page(), pages.first().value());
  const std::uint64_t end = std::min(from.end_page(), pages.end().value());
  for (std::uint64_t page = begin; page < end;) {
    const std::uint64_t at = page - from.first_page();
    const std::uint64_t word = from.written[at / 64] >> (at % 64);
    const std::uint64_t count = std::min(end - page, 64 - at % 64);
    if (word == 0) {
      page += count;
      continue;
    }
    for (std::uint64_t i = 0; i < count; ++i, ++page) {
      if ((word >> i & 1) == 0) continue;
      const std::uint64_t to = page - pages.first().value();
      into[to / 64] |= std::uint64_t{1} << (to % 64);
    }
  }
}

MemoryResult<void> DirtyLog::State::collect(PageRange pages, std::span<std::uint64_t> bitmap) {
  const std::lock_guard lock(mutex);
  if (!is_on)
    return std::unexpected(MemoryError{.code = MemoryErrc::unavailable,
                                       .address = pages.start_address().value(),
                                       .length = pages.bytes(),
                                       .operation = "KVM's dirty log, which was stopped"});
  for (LoggedSlot& slot : slots) {
    if (slot.first_page() >= pages.end().value() || slot.end_page() <= pages.first().value()) continue;
    if (auto got = read_log(slot); !got)
      return std::unexpected(MemoryError{.code = MemoryErrc::os,
                                         .address = pages.start_address().value(),
                                         .length = pages.bytes(),
                                         .os_error = got.error().os_error,
                                         .operation = got.error().operation});
    add_bits(slot, pages, bitmap);
  }
  return {};
}

KvmResult<void> DirtyLog::State::read_log(LoggedSlot& slot) {
  std::ranges::fill(read, 0);
  if (auto got = vm.dirty_log(slot.slot.slot, read); !got) {
    // KVM clears its log before it hands it over (virt/kvm/kvm_main.c, kvm_get_dirty_log_protect): what it has lost
    // may be any page.
    slot.fill(slot.written);
    slot.fill(slot.unread);
    return got;
  }
  for (std::size_t i = 0; i < slot.words(); ++i) {
    slot.written[i] |= read[i];
    if (slot.is_kept()) slot.unread[i] |= read[i];
  }
  return {};
}

LoggedSlot* DirtyLog::State::find(std::uint32_t number) {
  const auto slot = std::ranges::find(slots, number, [](const LoggedSlot& each) { return each.slot.slot; });
  return slot == slots.end() ? nullptr : &*slot;
}

KvmResult<void> DirtyLog::State::switch_logs(bool on) {
  KvmResult<void> result;
  for (LoggedSlot& slot : slots) {
    slot.slot.log_dirty = on || slot.is_kept();
    if (auto set = vm.set_memory_slot(slot.slot); !set) {
      result = set;
      if (on) break;
    }
  }
  return result;
}

/// Whether each page of RAM is in one of the slots, which maps what the region has.
static bool covers(std::span<const LoggedSlot> slots, const Region& region) {
  std::uint64_t at = region.pages().first().value();
  const auto host_of = [&](std::uint64_t page) {
    return static_cast<const std::byte*>(region.host_address()) +
           ((page - region.pages().first().value()) << page_shift);
  };
  while (at < region.pages().end().value()) {
    const auto slot = std::ranges::find_if(
        slots, [&](const LoggedSlot& each) { return each.first_page() <= at && at < each.end_page(); });
    if (slot == slots.end()) return false;
    const auto* const mapped =
        static_cast<const std::byte*>(slot->slot.host_address) + ((at - slot->first_page()) << page_shift);
    if (mapped != host_of(at)) return false;
    at = slot->end_page();
  }
  return true;
}

DirtyLog::DirtyLog(std::shared_ptr<State> state) : state_(std::move(state)) {}
DirtyLog::DirtyLog(DirtyLog&&) noexcept = default;
DirtyLog& DirtyLog::operator=(DirtyLog&& other) noexcept {
  if (this != &other) {
    [[maybe_unused]] const auto stopped = stop();
    state_ = std::move(other.state_);
  }
  return *this;
}
DirtyLog::~DirtyLog() { [[maybe_unused]] const auto stopped = stop(); }

HypervResult<DirtyLog> DirtyLog::start(Vm& vm, GuestMemory& memory, const std::vector<MemorySlot>& slots,
                                       const WriteLogOptions& options) {
  auto state = std::make_shared<State>(vm, memory);
  std::size_t most_words = 0;
  for (const MemorySlot& slot : slots) {
    if (slot.read_only) continue;
    LoggedSlot& logged = state->slots.emplace_back(LoggedSlot{.slot = slot, .written = {}, .unread = {}});
    logged.written.resize(logged.words());
    if (slot.log_dirty) logged.unread.resize(logged.words());
    most_words = std::max(most_words, logged.words());
  }
  state->read.resize(most_words);
  if (options.complete)
    for (const auto map = memory.snapshot(); const Region& region : map->regions())
      if (region.kind() == RegionKind::ram && !covers(state->slots, region))
        return std::unexpected(HypervError{.code = HypervErrc::invalid_options,
                                           .operation = "a complete dirty log without a slot for all of RAM"});

  // After an error the logs stay on: they may be on for another's sake, whose log must not miss a write.
  if (auto on = state->switch_logs(true); !on)
    return std::unexpected(
        HypervError{.code = HypervErrc::kvm, .operation = "switch the dirty log on", .cause = on.error()});
  WriteLog log{
      .collect = [state](PageRange pages, std::span<std::uint64_t> bitmap) { return state->collect(pages, bitmap); },
      .by = Toucher::guest};
  if (auto begun = memory.begin_write_log(std::move(log), options); !begun)
    return std::unexpected(
        HypervError{.code = HypervErrc::memory, .operation = "begin a write log", .cause = begun.error()});
  DirtyLog started(std::move(state));
  // Last, for what it reads is the VMM's too. One slot tells whether there is such a log at all.
  if (!started.state_->slots.empty()) {
    const std::lock_guard lock(started.state_->mutex);
    if (auto got = started.state_->read_log(started.state_->slots.front()); !got)
      return std::unexpected(
          HypervError{.code = HypervErrc::kvm, .operation = "read KVM's dirty log", .cause = got.error()});
  }
  return started;
}

static std::unexpected<HypervError> refused(const char* operation) {
  return std::unexpected(HypervError{.code = HypervErrc::invalid_options, .operation = operation});
}

HypervResult<void> DirtyLog::read(std::uint32_t slot, std::span<std::uint64_t> bitmap) {
  if (!state_) return refused("read the log of a DirtyLog that was moved from");
  const std::lock_guard lock(state_->mutex);
  LoggedSlot* const logged = state_->find(slot);
  if (logged == nullptr || !logged->is_kept()) return refused("read a log that is not the VMM's too");
  if (bitmap.size() < logged->words()) return refused("read a log into a bitmap that is too small");
  // A stopped one leaves KVM's log to the VMM, and to the next.
  if (state_->is_on)
    if (auto got = state_->read_log(*logged); !got)
      return std::unexpected(
          HypervError{.code = HypervErrc::kvm, .operation = "read KVM's dirty log", .cause = got.error()});
  std::ranges::copy(logged->unread, bitmap.begin());
  std::ranges::fill(logged->unread, 0);
  return {};
}

HypervResult<void> DirtyLog::clear(std::uint32_t slot, std::uint64_t first_page, std::uint32_t pages,
                                   std::span<const std::uint64_t> bitmap) {
  if (!state_) return refused("clear the log of a DirtyLog that was moved from");
  const std::lock_guard lock(state_->mutex);
  LoggedSlot* const logged = state_->find(slot);
  if (logged == nullptr || !logged->is_kept()) return refused("clear a log that is not the VMM's too");
  if (!state_->is_on) return refused("clear a log that was stopped");
  const std::size_t first = first_page / 64;
  const std::size_t count = (std::uint64_t{pages} + 63) / 64;
  const std::uint64_t all = logged->slot.bytes >> page_shift;
  if (bitmap.size() < count || first_page % 64 != 0 || first_page > all || pages > all - first_page ||
      (pages % 64 != 0 && first_page + pages != all))
    return refused("clear pages that are not the slot's, or by a bitmap that is too small");
  const auto failed = [](const char* operation, const KvmError& cause) {
    return std::unexpected(HypervError{.code = HypervErrc::kvm, .operation = operation, .cause = cause});
  };
  if (auto got = state_->read_log(*logged); !got) return failed("read KVM's dirty log", got.error());
  // Only what was read: a page that is written from now on must not be cleared before a survey sees it.
  const auto seen = std::span(state_->read).subspan(first, count);
  for (std::size_t i = 0; i < count; ++i)
    seen[i] &= bitmap[i];
  if (auto cleared = state_->vm.clear_dirty_log(slot, first_page, pages, seen); !cleared)
    return failed("clear KVM's dirty log", cleared.error());
  for (std::size_t i = 0; i < count; ++i)
    logged->unread[first + i] &= ~bitmap[i];
  return {};
}

HypervResult<void> DirtyLog::keep(std::uint32_t slot, bool is_kept) {
  if (!state_) return refused("keep the log of a DirtyLog that was moved from");
  const std::lock_guard lock(state_->mutex);
  LoggedSlot* const logged = state_->find(slot);
  if (logged == nullptr || !state_->is_on) return refused("keep the log of a slot that is not logged");
  if (is_kept == logged->is_kept()) return {};
  if (!is_kept) {
    logged->unread = {};
    return {};
  }
  // What was written until now is not in it.
  if (auto got = state_->read_log(*logged); !got)
    return std::unexpected(
        HypervError{.code = HypervErrc::kvm, .operation = "read KVM's dirty log", .cause = got.error()});
  logged->unread.resize(logged->words());
  return {};
}

HypervResult<void> DirtyLog::stop() {
  if (!state_) return {};
  {
    const std::lock_guard lock(state_->mutex);
    if (!std::exchange(state_->is_on, false)) return {};
  }
  state_->memory.end_write_log();
  const std::lock_guard lock(state_->mutex);
  if (auto off = state_->switch_logs(false); !off)
    return std::unexpected(
        HypervError{.code = HypervErrc::kvm, .operation = "switch the dirty log off", .cause = off.error()});
  return {};
}

} // namespace cppvmm
