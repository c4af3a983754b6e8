#include "support/descriptor.hpp"
#include "support/kernel_files.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <sched.h>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include "movers.hpp"

namespace cppvmm::oracle {
namespace {

// What the headers of older distributions lack. include/uapi/asm-generic/mman-common.h, include/uapi/linux/mempolicy.h
// and include/uapi/linux/userfaultfd.h (Linux 6.8).
constexpr int madv_pageout = 21;
constexpr int madv_collapse = 25;
constexpr int madv_soft_offline = 101;
constexpr int move_mine = 2;
constexpr int move_all = 4;
constexpr int user_mode_only = 1;
constexpr std::uint64_t wp_of_files = 1 << 12;
constexpr std::uint64_t poison_feature = 1 << 14;
constexpr std::uint64_t move_feature = 1 << 16;
struct PoisonRequest {
  uffdio_range range;
  std::uint64_t mode;
  std::int64_t updated;
};
struct MoveRequest {
  std::uint64_t to, from, bytes, mode;
  std::int64_t moved;
};
constexpr unsigned long poison_request = _IOWR(UFFDIO, 8, PoisonRequest);
constexpr unsigned long move_request = _IOWR(UFFDIO, 5, MoveRequest);

/// Memory that is lost is lost for good: so many turns of those who lose it in an arena's life, and so many blocks in
/// this process's.
constexpr std::uint64_t most_losing_turns = 8;
std::atomic<int> small_pages_to_lose = 4000;
std::atomic<int> huge_pages_to_lose = 4;

bool may_lose(const Arena& arena, std::uint64_t turn) {
  std::atomic<int>& left = is_hugetlb(arena.memory()) ? huge_pages_to_lose : small_pages_to_lose;
  return turn < most_losing_turns && left.load() > 0 && left.fetch_sub(1) > 0;
}

void read_back(const Arena& arena) {
  for (const Use use : {Use::kept, Use::rewritten})
    for (const std::uint32_t block : arena.blocks_of(use))
      arena.read(block);
}

/// Discards blocks and writes them again; then, every other time, lets a survey find them as they are.
std::uint64_t churn(const Arena& arena, Use use, std::uint64_t turn) {
  std::uint64_t done = 0;
  for (const std::uint32_t block : arena.blocks_of(use)) {
    const bool is_discarded = turn > 0 && arena.discard(block);
    arena.write(block);
    if (is_discarded) ++done;
  }
  Arena::Shared& shared = arena.shared();
  const std::uint64_t surveys = shared.surveys.load(std::memory_order_relaxed);
  while (turn % 2 == 1 && !shared.stop.load(std::memory_order_relaxed) &&
         shared.surveys.load(std::memory_order_relaxed) < surveys + 2)
    sched_yield();
  return done;
}

/// A userfaultfd of the embedder's.
class Userfaultfd {
public:
  explicit Userfaultfd(std::uint64_t features)
      : descriptor_(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | user_mode_only))) {
    uffdio_api api{.api = UFFD_API, .features = features, .ioctls = 0};
    works_ = descriptor_.is_open() && ioctl(descriptor_.number(), UFFDIO_API, &api) == 0;
  }
  [[nodiscard]] bool add(std::byte* start, std::uint64_t bytes, std::uint64_t mode) const {
    uffdio_register request{.range = range(start, bytes), .mode = mode, .ioctls = 0};
    return works_ && ioctl(descriptor_.number(), UFFDIO_REGISTER, &request) == 0;
  }
  void remove(std::byte* start, std::uint64_t bytes) const {
    uffdio_range request = range(start, bytes);
    static_cast<void>(ioctl(descriptor_.number(), UFFDIO_UNREGISTER, &request));
  }
  [[nodiscard]] bool protect(std::byte* start, std::uint64_t bytes, bool on) const {
    uffdio_writeprotect request{.range = range(start, bytes), .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0U};
    return ioctl(descriptor_.number(), UFFDIO_WRITEPROTECT, &request) == 0;
  }
  [[nodiscard]] bool poison(std::byte* start, std::uint64_t bytes) const {
    PoisonRequest request{.range = range(start, bytes), .mode = 0, .updated = 0};
    return ioctl(descriptor_.number(), poison_request, &request) == 0;
  }
  [[nodiscard]] bool move(std::byte* to, std::byte* from, std::uint64_t bytes) const {
    MoveRequest request{.to = reinterpret_cast<std::uintptr_t>(to),
                        .from = reinterpret_cast<std::uintptr_t>(from),
                        .bytes = bytes,
                        .mode = 0,
                        .moved = 0};
    return ioctl(descriptor_.number(), move_request, &request) == 0;
  }

private:
  [[nodiscard]] static uffdio_range range(std::byte* start, std::uint64_t bytes) {
    return {.start = reinterpret_cast<std::uintptr_t>(start), .len = bytes};
  }
  test::Descriptor descriptor_;
  bool works_ = false;
};

