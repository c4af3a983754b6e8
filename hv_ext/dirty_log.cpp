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

  [[nodiscard]] std::uint64_t first_page() const { return slot.guest_address >> page_shift; }
  [[nodiscard]] std::uint64_t end_page() const { return first_page() + (slot.bytes >> page_shift); }
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
  [[nodiscard]] KvmResult<void> switch_logs(bool on);
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
    std::ranges::fill(read, 0);
    if (auto got = vm.dirty_log(slot.slot.slot, read); !got)
      return std::unexpected(MemoryError{.code = MemoryErrc::os,
                                         .address = pages.start_address().value(),
                                         .length = pages.bytes(),
                                         .os_error = got.error().os_error,
                                         .operation = got.error().operation});
    for (std::size_t i = 0; i < slot.written.size(); ++i)
      slot.written[i] |= read[i];
    add_bits(slot, pages, bitmap);
  }
  return {};
}

KvmResult<void> DirtyLog::State::switch_logs(bool on) {
  KvmResult<void> result;
  for (LoggedSlot& slot : slots) {
    slot.slot.log_dirty = on;
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

HvResult<DirtyLog> DirtyLog::start(Vm& vm, GuestMemory& memory, const std::vector<MemorySlot>& slots,
                                   const WriteLogOptions& options) {
  auto state = std::make_shared<State>(vm, memory);
  std::size_t most_words = 0;
  for (const MemorySlot& slot : slots) {
    if (slot.read_only) continue;
    const std::size_t words = ((slot.bytes >> page_shift) + 63) / 64;
    most_words = std::max(most_words, words);
    state->slots.push_back({.slot = slot, .written = std::vector<std::uint64_t>(words)});
  }
  state->read.resize(most_words);
  if (options.complete)
    for (const auto map = memory.snapshot(); const Region& region : map->regions())
      if (region.kind() == RegionKind::ram && !covers(state->slots, region))
        return std::unexpected(HvError{.code = HvErrc::invalid_options,
                                       .operation = "a complete dirty log without a slot for all of RAM"});

  // After an error the logs stay on: they may be on for another's sake, whose log must not miss a write.
  if (auto on = state->switch_logs(true); !on)
    return std::unexpected(HvError{.code = HvErrc::kvm, .operation = "switch the dirty log on", .cause = on.error()});
  WriteLog log{
      .collect = [state](PageRange pages, std::span<std::uint64_t> bitmap) { return state->collect(pages, bitmap); },
      .by = Toucher::guest};
  if (auto begun = memory.begin_write_log(std::move(log), options); !begun)
    return std::unexpected(HvError{.code = HvErrc::memory, .operation = "begin a write log", .cause = begun.error()});
  return DirtyLog(std::move(state));
}

HvResult<void> DirtyLog::stop() {
  if (!state_) return {};
  {
    const std::lock_guard lock(state_->mutex);
    if (!std::exchange(state_->is_on, false)) return {};
  }
  state_->memory.end_write_log();
  const std::lock_guard lock(state_->mutex);
  if (auto off = state_->switch_logs(false); !off)
    return std::unexpected(HvError{.code = HvErrc::kvm, .operation = "switch the dirty log off", .cause = off.error()});
  return {};
}

} // namespace cppvmm
