module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "../memory/largest_kept.hpp"
#include "../memory/packed_pairs.hpp"

module cppvmm.guest_memory:touched_runs.impl;
import :address;
import :page_set;
import :toucher;
import :touched_runs;

namespace cppvmm {

/// The bits of Touchers that each count is packed with.
static constexpr unsigned toucher_bits = 4;
static_assert(Touchers::from_bits(0xFF).bits() < 1U << toucher_bits);

struct TouchedRuns::Packed {
  PackedPairs before_last{};    ///< Of all but the last: the gap before it, and its count with its touchers.
  std::uint64_t packed_end = 0; ///< Where these end.
  TouchedRange last{};
  std::size_t size = 0;
};

static PageRange between(PageNumber first, PageNumber end) {
  return *PageRange::make(first, end.value() - first.value());
}

/// Reads them in order.
class TouchedRuns::Reader {
public:
  explicit Reader(const TouchedRuns& runs) {
    if (!runs.packed_) return;
    before_last_ = PackedPairs::Reader(runs.packed_->before_last);
    last_ = runs.packed_->last;
    left_ = runs.packed_->size;
    read();
  }

  [[nodiscard]] bool is_at_end() const { return now_.pages.empty(); }
  /// What has not been taken of the range that this is at.
  [[nodiscard]] const TouchedRange& now() const { return now_; }
  TouchedRange take() { return take_before(now_.pages.end()); }
  /// Takes what `now()` has before `end`, which is in it or its end.
  TouchedRange take_before(PageNumber end) {
    const TouchedRange before{between(now_.pages.first(), end), now_.by};
    if (end < now_.pages.end())
      now_.pages = between(end, now_.pages.end());
    else
      read();
    return before;
  }

private:
  void read() {
    if (left_ == 0) {
      now_ = {};
    } else if (--left_ == 0) {
      now_ = last_;
    } else {
      const auto [gap, packed] = before_last_.next();
      now_.pages = *PageRange::make(PageNumber(at_ + gap), packed >> toucher_bits);
      now_.by = Touchers::from_bits(static_cast<std::uint8_t>(packed % (1U << toucher_bits)));
      at_ = now_.pages.end().value();
    }
  }

  PackedPairs::Reader before_last_;
  TouchedRange last_;
  TouchedRange now_;
  std::size_t left_ = 0;
  std::uint64_t at_ = 0; ///< Where the one read last ends.
};

TouchedRuns::TouchedRuns(std::size_t limit) noexcept : limit_(std::max<std::size_t>(limit, 2)) {}
TouchedRuns::TouchedRuns(const TouchedRuns& other)
    : limit_(other.limit_), packed_(other.packed_ ? std::make_unique<Packed>(*other.packed_) : nullptr) {}
TouchedRuns::TouchedRuns(TouchedRuns&& other) noexcept = default;
TouchedRuns& TouchedRuns::operator=(const TouchedRuns& other) {
  if (this != &other) *this = TouchedRuns(other);
  return *this;
}
TouchedRuns& TouchedRuns::operator=(TouchedRuns&& other) noexcept = default;
TouchedRuns::~TouchedRuns() = default;

void TouchedRuns::add(PageRange pages, Touchers by) {
  if (pages.empty() || by.empty()) return;
  if (!packed_) packed_ = std::make_unique<Packed>();
  const PageNumber end = packed_->last.pages.end();
  if (pages.end() <= end) return;
  pages = between(std::max(pages.first(), end), pages.end());
  if (by == packed_->last.by && pages.first() == end) {
    packed_->last.pages = between(packed_->last.pages.first(), pages.end());
    return;
  }
  // Now, that none of them can go on.
  if (packed_->size == limit_) keep_largest();
  if (packed_->size > 0) {
    const TouchedRange& last = packed_->last;
    packed_->before_last.push(
        {last.pages.first().value() - packed_->packed_end, last.pages.count() << toucher_bits | last.by.bits()});
    packed_->packed_end = last.pages.end().value();
  }
  packed_->last = {pages, by};
  ++packed_->size;
}

void TouchedRuns::keep_largest() {
  LargestKept largest = [&] {
    std::vector<std::uint64_t> sizes;
    sizes.reserve(packed_->size);
    for_each([&](const TouchedRange& range) { sizes.push_back(range.pages.count()); });
    return LargestKept(std::move(sizes), limit_ / 2);
  }();
  TouchedRuns kept(limit_);
  for_each([&](const TouchedRange& range) {
    if (largest.keeps(range.pages.count())) kept.add(range.pages, range.by);
  });
  *this = std::move(kept);
}

void TouchedRuns::add(const TouchedRuns& behind) {
  behind.for_each([this](const TouchedRange& range) { add(range.pages, range.by); });
}

TouchedRuns TouchedRuns::united(const TouchedRuns& left, const TouchedRuns& right) {
  TouchedRuns result(left.limit_);
  Reader earlier(left);
  Reader later(right);
  const auto add = [&](const TouchedRange& range, Touchers also = {}) { result.add(range.pages, range.by | also); };
  while (!earlier.is_at_end() && !later.is_at_end()) {
    if (later.now().pages.first() < earlier.now().pages.first()) std::swap(earlier, later);
    const PageRange now = earlier.now().pages;
    const PageRange next = later.now().pages;
    if (now.first() < next.first()) {
      add(earlier.take_before(std::min(now.end(), next.first())));
    } else {
      const PageNumber end = std::min(now.end(), next.end());
      add(earlier.take_before(end), later.take_before(end).by);
    }
  }
  for (; !earlier.is_at_end(); add(earlier.take())) {
  }
  for (; !later.is_at_end(); add(later.take())) {
  }
  return result;
}

std::size_t TouchedRuns::entry_count() const { return packed_ ? packed_->size : 0; }

void TouchedRuns::for_each(const std::function<void(const TouchedRange&)>& each) const {
  for (Reader reader(*this); !reader.is_at_end();)
    each(reader.take());
}

std::vector<TouchedRange> TouchedRuns::entries() const {
  std::vector<TouchedRange> result;
  result.reserve(entry_count());
  for_each([&](const TouchedRange& range) { result.push_back(range); });
  return result;
}

PageSet TouchedRuns::pages() const {
  PageSet result;
  result.reserve(entry_count());
  for_each([&](const TouchedRange& range) { result.add(range.pages); });
  return result;
}

} // namespace cppvmm