std::uint64_t move_between_nodes(const Arena& arena, std::uint64_t turn) {
  std::vector<void*> pages;
  for (const Use use : {Use::kept, Use::lost, Use::rewritten, Use::churned, Use::shared})
    for (const std::uint32_t block : arena.blocks_of(use))
      pages.push_back(arena.host(block));
  std::vector<int> nodes(pages.size(), static_cast<int>(turn % 2));
  std::vector<int> status(pages.size(), -1);
  for (const int how : {move_all, move_mine}) {
    if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nodes.data(), status.data(), how) >= 0)
      return static_cast<std::uint64_t>(std::ranges::count(status, nodes[0]));
    if (errno != EPERM) return 0;
  }
  return 0;
}

constexpr const char* memory_blocks = "/sys/devices/system/memory/memory";

/// One block of memory goes and comes back: pages that are used by then have been moved elsewhere.
std::uint64_t take_offline(std::uint64_t turn) {
  constexpr unsigned blocks = 24; // of 128 MiB: 3 GiB
  const std::string state = memory_blocks + std::to_string((turn + 8) % blocks) + "/state";
  const bool went = test::tell_kernel(state, "offline");
  static_cast<void>(test::tell_kernel(state, "online"));
  return went ? 1 : 0;
}

std::uint64_t copy_on_write(const Arena& arena) {
  std::array<int, 2> ends{};
  if (pipe2(ends.data(), O_CLOEXEC) != 0) return 0;
  const test::Descriptor wait(ends[0]);
  std::optional<test::Descriptor> go(ends[1]);
  const pid_t child = fork();
  if (child == 0) {
    // By itself, for where close_range is refused: the end of the pipe is what this child waits for.
    close(ends[1]);
    // All that is open: a userfaultfd that a child has too does not let go of the threads that wait for it.
    const auto end = static_cast<unsigned>(ends[0]);
    static_cast<void>(syscall(SYS_close_range, 0U, end - 1, 0));
    static_cast<void>(syscall(SYS_close_range, end + 1, ~0U, 0));
    char none = 0;
    _exit(::read(ends[0], &none, 1) == 0 ? 0 : 1);
  }
  if (child < 0) return 0;
  for (const std::uint32_t block : arena.blocks_of(Use::rewritten))
    arena.rewrite(block);
  go.reset();
  while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  return arena.blocks_of(Use::rewritten).size();
}

/// The faults that had to wait for a disk, or for swap.
std::uint64_t major_faults() {
  rusage usage{};
  return getrusage(RUSAGE_THREAD, &usage) == 0 ? static_cast<std::uint64_t>(usage.ru_majflt) : 0;
}

std::uint64_t swap(const Arena& arena) {
  const std::uint64_t before = major_faults();
  if (madvise(arena.host(0), arena.bytes(), madv_pageout) != 0) return 0;
  read_back(arena);
  return major_faults() - before;
}

std::uint64_t merge(const Arena& arena, std::uint64_t turn) {
  if (turn == 0) {
    if (madvise(arena.host(0), arena.bytes(), MADV_MERGEABLE) != 0) return 0;
    static_cast<void>(test::tell_kernel("/sys/kernel/mm/ksm/sleep_millisecs", "5"));
    static_cast<void>(test::tell_kernel("/sys/kernel/mm/ksm/run", "1"));
  }
  const long merged = test::kernel_number("/proc/self/ksm_merging_pages");
  if (merged <= 0) return 0;
  for (const std::uint32_t block : arena.blocks_of(Use::rewritten))
    arena.rewrite(block);
  return static_cast<std::uint64_t>(merged);
}

