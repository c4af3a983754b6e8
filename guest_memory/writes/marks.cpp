module;
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <vector>
module cppvmm.guest_memory:marks.impl;
import :address;
import :marks;
import :memory_map;
import :page_set;
import :published_map;
import :region;
import :survey_stop;
import :toucher;

// Why no mark is lost: marks are taken away with the lock alone, by clear and by Taken, a word at a time. A mark sets
// its bits or its byte, or finds them set; either is before they are taken away, and then it is a mark made before, or
// after, and then it stays. Bits that move down are below before they leave the slot above; who marks looks above
// first, but for one page of one toucher that has a byte, which is set whatever is above.
//
// That a byte is stored where others change its word is no matter of C++: a processor has a line of the cache to itself
// while it changes a word in it by a locked instruction (Intel SDM 3, "Locked Atomic Operations"; so does AMD), and
// another's store to a byte of it is before that or after. Linux's own spin locks are released so
// (asm-generic/qspinlock.h, queued_spin_unlock).
//
// Why a survey sees the marks that were made before it: the store of a byte may wait in its processor when mark()
// returns. Who looks has each thread pass a barrier (membarrier), where that was to be had when the memory was made;
// else the store is a locked instruction. All other ways to mark are locked instructions.
//
// Why a mark that is found to be set is as good as one that is set: who takes it away discards the page's content after
// that. What a mark is for, DMA, is in memory before its end is known to who marks, so it is discarded too. (A store of
// this process may reach memory after the mark was looked up; it goes through the page tables, whose change waits for
// it, and is in the kernel's books wherever it ended.)

