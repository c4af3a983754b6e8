module;
#include <chrono>
#include <expected>
#include <memory>
#include <mutex>
#include <utility>
module cppvmm.guest_memory:guest_memory.impl;
import :address;
import :error;
import :guest_memory;
import :memory_map;
import :page_set;
import :region;
import :survey;
import :touched_map;

namespace cppvmm {

struct GuestMemory::State {
  mutable std::mutex mutex;
  std::shared_ptr<const MemoryMap> map;
  TouchedMap marks;
};

GuestMemory::GuestMemory() : GuestMemory(MemoryMap()) {}
GuestMemory::GuestMemory(MemoryMap map) : state_(std::make_unique<State>()) {
  state_->map = std::make_shared<const MemoryMap>(std::move(map));
}
GuestMemory::~GuestMemory() = default;

std::shared_ptr<const MemoryMap> GuestMemory::snapshot() const {
  const std::lock_guard lock(state_->mutex);
  return state_->map;
}

void GuestMemory::replace(MemoryMap map) {
  auto next = std::make_shared<const MemoryMap>(std::move(map));
  {
    const std::lock_guard lock(state_->mutex);
    state_->map.swap(next);
  }
  // What was replaced goes here, outside the lock: unmapping its regions can take long.
}

MemoryResult<void> GuestMemory::add_region(Region region) {
  const std::lock_guard lock(state_->mutex);
  auto next = state_->map->with(std::move(region));
  if (!next) return std::unexpected(next.error());
  state_->map = std::make_shared<const MemoryMap>(std::move(*next));
  return {};
}

MemoryResult<void> GuestMemory::remove_region(GuestAddress start) {
  std::shared_ptr<const MemoryMap> previous;
  const std::lock_guard lock(state_->mutex);
  auto next = state_->map->without(start);
  if (!next) return std::unexpected(next.error());
  previous = std::exchange(state_->map, std::make_shared<const MemoryMap>(std::move(*next)));
  return {};
}

void GuestMemory::mark_touched(PageRange pages, Touchers by) {
  const std::lock_guard lock(state_->mutex);
  state_->marks.mark(pages, by);
}

void GuestMemory::clear_marks(PageRange pages) {
  const std::lock_guard lock(state_->mutex);
  state_->marks.clear(pages);
}

TouchedMap GuestMemory::marks() const {
  const std::lock_guard lock(state_->mutex);
  return state_->marks;
}

Survey GuestMemory::survey(const SurveyOptions& options) const {
  constexpr int attempts = 4;
  const auto begin = std::chrono::steady_clock::now();
  for (int attempt = 1;; ++attempt) {
    const auto map = snapshot();
    Survey survey = survey_map(*map, options);
    // Marks are read last: all that were made before the survey began are among them.
    survey.marks = marks();
    PageSet marked = survey.marks.pages();
    marked.intersect(survey.ram);
    survey.touched.add(marked);
    const bool current = snapshot() == map;
    if (!current && attempt < attempts) continue;
    if (!current) survey.touched = survey.ram;
    survey.zeroed = survey.ram;
    survey.zeroed.remove(survey.touched);
    survey.zeroed.remove(options.leave_out);
    survey.cost = std::chrono::steady_clock::now() - begin;
    return survey;
  }
}

} // namespace cppvmm