/// How much a counter of the kernel's went up since this thread asked last.
std::uint64_t growth(std::uint64_t now, std::uint64_t turn) {
  static thread_local std::uint64_t last = 0;
  const std::uint64_t before = turn == 0 ? now : last;
  last = now;
  return now - before;
}

std::uint64_t number_in(const std::string& text, const std::string& name) {
  const std::size_t found = text.find(name);
  return found == std::string::npos ? 0 : std::stoull(text.substr(found + name.size()));
}

std::uint64_t watch_khugepaged(std::uint64_t turn) {
  const std::string folder = "/sys/kernel/mm/transparent_hugepage/khugepaged/";
  if (turn == 0) {
    static_cast<void>(test::tell_kernel(folder + "scan_sleep_millisecs", "5"));
    static_cast<void>(test::tell_kernel(folder + "alloc_sleep_millisecs", "5"));
  }
  return growth(static_cast<std::uint64_t>(std::max(0L, test::kernel_number(folder + "pages_collapsed"))), turn);
}

std::uint64_t balance(const Arena& arena, std::uint64_t turn) {
  if (turn == 0) static_cast<void>(test::tell_kernel("/proc/sys/kernel/numa_balancing", "1"));
  read_back(arena);
  return growth(number_in(test::kernel_text("/proc/vmstat"), "\nnuma_hint_faults "), turn);
}

std::uint64_t write_protect(const Arena& arena) {
  const Userfaultfd own(is_anonymous(arena.memory()) ? 0 : wp_of_files);
  if (!own.add(arena.host(0), arena.bytes(), UFFDIO_REGISTER_MODE_WP)) return 0;
  std::uint64_t done = 0;
  // Some, so that the marked ones among them are more or fewer than those with data.
  for (std::uint32_t block = 0; block < arena.blocks(); ++block) {
    const Use use = arena.use(block);
    if ((use == Use::marked || use == Use::rewritten) && own.protect(arena.host(block), arena.block_bytes(), true))
      ++done;
  }
  if (done > 0) static_cast<void>(own.protect(arena.host(0), arena.bytes(), false));
  own.remove(arena.host(0), arena.bytes());
  return done;
}

std::uint64_t poison_untouched(const Arena& arena) {
  std::uint64_t done = 0;
  for (const std::uint32_t block : arena.blocks_of(Use::marked)) {
    const Userfaultfd own(poison_feature);
    if (!own.add(arena.host(block), arena.block_bytes(), UFFDIO_REGISTER_MODE_MISSING)) continue;
    if (own.poison(arena.host(block), arena.block_bytes())) ++done;
    own.remove(arena.host(block), arena.block_bytes());
    if (done == 8) break;
  }
  for (const std::uint32_t block : arena.blocks_of(Use::marked))
    static_cast<void>(madvise(arena.host(block), arena.block_bytes(), MADV_DONTNEED));
  return done;
}

/// From a page elsewhere into the memory, and the memory is discarded.
std::uint64_t move_by_userfaultfd(const Arena& arena) {
  void* const elsewhere = mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (elsewhere == MAP_FAILED) return 0;
  auto* const from = static_cast<std::byte*>(elsewhere);
  std::uint64_t done = 0;
  const Userfaultfd own(move_feature);
  if (own.add(arena.host(0), arena.bytes(), UFFDIO_REGISTER_MODE_WP) &&
      own.add(from, page_size, UFFDIO_REGISTER_MODE_WP)) {
    for (const std::uint32_t block : arena.blocks_of(Use::moved)) {
      const std::uint32_t now = arena.state(block).now();
      if (holds_data(now) && !arena.discard(block)) break;
      const std::uint64_t word = Arena::word(block, arena.state(block).now() + 1);
      std::atomic_ref(*reinterpret_cast<std::uint64_t*>(from + arena.word_offset(block)))
          .store(word, std::memory_order_relaxed);
      if (own.move(arena.host(block), from, page_size)) {
        arena.state(block).publish_written();
        ++done;
      }
      // What was not moved must not be found in the next one.
      static_cast<void>(madvise(from, page_size, MADV_DONTNEED));
    }
    own.remove(arena.host(0), arena.bytes());
  }
  munmap(elsewhere, page_size);
  return done;
}

