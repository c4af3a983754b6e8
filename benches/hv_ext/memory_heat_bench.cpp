#include "support/guests.hpp"
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <sys/mman.h>
#include <vector>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;
using namespace cppvmm::bench;

namespace {

using Clock = std::chrono::steady_clock;

/// A guest that has free blocks between others that it uses, and gives them back; all is touched each time.
class FreeingGuest {
public:
  /// So many blocks of `pages` each, of a region that begins at page 0; the list is behind them.
  FreeingGuest(const Region& region, std::uint64_t blocks, std::uint64_t pages)
      : region_(region), memory_(value_or_throw(MemoryMap::make({region}))),
        hypercalls_(value_or_throw(
            ExtendedHypercalls::create(memory_, {.memory_heat = {.policy = standard_heat_policy(memory_)}}))),
        block_bytes_(pages * page_size), control_(0x8003 | blocks << 32) {
    list_ = GuestAddress(2 * blocks * block_bytes_);
    const bool is_large = pages % 512 == 0;
    for (std::uint64_t block = 0; block < blocks; ++block) {
      starts_.push_back(2 * block * block_bytes_);
      ranges_.push_back(starts_.back() | (is_large ? 1U << 11 | (pages / 512 - 1) : pages - 1));
    }
  }

  [[nodiscard]] Clock::duration give_back() {
    touch();
    const auto begin = Clock::now();
    HvCall call{.control = control_, .input = list_};
    for (;;) {
      const auto progress = hypercalls_.handle_some(call);
      if (!progress || progress->is_done) {
        result_ = progress ? progress->value : ~std::uint64_t{0};
        return Clock::now() - begin;
      }
      call.control = progress->value;
    }
  }
  [[nodiscard]] Clock::duration advise() {
    touch();
    const auto begin = Clock::now();
    const int advice = region_.backing() == Backing::memfd ? MADV_REMOVE : MADV_DONTNEED;
    for (const std::uint64_t start : starts_)
      if (madvise(host(start), block_bytes_, advice) != 0) error_ = errno;
    return Clock::now() - begin;
  }

  /// Whether both did what they were to do.
  [[nodiscard]] bool works(Measurement& measurement) {
    static_cast<void>(advise());
    static_cast<void>(give_back());
    if (error_ != 0) measurement.fail("madvise failed");
    const bool is_taken = result_ == hv_result(HvStatus::success, static_cast<std::uint16_t>(starts_.size()));
    const std::uint64_t pages = starts_.size() * block_bytes_ / page_size;
    const bool is_whole = hypercalls_.heat_counts().done.freed_pages == pages;
    if (!is_taken)
      measurement.fail("the hint was refused");
    else if (!is_whole)
      measurement.fail("not all pages were given back");
    return error_ == 0 && is_taken && is_whole;
  }

private:
  [[nodiscard]] std::byte* host(std::uint64_t offset) const {
    return static_cast<std::byte*>(region_.host_address()) + offset;
  }
  void touch() {
    for (const std::uint64_t start : starts_)
      for (std::uint64_t at = 0; at < 2 * block_bytes_; at += page_size)
        std::memset(host(start + at), 1, 8);
    const std::uint64_t heat = 2;
    std::memcpy(host(list_.value()), &heat, sizeof heat);
    std::memcpy(host(list_.value() + sizeof heat), ranges_.data(), ranges_.size() * sizeof(std::uint64_t));
  }

  Region region_;
  GuestMemory memory_;
  ExtendedHypercalls hypercalls_;
  std::uint64_t block_bytes_;
  std::uint64_t control_;
  GuestAddress list_{0};
  std::vector<std::uint64_t> starts_;
  std::vector<std::uint64_t> ranges_;
  std::uint64_t result_ = 0;
  int error_ = 0;
};

auto discard(Backing backing, std::uint64_t blocks, std::uint64_t pages) {
  return [=](Measurement& measurement) {
    const std::uint64_t count = unless_brief(blocks, 4);
    const auto region = small_pages(measurement, backing, 0, 2 * count * pages * page_size + page_size);
    if (!region) return;
    FreeingGuest guest(*region, count, pages);
    if (!guest.works(measurement)) return;
    measurement.run([&] { return guest.give_back(); }, [&] { return guest.advise(); });
  };
}
// As Linux's free page reporting sends them, and the smallest there are.
const Beside large_anonymous({"heat/anonymous/32_blocks_of_2_MiB", 1.2, "madvise"},
                             discard(Backing::anonymous, 32, 512));
const Beside large_memfd({"heat/memfd/32_blocks_of_2_MiB", 1.2, "madvise"}, discard(Backing::memfd, 32, 512));
const Beside huge_anonymous({"heat/anonymous/8_blocks_of_32_MiB", 1.2, "madvise"},
                            discard(Backing::anonymous, 8, std::uint64_t{16} * 512));
const Beside small_anonymous({"heat/anonymous/511_pages", 1.2, "madvise"}, discard(Backing::anonymous, 511, 1));

} // namespace