namespace cppvmm {

static_assert(std::endian::native == std::endian::little, "the lowest byte of a word is its first page's");
static_assert(MarkWord::is_always_lock_free && sizeof(MarkWord) == sizeof(std::uint64_t));

/// Of a leaf's slot: all its pages are marked.
static constexpr std::uint64_t whole_leaf = 1;
static constexpr std::uint64_t each_page = 0x0101'0101'0101'0101;
static constexpr unsigned bits_per_page = 8;

static_assert(alignof(MarkLeaf) > mark_slot_bits && alignof(MarkNode) > mark_slot_bits);

static constexpr unsigned touchers[] = {0, 1, 2, 3};
static_assert(std::size(touchers) == mark_touchers && (mark_slot_bits >> mark_touchers) == 0);

static bool has(std::uint64_t bits, unsigned toucher) { return (bits >> toucher & 1) != 0; }

static void set(MarkWord& word, std::uint64_t bits) {
  // A bit that is set already costs no write, so that those who mark the same pages do not wait for each other.
  if ((word.load(std::memory_order_acquire) & bits) != bits) word.fetch_or(bits, std::memory_order_acq_rel);
}

/// Of a word: the marks of the pages from `first` to `end`, which are in it.
static std::uint64_t mask(std::uint64_t first, std::uint64_t end) {
  return (each_page >> (MarkLeaf::pages_per_word - (end - first)) * bits_per_page)
         << first % MarkLeaf::pages_per_word * bits_per_page;
}

/// Where the part of so many pages ends that has the page, or what is looked at.
static std::uint64_t part_end(std::uint64_t page, std::uint64_t part, std::uint64_t end) {
  return std::min(end, (page / part + 1) * part);
}

static MarkWord& word_of(MarkLeaf& leaf, std::uint64_t page) {
  return leaf.words[page % MarkLeaf::pages / MarkLeaf::pages_per_word];
}

Marks::~Marks() {
  for (const MarkWord& node_slot : nodes_) {
    const std::unique_ptr<MarkNode> node(below<MarkNode>(node_slot.load(std::memory_order_acquire)));
    if (!node) continue;
    for (const auto& slots : node->leaves)
      for (const MarkWord& slot : slots)
        delete below<MarkLeaf>(slot.load(std::memory_order_acquire));
  }
}

/// Of the map's RAM.
struct RamParts {
  std::uint64_t count = 0; ///< That it is in, or more.
  bool has_page = false;   ///< Some of it is in the part that has the page.
};

template <class Below>
static RamParts parts_of_ram(const MemoryMap& map, std::uint64_t page) {
  RamParts parts;
  for (const Region& region : map.regions()) {
    if (region.kind() != RegionKind::ram) continue;
    const std::uint64_t first = region.pages().first().value() / Below::pages;
    const std::uint64_t last = (region.pages().end().value() - 1) / Below::pages;
    parts.count += last - first + 1;
    parts.has_page = parts.has_page || (first <= page / Below::pages && page / Below::pages <= last);
  }
  return parts;
}

/// Whether there was less than the most.
static bool take_one(std::atomic<std::uint64_t>& taken, std::uint64_t most) {
  std::uint64_t now = taken.load(std::memory_order_relaxed);
  while (now < most)
    if (taken.compare_exchange_weak(now, now + 1, std::memory_order_relaxed)) return true;
  return false;
}

/// What is below the slot that has the page; null where there is nothing, and nothing can be made.
template <class Below>
Below* Marks::make_below(MarkWord& slot, std::uint64_t page, Allowance& allowance) noexcept {
  std::uint64_t value = slot.load(std::memory_order_acquire);
  if (auto* const there = below<Below>(value)) return there;
  const RamParts ram = [&] {
    const PublishedMap::Reader map(map_);
    return parts_of_ram<Below>(*map, page);
  }();
  std::atomic<std::uint64_t>& taken = ram.has_page ? allowance.of_ram : allowance.spare;
  const std::uint64_t most = allowance.most_spare + (ram.has_page ? ram.count * Below::of_each_part : 0);
  if (!take_one(taken, most)) return nullptr;
  if (std::unique_ptr<Below> made(new (std::nothrow) Below); made) {
    while (below<Below>(value) == nullptr)
      if (slot.compare_exchange_weak(value, value | reinterpret_cast<std::uintptr_t>(made.get()),
                                     std::memory_order_acq_rel, std::memory_order_acquire))
        return made.release();
  }
  taken.fetch_sub(1, std::memory_order_relaxed);
  return below<Below>(value);
}

void Marks::mark_all(PageRange pages, std::uint64_t bits) noexcept {
  const std::uint64_t end = pages.end().value();
  for (std::uint64_t page = pages.first().value(); page < end;) {
    const std::uint64_t next = part_end(page, MarkNode::pages, end);
    MarkWord& slot = nodes_[page / MarkNode::pages];
    const std::uint64_t value = slot.load(std::memory_order_acquire);
    if ((value & bits) != bits) {
      auto* node = next - page == MarkNode::pages ? nullptr : below<MarkNode>(value);
      if (node == nullptr && next - page < MarkNode::pages) node = make_below<MarkNode>(slot, page, some_nodes_);
      if (node == nullptr) set(slot, bits);
      for (const unsigned toucher : touchers)
        if (node != nullptr && has(bits, toucher)) mark_in(*node, page, next, toucher);
    }
    page = next;
  }
}

void Marks::mark_in(MarkNode& node, std::uint64_t first, std::uint64_t end, unsigned toucher) noexcept {
  for (std::uint64_t page = first; page < end;) {
    const std::uint64_t next = part_end(page, MarkLeaf::pages, end);
    MarkWord& slot = leaf_slots(node, page)[toucher];
    const std::uint64_t value = slot.load(std::memory_order_acquire);
    if ((value & whole_leaf) == 0) {
      auto* leaf = next - page == MarkLeaf::pages ? nullptr : below<MarkLeaf>(value);
      if (leaf == nullptr && next - page < MarkLeaf::pages) leaf = make_below<MarkLeaf>(slot, page, some_leaves_);
      if (leaf == nullptr) set(slot, whole_leaf);
      while (leaf != nullptr && page < next) {
        const std::uint64_t word_end = part_end(page, MarkLeaf::pages_per_word, next);
        set(word_of(*leaf, page), mask(page, word_end));
        page = word_end;
      }
    }
    page = next;
  }
}

void Marks::split(std::uint64_t page) noexcept {
  if (page % MarkNode::pages == 0) return;
  MarkWord& node_slot = nodes_[page / MarkNode::pages];
  const std::uint64_t of_node = node_slot.load(std::memory_order_acquire) & mark_slot_bits;
  auto* node = below<MarkNode>(node_slot.load(std::memory_order_acquire));
  if (of_node != 0) {
    node = make_below<MarkNode>(node_slot, page, some_nodes_);
    if (node == nullptr) return;
    for (auto& slots : node->leaves)
      for (const unsigned toucher : touchers)
        if (has(of_node, toucher)) set(slots[toucher], whole_leaf);
    node_slot.fetch_and(~of_node, std::memory_order_acq_rel);
  }
  if (node == nullptr || page % MarkLeaf::pages == 0) return;
  for (MarkWord& slot : leaf_slots(*node, page)) {
    if ((slot.load(std::memory_order_acquire) & whole_leaf) == 0) continue;
    auto* const leaf = make_below<MarkLeaf>(slot, page, some_leaves_);
    if (leaf == nullptr) continue;
    for (MarkWord& word : leaf->words)
      set(word, each_page);
    slot.fetch_and(~whole_leaf, std::memory_order_acq_rel);
  }
}

template <class Each>
void Marks::for_words(PageRange pages, Each each) {
  const std::uint64_t end = pages.end().value();
  for (std::uint64_t page = pages.first().value(); page < end;) {
    const std::uint64_t node_end = part_end(page, MarkNode::pages, end);
    MarkWord& node_slot = nodes_[page / MarkNode::pages];
    if (node_end - page == MarkNode::pages) each(node_slot, mark_slot_bits);
    auto* const node = below<MarkNode>(node_slot.load(std::memory_order_acquire));
    while (node != nullptr && page < node_end) {
      const std::uint64_t leaf_end = part_end(page, MarkLeaf::pages, node_end);
      for (MarkWord& slot : leaf_slots(*node, page)) {
        if (leaf_end - page == MarkLeaf::pages) each(slot, whole_leaf);
        auto* const leaf = below<MarkLeaf>(slot.load(std::memory_order_acquire));
        for (std::uint64_t at = page; leaf != nullptr && at < leaf_end;) {
          const std::uint64_t word_end = part_end(at, MarkLeaf::pages_per_word, leaf_end);
          each(word_of(*leaf, at), mask(at, word_end));
          at = word_end;
        }
      }
      page = leaf_end;
    }
    page = node_end;
  }
}

void Marks::clear(PageRange pages) noexcept {
  if (pages.empty()) return;
  const std::lock_guard lock(taking_);
  split(pages.first().value());
  split(pages.end().value());
  for_words(pages, [](MarkWord& word, std::uint64_t bits) {
    if ((word.load(std::memory_order_acquire) & bits) != 0) word.fetch_and(~bits, std::memory_order_acq_rel);
  });
}

Marks::Taken::Taken(Marks& marks, const PageSet& pages) : lock_(marks.taking_) {
  for (const PageRange& range : pages.ranges()) {
    marks.split(range.first().value());
    marks.split(range.end().value());
    marks.for_words(range, [this](MarkWord& word, std::uint64_t bits) {
      bits &= word.load(std::memory_order_acquire);
      if (bits != 0) add(word, bits);
    });
  }
  // With no allocation from here on.
  for (const Bits& taken : taken_)
    for (MarkWord& word : std::span(taken.first, taken.words))
      word.fetch_and(~taken.bits, std::memory_order_acq_rel);
}

void Marks::Taken::add(MarkWord& word, std::uint64_t bits) {
  if (!taken_.empty() && taken_.back().first + taken_.back().words == &word && taken_.back().bits == bits)
    ++taken_.back().words;
  else
    taken_.push_back({&word, 1, bits});
}

Marks::Taken::~Taken() {
  for (const Bits& taken : taken_)
    for (MarkWord& word : std::span(taken.first, taken.words))
      word.fetch_or(taken.bits, std::memory_order_acq_rel);
}

Marks::View::View(const Marks& marks) : marks_(marks), lock_(marks.taking_, std::defer_lock) {
  constexpr std::chrono::milliseconds at_a_time(10);
  while (!lock_.try_lock_for(at_a_time))
    if (is_survey_stopped()) return;
  // The first mark of all is more than the store of a byte.
  if (!is_blank() && marks.map_.is_asymmetric()) error_ = PublishedMap::pass_barriers();
}

Marks::View::~View() = default;

bool Marks::View::is_blank() const {
  return std::ranges::all_of(marks_.nodes_,
                             [](const MarkWord& slot) { return slot.load(std::memory_order_acquire) == 0; });
}

/// Joins neighbours with the same touchers.
class MarkRuns {
public:
  explicit MarkRuns(const std::function<void(PageRange, Touchers)>& each) : each_(each) {}

