module;
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>
module cppvmm.guest_memory:marks;
import :address;
import :page_set;
import :published_map;
import :toucher;

namespace cppvmm {

/// What the words of marks are: the marks of some pages; or a pointer to what is below, with bits that count for all
/// pages below beside what is there: a bit for each toucher, or one where all below is of the same toucher.
using MarkWord = std::atomic<std::uint64_t>;

inline constexpr unsigned mark_touchers = 4;

/// 128 MiB of guest-physical pages, for one toucher: a byte for each, 1 or 0. Who marks one page stores its byte, for
/// which a processor need not lock the word.
struct alignas(16) MarkLeaf {
  static constexpr std::uint64_t pages = std::uint64_t{1} << 15;
  static constexpr std::uint64_t pages_per_word = sizeof(MarkWord);
  static constexpr unsigned of_each_part = mark_touchers;
  std::array<MarkWord, pages / pages_per_word> words{};
};

/// 1 TiB of them, with a leaf for each toucher.
struct alignas(16) MarkNode {
  static constexpr std::uint64_t pages = std::uint64_t{1} << 28;
  static constexpr unsigned of_each_part = 1;
  std::array<std::array<MarkWord, mark_touchers>, pages / MarkLeaf::pages> leaves{};
};

/// Pages that were marked by hand, and for whom: by guest page number, whatever the map has there. Who marks takes no
/// lock, and writes no mark of a page that is there already. The parts are made when they are first needed, and stay.
///
/// In memory that follows RAM: where the map has none, few parts are made, and no more than a map needs where RAM comes
/// and goes. Beyond these, and where no memory is to be had, a mark becomes one of the whole part (128 MiB or 1 TiB):
/// none is lost.
///
/// Safe to use from any thread.
class Marks {
public:
  explicit Marks(const PublishedMap& map) : map_(map) {}
  ~Marks();
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;

  inline void mark(PageRange pages, Touchers by) noexcept;
  /// What is marked as a part stays so where there is no memory to tell its pages apart.
  void clear(PageRange pages) noexcept;

  /// To look at the marks: while it lives, none is taken away.
  class View {
  public:
    /// Waits for others; of a survey that is stopped meanwhile, no longer (is_held).
    explicit View(const Marks& marks);
    View(const View&) = delete;
    View& operator=(const View&) = delete;
    ~View();
    /// If not, all else must not be called.
    [[nodiscard]] bool is_held() const { return lock_.owns_lock(); }
    /// Whether there is nothing to look at.
    [[nodiscard]] bool is_blank() const;
    /// 0: all marks that had been made before are seen. Else why not all may be, as errno says.
    [[nodiscard]] int error() const { return error_; }
    /// Runs of pages with the same touchers, ascending.
    void for_each(PageRange within, const std::function<void(PageRange, Touchers)>& each) const;

  private:
    const Marks& marks_;
    std::unique_lock<std::timed_mutex> lock_;
    int error_ = 0;
  };

  /// The marks of some pages, taken out, and put back at the end unless they are forgotten before. Nobody looks at
  /// marks meanwhile. Marks that are made meanwhile stay. Throws std::bad_alloc, with all marks where they were.
  class Taken {
  public:
    Taken(Marks& marks, const PageSet& pages);
    ~Taken();
    Taken(const Taken&) = delete;
    Taken& operator=(const Taken&) = delete;
    void forget() { taken_.clear(); }

  private:
    /// The same of each of some words, one behind the other.
    struct Bits {
      MarkWord* first;
      std::size_t words;
      std::uint64_t bits;
    };
    void add(MarkWord& word, std::uint64_t bits);
    std::lock_guard<std::timed_mutex> lock_;
    std::vector<Bits> taken_;
  };

private:
  /// How many parts of a size there may be.
  struct Allowance {
    explicit Allowance(std::uint64_t count) : most_spare(count) {}
    const std::uint64_t most_spare;       ///< Where the map has no RAM, and where it has none any more.
    std::atomic<std::uint64_t> spare = 0; ///< Made where it had none.
    std::atomic<std::uint64_t> of_ram = 0;
  };
  /// Null where there is none yet.
  [[nodiscard]] inline MarkLeaf* leaf_of(std::uint64_t page, unsigned toucher) const noexcept;
  void mark_all(PageRange pages, std::uint64_t bits) noexcept;
  template <class Below>
  [[nodiscard]] Below* make_below(MarkWord& slot, std::uint64_t page, Allowance& allowance) noexcept;
  void mark_in(MarkNode& node, std::uint64_t first, std::uint64_t end, unsigned toucher) noexcept;
  /// What counts for all pages below goes down to where `page` begins a part. With the lock.
  void split(std::uint64_t page) noexcept;
  /// Calls each(word, bits) for all words that are of these pages, once split at both ends.
  template <class Each>
  void for_words(PageRange pages, Each each);

  const PublishedMap& map_;
  std::array<MarkWord, (guest_space_end >> page_shift) / MarkNode::pages> nodes_{};
  Allowance some_nodes_{8};
  Allowance some_leaves_{128};
  mutable std::timed_mutex taking_; // held by who takes marks away, or looks at them
};

/// What a slot has beside its pointer.
inline constexpr std::uint64_t mark_slot_bits = 0xF;

template <class Below>
Below* below(std::uint64_t slot) {
  return reinterpret_cast<Below*>(slot & ~mark_slot_bits);
}

inline std::array<MarkWord, mark_touchers>& leaf_slots(MarkNode& node, std::uint64_t page) {
  return node.leaves[page % MarkNode::pages / MarkLeaf::pages];
}

inline MarkLeaf* Marks::leaf_of(std::uint64_t page, unsigned toucher) const noexcept {
  auto* const node = below<MarkNode>(nodes_[page / MarkNode::pages].load(std::memory_order_acquire));
  if (node == nullptr) return nullptr;
  return below<MarkLeaf>(leaf_slots(*node, page)[toucher].load(std::memory_order_acquire));
}

inline void Marks::mark(PageRange pages, Touchers by) noexcept {
  const std::uint64_t bits = by.bits();
  if (pages.count() == 1 && std::has_single_bit(bits)) {
    const std::uint64_t page = pages.first().value();
    if (MarkLeaf* const leaf = leaf_of(page, static_cast<unsigned>(std::countr_zero(bits)))) {
      // No std::atomic has the bytes of another: the word is what those have who look at several pages at once.
      auto* const byte = reinterpret_cast<std::uint8_t*>(leaf->words.data()) + page % MarkLeaf::pages;
      if (__atomic_load_n(byte, __ATOMIC_ACQUIRE) != 0) return;
      // Who looks has this thread pass a barrier, where that can be had.
      if (map_.is_asymmetric()) {
        __atomic_store_n(byte, 1, __ATOMIC_RELEASE);
        std::atomic_signal_fence(std::memory_order_seq_cst);
      } else {
        __atomic_exchange_n(byte, 1, __ATOMIC_SEQ_CST);
      }
      return;
    }
  }
  mark_all(pages, bits);
}

} // namespace cppvmm
