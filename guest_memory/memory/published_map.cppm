module;
#include <atomic>
#include <expected>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>
module cppvmm.guest_memory:published_map;
import :error;
import :memory_map;

namespace cppvmm {

struct ReadSlot;

/// A memory map that is read without a lock or a counter that others write, and replaced whole. Who reads says in the
/// slot of its own thread which map that is; who replaces one keeps it until no slot names it, and leaves what is named
/// still to the reader, who notices at its end that a map it named is no longer the current one. (Hazard pointers: M.
/// M. Michael, IEEE Transactions on Parallel and Distributed Systems 15(6), 2004.)
///
/// Safe to use from any thread.
class PublishedMap {
public:
  explicit PublishedMap(MemoryMap map);
  PublishedMap(const PublishedMap&) = delete;
  PublishedMap& operator=(const PublishedMap&) = delete;
  ~PublishedMap() = default;

  /// The current map, which stays while a Reader lives: in the thread that made it, and no longer than its
  /// PublishedMap.
  class Reader {
  public:
    explicit Reader(const PublishedMap& published);
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;
    ~Reader();
    const MemoryMap& operator*() const { return *map_; }
    const MemoryMap* operator->() const { return map_; }

  private:
    const PublishedMap& published_;
    ReadSlot* slot_;
    const MemoryMap* map_ = nullptr;
    bool named_another_ = false;
    std::shared_ptr<const MemoryMap> kept_; // without a slot
  };

  /// Whether all threads can be had to pass a barrier by those who need one, so that others need none.
  [[nodiscard]] constexpr bool is_asymmetric() const { return is_asymmetric_; }
  /// Has them do so: what each of them stored before is seen from then on, and what it loads after is as new. 0, or why
  /// the kernel refuses, as errno says.
  [[nodiscard]] static int pass_barriers();

  [[nodiscard]] std::shared_ptr<const MemoryMap> snapshot() const;

  void replace(MemoryMap map);
  /// Publishes what `next` makes of the current map, and returns the one before; or what `next` refuses with. Changes
  /// do not lose each other.
  template <class Next>
  [[nodiscard]] MemoryResult<std::shared_ptr<const MemoryMap>> change(Next next) {
    Maps unread; // the regions of these are unmapped after the lock
    const std::lock_guard lock(mutex_);
    MemoryResult<MemoryMap> map = next(*owner_);
    if (!map) return std::unexpected(map.error());
    return publish(std::make_shared<const MemoryMap>(std::move(*map)), unread);
  }

private:
  using Maps = std::vector<std::shared_ptr<const MemoryMap>>;
  struct Retired {
    std::shared_ptr<const MemoryMap> map;
    bool is_announced = false; ///< All threads have passed a barrier since: who reads it still has named it.
  };

  /// With the lock.
  [[nodiscard]] std::shared_ptr<const MemoryMap> publish(std::shared_ptr<const MemoryMap> next, Maps& unread);
  /// Takes those out of the retired ones that nobody reads.
  void take_unread(Maps& unread) const;
  /// For a reader whose map was replaced meanwhile.
  void let_go() const noexcept;

  mutable std::mutex mutex_; // of the owner and the retired ones
  std::shared_ptr<const MemoryMap> owner_;
  mutable std::vector<Retired> retired_;
  std::atomic<const MemoryMap*> current_;
  /// Whether who replaces a map can have all threads pass a barrier, so that readers need none.
  const bool is_asymmetric_;
};

} // namespace cppvmm
