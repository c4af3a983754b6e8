module;
#include <array>
#include <atomic>
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

/// What the words of marks are: of a page, 4 bits (Touchers); or a pointer to what is below, with 4 bits that count for
/// all pages below beside what is there.
using MarkWord = std::atomic<std::uint64_t>;

/// 128 MiB of guest-physical pages.
struct alignas(16) MarkLeaf {
  static constexpr std::uint64_t pages = std::uint64_t{1} << 15;
  static constexpr std::uint64_t pages_per_word = 16;
  std::array<MarkWord, pages / pages_per_word> words{};
};

/// 1 TiB of them.
struct alignas(16) MarkNode {
  static constexpr std::uint64_t pages = std::uint64_t{1} << 28;
  std::array<MarkWord, pages / MarkLeaf::pages> leaves{};
};

/// Pages that were marked by hand, and for whom: by guest page number, whatever the map has there. Who marks takes no
/// lock: it sets bits of a bitmap, of which the parts are made when they are first needed, and stay.
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

  void mark(PageRange pages, Touchers by) noexcept;
  /// What is marked as a part stays so where there is no memory to tell its pages apart.
  void clear(PageRange pages) noexcept;

  /// To look at the marks: while it lives, none is taken away.
  class View {
  public:
    explicit View(const Marks& marks) : marks_(marks), lock_(marks.taking_) {}
    /// Whether there is nothing to look at.
    [[nodiscard]] bool is_blank() const;
    /// Runs of pages with the same touchers, ascending.
    void for_each(PageRange within, const std::function<void(PageRange, Touchers)>& each) const;

  private:
    const Marks& marks_;
    std::lock_guard<std::mutex> lock_;
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
    struct Bits {
      MarkWord* word;
      std::uint64_t bits;
    };
    std::lock_guard<std::mutex> lock_;
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
  template <class Below>
  [[nodiscard]] Below* make_below(MarkWord& slot, std::uint64_t page, Allowance& allowance) noexcept;
  void mark_in(MarkNode& node, std::uint64_t first, std::uint64_t end, std::uint64_t bits) noexcept;
  /// What counts for all pages below goes down to where `page` begins a part. With the lock.
  void split(std::uint64_t page) noexcept;
  /// Calls each(word, bits) for all words that are of these pages, once split at both ends.
  template <class Each>
  void for_words(PageRange pages, Each each);

  const PublishedMap& map_;
  std::array<MarkWord, (guest_space_end >> page_shift) / MarkNode::pages> nodes_{};
  Allowance some_nodes_{32};
  Allowance some_leaves_{128};
  mutable std::mutex taking_; // held by who takes marks away, or looks at them
};

} // namespace cppvmm
