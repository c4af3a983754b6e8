module;
#include <chrono>
#include <memory>
#include <utility>
export module cppvmm.guest_memory:region_use;

namespace cppvmm {

/// Whether a region's memory is in use: by maps that have the region (the current one of a GuestMemory, and every
/// snapshot), surveys and other calls in progress, and copies of the Region. Does not count itself. Safe to use from
/// any thread.
///
/// For memory that was adopted: once it is over, the embedder may unmap it, or use it for something else. Memory of our
/// own is unmapped by then. KVM's slots are the embedder's to remove.
export class RegionUse {
public:
  /// Whether nobody uses it any more; true for good then.
  [[nodiscard]] bool is_over() const;
  /// Waits until it is over: for ever, where the waiting thread holds a snapshot or a copy itself.
  void wait() const;
  /// Whether it was over before the time was.
  [[nodiscard]] bool wait_for(std::chrono::nanoseconds time) const;

private:
  friend class RegionEnd;
  struct State;
  explicit RegionUse(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

/// Part of what a region is: its end is the end of the region's use.
class RegionEnd {
public:
  RegionEnd();
  RegionEnd(const RegionEnd&) = delete;
  RegionEnd& operator=(const RegionEnd&) = delete;
  ~RegionEnd();

  [[nodiscard]] RegionUse use() const { return RegionUse(state_); }

private:
  std::shared_ptr<RegionUse::State> state_;
};

} // namespace cppvmm