  void add(std::uint64_t first, std::uint64_t end, std::uint64_t bits) {
    if (bits == bits_ && first == end_) {
      end_ = end;
      return;
    }
    close();
    first_ = first;
    end_ = end;
    bits_ = bits;
  }

  void close() const {
    if (bits_ != 0)
      each_(*PageRange::make(PageNumber(first_), end_ - first_), Touchers::from_bits(static_cast<std::uint8_t>(bits_)));
  }

private:
  const std::function<void(PageRange, Touchers)>& each_;
  std::uint64_t first_ = 0;
  std::uint64_t end_ = 0;
  std::uint64_t bits_ = 0;
};

/// The leaves that say who marked the pages of a part.
class MarkLeaves {
public:
  MarkLeaves(MarkNode& node, std::uint64_t page, std::uint64_t of_node) : of_all_(of_node) {
    const auto& slots = leaf_slots(node, page);
    for (const unsigned toucher : touchers) {
      const std::uint64_t slot = slots[toucher].load(std::memory_order_acquire);
      if ((slot & whole_leaf) != 0) of_all_ |= std::uint64_t{1} << toucher;
      if (auto* const leaf = below<MarkLeaf>(slot); leaf != nullptr && !has(of_all_, toucher))
        some_[count_++] = {leaf, toucher};
    }
  }

