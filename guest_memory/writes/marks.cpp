module;
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
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
import :toucher;

// Why no mark is lost: bits are taken away with the lock alone, by clear and by Taken. A mark sets its bits in one
// word, or finds them set; either is before they are taken away, and then it is a mark made before, or after, and then
// it stays. Bits that move down are below before they leave the slot above, and who marks looks above first.
//
// Why a mark that is found to be set is as good as one that is set: who takes it away discards the page's content after
// that. What a mark is for, DMA, is in memory before its end is known to who marks, so it is discarded too. (A store of
// this process may reach memory after the mark was looked up; it goes through the page tables, whose change waits for
// it, and is in the kernel's books wherever it ended.)

namespace cppvmm {

static constexpr std::uint64_t all_touchers = 0xF;
static constexpr std::uint64_t each_page = 0x1111'1111'1111'1111;
static constexpr unsigned bits_per_page = 4;

static_assert(alignof(MarkLeaf) > all_touchers && alignof(MarkNode) > all_touchers);

template <class Below>
static Below* below(std::uint64_t slot) {
  return reinterpret_cast<Below*>(slot & ~all_touchers);
}

static void set(MarkWord& word, std::uint64_t bits) {
  // A bit that is set already costs no write, so that those who mark the same pages do not wait for each other.
  if ((word.load(std::memory_order_acquire) & bits) != bits) word.fetch_or(bits, std::memory_order_acq_rel);
}

/// Of a word: the bits of the pages from `first` to `end`, which are in it.
static std::uint64_t mask(std::uint64_t first, std::uint64_t end) {
  return ~std::uint64_t{0} >> (MarkLeaf::pages_per_word - (end - first)) * bits_per_page
                                  << first % MarkLeaf::pages_per_word * bits_per_page;
}

/// Where the part of so many pages ends that has the page, or what is looked at.
static std::uint64_t part_end(std::uint64_t page, std::uint64_t part, std::uint64_t end) {
  return std::min(end, (page / part + 1) * part);
}

static MarkWord& leaf_slot(MarkNode& node, std::uint64_t page) {
  return node.leaves[page % MarkNode::pages / MarkLeaf::pages];
}

static MarkWord& word_of(MarkLeaf& leaf, std::uint64_t page) {
  return leaf.words[page % MarkLeaf::pages / MarkLeaf::pages_per_word];
}

Marks::~Marks() {
  for (const MarkWord& node_slot : nodes_) {
    const std::unique_ptr<MarkNode> node(below<MarkNode>(node_slot.load(std::memory_order_acquire)));
    if (!node) continue;
    for (const MarkWord& slot : node->leaves)
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
  if (!take_one(taken, allowance.most_spare + (ram.has_page ? ram.count : 0))) return nullptr;
  if (std::unique_ptr<Below> made(new (std::nothrow) Below); made) {
    while (below<Below>(value) == nullptr)
      if (slot.compare_exchange_weak(value, value | reinterpret_cast<std::uintptr_t>(made.get()),
                                     std::memory_order_acq_rel, std::memory_order_acquire))
        return made.release();
  }
  taken.fetch_sub(1, std::memory_order_relaxed);
  return below<Below>(value);
}

void Marks::mark(PageRange pages, Touchers by) noexcept {
  const std::uint64_t bits = by.bits();
  if (pages.count() == 1) {
    const std::uint64_t page = pages.first().value();
    if (auto* const node = below<MarkNode>(nodes_[page / MarkNode::pages].load(std::memory_order_acquire)))
      if (auto* const leaf = below<MarkLeaf>(leaf_slot(*node, page).load(std::memory_order_acquire))) {
        set(word_of(*leaf, page), bits << page % MarkLeaf::pages_per_word * bits_per_page);
        return;
      }
  }
  const std::uint64_t end = pages.end().value();
  for (std::uint64_t page = pages.first().value(); page < end;) {
    const std::uint64_t next = part_end(page, MarkNode::pages, end);
    MarkWord& slot = nodes_[page / MarkNode::pages];
    const std::uint64_t value = slot.load(std::memory_order_acquire);
    if ((value & bits) != bits) {
      auto* node = next - page == MarkNode::pages ? nullptr : below<MarkNode>(value);
      if (node == nullptr && next - page < MarkNode::pages) node = make_below<MarkNode>(slot, page, some_nodes_);
      if (node != nullptr)
        mark_in(*node, page, next, bits);
      else
        set(slot, bits);
    }
    page = next;
  }
}

void Marks::mark_in(MarkNode& node, std::uint64_t first, std::uint64_t end, std::uint64_t bits) noexcept {
  for (std::uint64_t page = first; page < end;) {
    const std::uint64_t next = part_end(page, MarkLeaf::pages, end);
    MarkWord& slot = leaf_slot(node, page);
    const std::uint64_t value = slot.load(std::memory_order_acquire);
    if ((value & bits) != bits) {
      auto* leaf = next - page == MarkLeaf::pages ? nullptr : below<MarkLeaf>(value);
      if (leaf == nullptr && next - page < MarkLeaf::pages) leaf = make_below<MarkLeaf>(slot, page, some_leaves_);
      if (leaf == nullptr) set(slot, bits);
      while (leaf != nullptr && page < next) {
        const std::uint64_t word_end = part_end(page, MarkLeaf::pages_per_word, next);
        set(word_of(*leaf, page), bits * each_page & mask(page, word_end));
        page = word_end;
      }
    }
    page = next;
  }
}

void Marks::split(std::uint64_t page) noexcept {
  if (page % MarkNode::pages == 0) return;
  MarkWord& node_slot = nodes_[page / MarkNode::pages];
  const std::uint64_t of_node = node_slot.load(std::memory_order_acquire) & all_touchers;
  auto* node = below<MarkNode>(node_slot.load(std::memory_order_acquire));
  if (of_node != 0) {
    node = make_below<MarkNode>(node_slot, page, some_nodes_);
    if (node == nullptr) return;
    for (MarkWord& slot : node->leaves)
      set(slot, of_node);
    node_slot.fetch_and(~of_node, std::memory_order_acq_rel);
  }
  if (node == nullptr || page % MarkLeaf::pages == 0) return;
  MarkWord& slot = leaf_slot(*node, page);
  const std::uint64_t of_leaf = slot.load(std::memory_order_acquire) & all_touchers;
  if (of_leaf == 0) return;
  auto* const leaf = make_below<MarkLeaf>(slot, page, some_leaves_);
  if (leaf == nullptr) return;
  for (MarkWord& word : leaf->words)
    set(word, of_leaf * each_page);
  slot.fetch_and(~of_leaf, std::memory_order_acq_rel);
}

template <class Each>
void Marks::for_words(PageRange pages, Each each) {
  const std::uint64_t end = pages.end().value();
  for (std::uint64_t page = pages.first().value(); page < end;) {
    const std::uint64_t node_end = part_end(page, MarkNode::pages, end);
    MarkWord& node_slot = nodes_[page / MarkNode::pages];
    if (node_end - page == MarkNode::pages) each(node_slot, all_touchers);
    auto* const node = below<MarkNode>(node_slot.load(std::memory_order_acquire));
    while (node != nullptr && page < node_end) {
      const std::uint64_t leaf_end = part_end(page, MarkLeaf::pages, node_end);
      MarkWord& slot = leaf_slot(*node, page);
      if (leaf_end - page == MarkLeaf::pages) each(slot, all_touchers);
      auto* const leaf = below<MarkLeaf>(slot.load(std::memory_order_acquire));
      while (leaf != nullptr && page < leaf_end) {
        const std::uint64_t word_end = part_end(page, MarkLeaf::pages_per_word, leaf_end);
        each(word_of(*leaf, page), mask(page, word_end));
        page = word_end;
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
      if (bits != 0) taken_.push_back({&word, bits});
    });
  }
  // With no allocation from here on.
  for (const Bits& taken : taken_)
    taken.word->fetch_and(~taken.bits, std::memory_order_acq_rel);
}

Marks::Taken::~Taken() {
  for (const Bits& taken : taken_)
    taken.word->fetch_or(taken.bits, std::memory_order_acq_rel);
}

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

  /// The pages from `first` to `end`, which are in this word.
  void add_word(std::uint64_t first, std::uint64_t end, std::uint64_t word) {
    word >>= first % MarkLeaf::pages_per_word * bits_per_page;
    while (first < end) {
      const std::uint64_t bits = word & all_touchers;
      const auto same = static_cast<unsigned>(std::countr_zero(word ^ bits * each_page)) / bits_per_page;
      const std::uint64_t next = std::min<std::uint64_t>(end, first + same);
      add(first, next, bits);
      if (next < end) word >>= same * bits_per_page;
      first = next;
    }
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

void Marks::View::for_each(PageRange within, const std::function<void(PageRange, Touchers)>& each) const {
  MarkRuns runs(each);
  const std::uint64_t end = within.end().value();
  for (std::uint64_t page = within.first().value(); page < end;) {
    const std::uint64_t node_end = part_end(page, MarkNode::pages, end);
    const std::uint64_t of_node = marks_.nodes_[page / MarkNode::pages].load(std::memory_order_acquire);
    auto* const node = below<MarkNode>(of_node);
    if (node == nullptr) runs.add(page, node_end, of_node & all_touchers);
    while (node != nullptr && page < node_end) {
      const std::uint64_t leaf_end = part_end(page, MarkLeaf::pages, node_end);
      const std::uint64_t of_leaf = leaf_slot(*node, page).load(std::memory_order_acquire);
      const std::uint64_t of_all = (of_node | of_leaf) & all_touchers;
      auto* const leaf = below<MarkLeaf>(of_leaf);
      if (leaf == nullptr) runs.add(page, leaf_end, of_all);
      while (leaf != nullptr && page < leaf_end) {
        const std::uint64_t word = word_of(*leaf, page).load(std::memory_order_acquire) | of_all * each_page;
        std::uint64_t word_end = part_end(page, MarkLeaf::pages_per_word, leaf_end);
        if (word == 0) {
          while (word_end < leaf_end && word_of(*leaf, word_end).load(std::memory_order_acquire) == 0)
            word_end = part_end(word_end, MarkLeaf::pages_per_word, leaf_end);
          runs.add(page, word_end, 0);
        } else {
          runs.add_word(page, word_end, word);
        }
        page = word_end;
      }
      page = leaf_end;
    }
    page = node_end;
  }
  runs.close();
}

} // namespace cppvmm