std::uint64_t discard_untouched(const Arena& arena, std::uint64_t turn) {
  std::uint64_t done = 0;
  const int advice = is_private(arena.memory()) || turn % 2 == 0 ? MADV_DONTNEED : MADV_REMOVE;
  for (const std::uint32_t block : arena.blocks_of(Use::discarded))
    if (madvise(arena.host(block), arena.block_bytes(), advice) == 0) ++done;
  return done;
}

std::uint64_t drop_entries(const Arena& arena) {
  std::uint64_t done = 0;
  // Of a private file, only what was never copied comes back.
  for (const Use use : {Use::kept, Use::rewritten, Use::shared}) {
    if (is_private(arena.memory()) && use != Use::kept) break;
    for (const std::uint32_t block : arena.blocks_of(use))
      if (madvise(arena.host(block), arena.block_bytes(), MADV_DONTNEED) == 0) ++done;
  }
  read_back(arena);
  return done;
}

std::uint64_t soft_offline(const Arena& arena, std::uint64_t turn) {
  if (!may_lose(arena, turn)) return 0;
  const std::vector<std::uint32_t>& blocks = arena.blocks_of(Use::rewritten);
  const std::uint32_t block = blocks[turn % blocks.size()];
  arena.read(block);
  return madvise(arena.host(block), page_size, madv_soft_offline) == 0 ? 1 : 0;
}

/// The kernel tells whoever has the page mapped, this thread by the signal that an access will be met with.
thread_local volatile bool is_losing = false;

std::uint64_t lose(const Arena& arena, std::uint64_t turn) {
  const std::vector<std::uint32_t>& blocks = arena.blocks_of(Use::lost);
  if (turn >= blocks.size() || !may_lose(arena, turn)) return 0;
  is_losing = true;
  const bool is_lost = madvise(arena.host(blocks[turn]), page_size, MADV_HWPOISON) == 0;
  is_losing = false;
  return is_lost ? 1 : 0;
}

} // namespace

bool is_losing_memory() { return is_losing; }

bool is_process(Mover mover) {
  return mover == Mover::other_process || mover == Mover::compaction || mover == Mover::offlining;
}

std::uint64_t take_turn(Mover mover, const Arena& arena, std::uint64_t turn) {
  switch (mover) {
  case Mover::churn:
    return churn(arena, Use::churned, turn);
  case Mover::other_process:
    return churn(arena, Use::shared, turn);
  case Mover::nodes:
    return move_between_nodes(arena, turn);
  case Mover::compaction:
    return test::tell_kernel("/proc/sys/vm/compact_memory", "1") ? 1 : 0;
  case Mover::offlining:
    return take_offline(turn);
  case Mover::soft_offlining:
    return soft_offline(arena, turn);
  case Mover::memory_errors:
    return lose(arena, turn);
  case Mover::copy_on_write:
    return copy_on_write(arena);
  case Mover::collapse:
    return madvise(arena.host(0), arena.bytes(), madv_collapse) == 0 ? arena.bytes() / page_size : 0;
  case Mover::khugepaged:
    return watch_khugepaged(turn);
  case Mover::swap:
    return swap(arena);
  case Mover::ksm:
    return merge(arena, turn);
  case Mover::numa_balancing:
    return balance(arena, turn);
  case Mover::write_protection:
    return write_protect(arena);
  case Mover::poison_markers:
    return poison_untouched(arena);
  case Mover::uffd_move:
    return move_by_userfaultfd(arena);
  case Mover::discards:
    return discard_untouched(arena, turn);
  case Mover::dropped_entries:
    return drop_entries(arena);
  }
  return 0;
}

void restore_after(Mover mover) {
  if (mover == Mover::ksm) static_cast<void>(test::tell_kernel("/sys/kernel/mm/ksm/run", "0"));
  if (mover == Mover::numa_balancing) static_cast<void>(test::tell_kernel("/proc/sys/kernel/numa_balancing", "0"));
  if (mover != Mover::offlining) return;
  for (unsigned block = 0;; ++block) {
    const std::string state = memory_blocks + std::to_string(block) + "/state";
    const std::string text = test::kernel_text(state);
    if (text.empty()) return;
    if (text.starts_with("offline")) static_cast<void>(test::tell_kernel(state, "online"));
  }
}

} // namespace cppvmm::oracle
