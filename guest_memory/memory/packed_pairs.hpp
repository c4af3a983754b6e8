// Pairs of numbers in little memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace cppvmm {

/// Pairs of numbers, one behind the other, to be read in order and taken off the end. A number is kept with seven bits
/// a byte: a pair takes 2 bytes where both are below 128, 4 below 16,384, and 20 at most. They are in blocks of 4 KiB,
/// the first ones smaller, of which at most 20 bytes stay free: adding one moves none of the others.
class PackedPairs {
public:
  struct Pair {
    std::uint64_t first = 0;
    std::uint64_t second = 0;
  };
  class Reader;

  /// Throws std::bad_alloc, and nothing is changed then.
  void push(Pair pair) {
    Block& block = block_with_room();
    block.put(pair.first);
    block.put(pair.second);
  }
  /// Takes the last one, which there has to be.
  Pair pop() {
    Block& block = blocks_.back();
    Pair pair;
    pair.second = block.take();
    pair.first = block.take();
    if (block.size() == 0) blocks_.pop_back();
    return pair;
  }
  void swap(PackedPairs& other) noexcept { blocks_.swap(other.blocks_); }

private:
  /// Numbers one behind the other: of each, the lowest seven bits first, and a bit that is set where more follow.
  /// Whether a small one takes one byte or two is not branched on: a guest's gaps are hard to foretell.
  class Block {
  public:
    explicit Block(std::size_t room) : bytes_(std::make_unique<std::uint8_t[]>(room)), room_(room) {}
    Block(const Block& other) : Block(other.room_) {
      std::copy_n(other.bytes_.get(), other.used_, bytes_.get());
      used_ = other.used_;
    }
    Block(Block&&) noexcept = default;
    Block& operator=(const Block&) = delete;
    Block& operator=(Block&&) = delete;
    ~Block() = default;

    [[nodiscard]] std::size_t size() const { return used_; }
    [[nodiscard]] std::size_t room() const { return room_ - used_; }

    /// Needs room for most_number_bytes, and for one behind that the next overwrites.
    void put(std::uint64_t number) {
      if (number < std::uint64_t{1} << 14) {
        const unsigned more = number > 0x7F ? 1 : 0;
        bytes_[used_] = static_cast<std::uint8_t>((number & 0x7F) | more << 7);
        bytes_[used_ + 1] = static_cast<std::uint8_t>(number >> 7);
        used_ += 1 + more;
        return;
      }
      for (; number > 0x7F; number >>= 7)
        bytes_[used_++] = static_cast<std::uint8_t>(number | 0x80);
      bytes_[used_++] = static_cast<std::uint8_t>(number);
    }
    /// The number at `at`, which goes behind it. Looks at a byte behind it, too, which there always is.
    [[nodiscard]] std::uint64_t get(std::size_t& at) const {
      const unsigned low = bytes_[at];
      const unsigned high = bytes_[at + 1];
      const unsigned more = low >> 7;
      if ((more & high >> 7) == 0) {
        at += 1 + more;
        return (low & 0x7F) | (high * more) << 7;
      }
      std::uint64_t number = low & 0x7F;
      for (unsigned shift = 7; (bytes_[at++] & 0x80U) != 0; shift += 7)
        number |= static_cast<std::uint64_t>(bytes_[at] & 0x7FU) << shift;
      return number;
    }
    /// Takes the last number out.
    std::uint64_t take() {
      std::uint64_t number = bytes_[--used_];
      for (; used_ > 0 && (bytes_[used_ - 1] & 0x80U) != 0; --used_)
        number = number << 7 | (bytes_[used_ - 1] & 0x7FU);
      return number;
    }

  private:
    std::unique_ptr<std::uint8_t[]> bytes_;
    std::size_t used_ = 0;
    std::size_t room_;
  };
  static constexpr std::size_t most_block_bytes = 4096;
  static constexpr std::size_t least_block_bytes = 64;
  static constexpr std::size_t most_number_bytes = 10;
  static constexpr std::size_t most_pair_bytes = 2 * most_number_bytes + 1; // and the one behind

  /// What takes memory is done here, and nothing is changed by it.
  Block& block_with_room() {
    if (blocks_.empty() || blocks_.back().room() < most_pair_bytes)
      blocks_.emplace_back(std::min(most_block_bytes, least_block_bytes << std::min<std::size_t>(blocks_.size(), 6)));
    return blocks_.back();
  }

  std::vector<Block> blocks_; // none is empty
};

/// Reads them from the first one on. Valid until they are changed or moved.
class PackedPairs::Reader {
public:
  Reader() = default;
  explicit Reader(const PackedPairs& pairs) : blocks_(&pairs.blocks_) {}

  /// The next one, which there has to be.
  Pair next() {
    const Block& block = (*blocks_)[block_];
    Pair pair;
    pair.first = block.get(at_);
    pair.second = block.get(at_);
    if (at_ == block.size()) {
      ++block_;
      at_ = 0;
    }
    return pair;
  }

private:
  const std::vector<Block>* blocks_ = nullptr;
  std::size_t block_ = 0; ///< Where the next one is.
  std::size_t at_ = 0;
};

} // namespace cppvmm
