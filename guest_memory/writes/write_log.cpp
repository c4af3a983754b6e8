module;
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:write_log.impl;
import :address;
import :error;
import :region;
import :write_record;
import :write_watch;

namespace cppvmm {

/// The runs of set bits among the first `pages`; `word` gives the bits of 64 pages.
template <class Word>
static ExtentList set_bits(std::uint64_t pages, Word word) {
  ExtentList result;
  for (std::uint64_t first = 0; first < pages; first += 64) {
    std::uint64_t bits = word(static_cast<std::size_t>(first / 64));
    if (pages - first < 64) bits &= (std::uint64_t{1} << (pages - first)) - 1;
    for (std::uint64_t at = first; bits != 0;) {
      const auto skip = static_cast<unsigned>(std::countr_zero(bits));
      const auto run = static_cast<unsigned>(std::countr_one(bits >> skip));
      result.add({at + skip, run});
      at += skip + run;
      bits = skip + run < 64 ? bits >> (skip + run) : 0;
    }
  }
  return result;
}

MemoryResult<std::unique_ptr<WriteRecord>> WriteRecord::begin(const Region& region) {
  std::unique_ptr<WriteRecord> record(new WriteRecord(region));
  record->logged_.resize((region.pages().count() + 63) / 64);
  if (auto started = region.start_recording(); !started) return std::unexpected(started.error());
  record->is_recording_ = true;
  return record;
}

WriteRecord::~WriteRecord() {
  if (is_recording_) region_.stop_recording();
}

MemoryResult<void> WriteRecord::collect(const WriteLog& log) {
  if (broken_) return std::unexpected(*broken_);
  // What a call that fails has taken out of the log may be lost; and so it may where one throws.
  broken_ =
      MemoryError{.code = MemoryErrc::unavailable, .operation = "a log of writes, whose collection was not completed"};
  if (auto collected = log.collect(region_.pages(), logged_); !collected) {
    broken_ = collected.error();
    return std::unexpected(*broken_);
  }
  broken_.reset();
  return {};
}

ExtentList WriteRecord::logged() const {
  return set_bits(region_.pages().count(), [&](std::size_t word) { return logged_[word]; });
}

ExtentList WriteRecord::recorded() const {
  const auto bits = region_.recorded_writes();
  return set_bits(region_.pages().count(),
                  [&](std::size_t word) { return bits[word].load(std::memory_order_seq_cst); });
}

} // namespace cppvmm
