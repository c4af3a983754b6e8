// Memory of one kind that is written, discarded and moved about, and what is certain of its pages. Include it after all
// other headers: moving.hpp imports cppvmm.guest_memory.
#pragma once

#include "page_state.hpp"
#include "support/descriptor.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <string>
#include <vector>

#include "moving.hpp"

namespace cppvmm::oracle {

/// What is done to a block, by its number modulo 8.
enum class Use : std::uint8_t {
  kept,      ///< Has data from the beginning on, and is not written again.
  rewritten, ///< The same, and is written again with the same data.
  churned,   ///< Written and discarded by a thread.
  shared,    ///< The same by another process; of private memory as rewritten.
  moved,     ///< Data comes in and goes out by UFFDIO_MOVE.
  marked,    ///< Untouched, but for markers.
  discarded, ///< Untouched, and discarded.
  empty,     ///< Untouched.
  lost,      ///< As kept, and not even read: a memory error may have taken it.
};

/// A block is a page, or a huge page of the pool.
class Arena {
public:
  [[nodiscard]] static std::expected<std::unique_ptr<Arena>, std::string> make(const MovingHost& host,
                                                                               MovingMemory memory);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  [[nodiscard]] MovingMemory memory() const { return memory_; }
  [[nodiscard]] const Region& region() const { return *region_; }
  [[nodiscard]] std::uint64_t block_bytes() const { return block_bytes_; }
  /// Those that are used; behind them is as much again, or half as much, that is not.
  [[nodiscard]] std::uint32_t blocks() const { return blocks_; }
  [[nodiscard]] Use use(std::uint32_t block) const;
  [[nodiscard]] const std::vector<std::uint32_t>& blocks_of(Use use) const {
    return by_use_[static_cast<unsigned>(use)];
  }
  [[nodiscard]] std::byte* host(std::uint32_t block) const { return start_ + block * block_bytes_; }
  [[nodiscard]] std::uint64_t bytes() const { return blocks_ * block_bytes_; }
  /// The page that has the block's data.
  [[nodiscard]] PageNumber data_page(std::uint32_t block) const;
  [[nodiscard]] PageState& state(std::uint32_t block) const { return shared_->states[block]; }
  [[nodiscard]] std::vector<std::uint32_t> states() const;

  /// Writes the data of the writing that comes next, and says so.
  void write(std::uint32_t block) const;
  /// The same data once more.
  void rewrite(std::uint32_t block) const;
  void read(std::uint32_t block) const;
  /// Says so, and gives the memory back. Whether the kernel did is the result.
  bool discard(std::uint32_t block) const;
  /// Fills what has data from the beginning on.
  void fill() const;
  /// How many blocks do not hold what they should.
  [[nodiscard]] std::uint64_t spoiled() const;
  /// The word that a block holds, by how often it was written and discarded.
  [[nodiscard]] static std::uint64_t word(std::uint32_t block, std::uint32_t state);
  /// Where in the block.
  [[nodiscard]] std::uint64_t word_offset(std::uint32_t block) const;

  /// Shared with the other processes.
  struct Shared {
    std::array<PageState, 1024> states;
    std::array<std::atomic<std::uint64_t>, mover_kinds> turns;
    std::array<std::atomic<std::uint64_t>, mover_kinds> moved;
    std::atomic<std::uint64_t> surveys = 0; ///< That were made.
    std::atomic<bool> stop = false;
  };
  [[nodiscard]] Shared& shared() const { return *shared_; }

private:
  Arena() = default;
  [[nodiscard]] std::uint64_t* at(std::uint32_t block) const;

  MovingMemory memory_{};
  std::uint64_t block_bytes_ = 0;
  std::uint32_t blocks_ = 0;
  std::byte* start_ = nullptr;
  std::unique_ptr<Region> region_;
  void* own_ = nullptr; ///< To unmap.
  std::uint64_t own_bytes_ = 0;
  test::Descriptor file_;
  SharedMapping<Shared> shared_;
  std::array<std::vector<std::uint32_t>, 9> by_use_;
};

} // namespace cppvmm::oracle