  [[nodiscard]] bool empty() const { return count_ == 0; }
  /// Who touched all pages of the part.
  [[nodiscard]] std::uint64_t of_all() const { return of_all_; }

  /// The pages from `first` to `end`, which are in one word of each leaf.
  void add_words(std::uint64_t first, std::uint64_t end, MarkRuns& runs) const {
    std::uint64_t of_page[MarkLeaf::pages_per_word] = {};
    std::uint64_t of_all = of_all_;
    bool are_all_same = true;
    for (const Leaf& each : std::span(some_).first(count_)) {
      const std::uint64_t asked = mask(first, end);
      std::uint64_t word = word_of(*each.leaf, first).load(std::memory_order_acquire) & asked;
      if (word == asked) {
        of_all |= std::uint64_t{1} << each.toucher;
        continue;
      }
      are_all_same = are_all_same && word == 0;
      for (word >>= first % MarkLeaf::pages_per_word * bits_per_page; word != 0; word &= word - 1)
        of_page[static_cast<unsigned>(std::countr_zero(word)) / bits_per_page] |= std::uint64_t{1} << each.toucher;
    }
    if (are_all_same) return runs.add(first, end, of_all);
    for (std::uint64_t page = first; page < end; ++page)
      runs.add(page, page + 1, of_all | of_page[page - first]);
  }

  /// The first word's page, from `page` on and before `end`, that is marked by other than all of the part.
  [[nodiscard]] std::uint64_t skip_blank(std::uint64_t page, std::uint64_t end) const {
    const auto is_blank = [&](const Leaf& each) {
      return word_of(*each.leaf, page).load(std::memory_order_acquire) == 0;
    };
    while (page < end && std::ranges::all_of(std::span(some_).first(count_), is_blank))
      page = part_end(page, MarkLeaf::pages_per_word, end);
    return page;
  }

private:
  struct Leaf {
    MarkLeaf* leaf;
    unsigned toucher;
  };
  std::array<Leaf, mark_touchers> some_{};
  std::size_t count_ = 0;
  std::uint64_t of_all_;
};

void Marks::View::for_each(PageRange within, const std::function<void(PageRange, Touchers)>& each) const {
  MarkRuns runs(each);
  const std::uint64_t end = within.end().value();
  for (std::uint64_t page = within.first().value(); page < end;) {
    const std::uint64_t node_end = part_end(page, MarkNode::pages, end);
    const std::uint64_t slot = marks_.nodes_[page / MarkNode::pages].load(std::memory_order_acquire);
    auto* const node = below<MarkNode>(slot);
    if (node == nullptr) runs.add(page, node_end, slot & mark_slot_bits);
    while (node != nullptr && page < node_end) {
      const std::uint64_t leaf_end = part_end(page, MarkLeaf::pages, node_end);
      const MarkLeaves leaves(*node, page, slot & mark_slot_bits);
      if (leaves.empty()) {
        runs.add(page, leaf_end, leaves.of_all());
        page = leaf_end;
      }
      while (page < leaf_end) {
        const std::uint64_t marked = leaves.skip_blank(page, leaf_end);
        if (page < marked) runs.add(page, marked, leaves.of_all());
        page = marked;
        if (page == leaf_end) break;
        const std::uint64_t word_end = part_end(page, MarkLeaf::pages_per_word, leaf_end);
        leaves.add_words(page, word_end, runs);
        page = word_end;
      }
    }
    page = node_end;
  }
  runs.close();
}

} // namespace cppvmm
