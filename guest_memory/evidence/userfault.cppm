module;
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>
module cppvmm.guest_memory:userfault;
import :descriptor;
import :error;

namespace cppvmm {

// include/uapi/linux/userfaultfd.h (Linux 5.19 and 6.7), which the headers of older distributions lack. A kernel
// without a feature refuses the handshake.
inline constexpr std::uint64_t userfault_wp_hugetlbfs_shmem = 1 << 12;
inline constexpr std::uint64_t userfault_wp_async = 1 << 15;

/// Memory has one userfaultfd at a time, and a survey of huge pages takes it for a moment: whoever registers any holds
/// this meanwhile.
[[nodiscard]] std::unique_lock<std::mutex> userfault_turn();

/// What memory is registered for.
enum class UserfaultUse : std::uint8_t {
  asynchronous,  ///< PAGEMAP_SCAN accepts it for write protection (Linux 6.7).
  held_discards, ///< MADV_DONTNEED waits, before it frees anything, until the memory is registered no more.
  lookups,       ///< No more than that the memory is registered.
};

/// Memory that is registered for write protection for as long as the object lives. None is protected; but when it ends,
/// the kernel sets the entries of private memory anew, read-only, so that the next store to each huge page faults once.
/// One at a time in a process.
class Userfault {
public:
  /// Waits for its turn.
  [[nodiscard]] static MemoryResult<Userfault> open(UserfaultUse use);
  Userfault(Userfault&& other) noexcept
      : turn_(std::move(other.turn_)), ranges_(std::move(other.ranges_)), descriptor_(std::move(other.descriptor_)),
        use_(other.use_), memory_(other.memory_) {}
  Userfault& operator=(Userfault&&) = delete;
  ~Userfault();

  /// Registers all huge pages that the bytes are of: 0, or errno, EBUSY where another userfaultfd has some of them.
  [[nodiscard]] int add(std::uint64_t start, std::uint64_t bytes);
  /// Of private memory that was added as one mapping: whether it has been registered all the time. What was unmapped or
  /// moved since, and what took its place, is not.
  [[nodiscard]] bool holds(std::uint64_t start, std::uint64_t bytes) const;
  /// UFFDIO_CONTINUE: maps what the page cache of the mapping's file has there: 0, or errno. EFAULT where there is no
  /// page, and ENOENT where the bytes are not all of one mapping that is registered with some userfaultfd.
  [[nodiscard]] int map_cached(std::uint64_t start, std::uint64_t bytes) const;

private:
  Userfault(std::unique_lock<std::mutex> turn, Descriptor descriptor, UserfaultUse use);
  [[nodiscard]] int enroll(std::uint64_t start, std::uint64_t bytes);
  void let_discards_go() const;

  struct Range {
    std::uint64_t start;
    std::uint64_t bytes;
  };
  std::unique_lock<std::mutex> turn_;
  std::vector<Range> ranges_;
  Descriptor descriptor_;
  UserfaultUse use_;
  std::uint64_t memory_; // which it is of
};

} // namespace cppvmm
