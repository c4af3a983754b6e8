#include "support/guests.hpp"
#include "tests/support/swap.hpp"
#include <chrono>
#include <cstdint>
#include <string>
#include <sys/mman.h>
#include <utility>
import cppvmm.guest_memory;

using namespace cppvmm;
using namespace cppvmm::bench;

// What standard_heat_policy makes of cold and hot, beside the other thing that it could: the time that the vCPU waits.

namespace {

using Clock = std::chrono::steady_clock;

/// Memory that the guest names, small pages of it.
class NamedMemory {
public:
  explicit NamedMemory(Region region) : region_(std::move(region)) {}

  void touch_all() const {
    for (std::uint64_t page = 0; page < region_.pages().count(); ++page)
      touch(region_, page);
  }
  [[nodiscard]] bool advise(PageUse use) const { return region_.advise(region_.pages(), use).has_value(); }
  /// Whether none of it is in memory.
  [[nodiscard]] bool is_swapped() const {
    for (const bool swapped : test::swapped_pages(region_.host_address(), region_.bytes()))
      if (!swapped) return false;
    return true;
  }
  [[nodiscard]] bool clear() const { return madvise(region_.host_address(), region_.bytes(), MADV_DONTNEED) == 0; }

private:
  Region region_;
};

enum class State : std::uint8_t { present, untouched, swapped };

/// `chosen` beside `other`, each upon memory in that state; with the guest's use of all of it, if asked for.
auto beside(State state, PageUse chosen, PageUse other, bool with_use = false) {
  return [=](Measurement& measurement) {
    const auto region = small_pages(measurement, Backing::anonymous, 0, unless_brief(64 * mib, mib));
    if (!region) return;
    const auto swap = test::SwapSpace::take();
    if (!swap) return measurement.skip(swap.error());
    const NamedMemory memory(*region);
    bool is_right = true;
    const auto time = [&](PageUse use) {
      is_right = is_right && memory.clear();
      if (state != State::untouched) memory.touch_all();
      // The kernel may leave some of it, and take it another time.
      for (int tries = 0; state == State::swapped && tries < 100 && !memory.is_swapped(); ++tries)
        is_right = is_right && memory.advise(PageUse::page_out);
      is_right = is_right && (state != State::swapped || memory.is_swapped());
      const auto begin = Clock::now();
      is_right = is_right && memory.advise(use);
      if (with_use) memory.touch_all();
      return Clock::now() - begin;
    };
    measurement.run([&] { return time(chosen); }, [&] { return time(other); });
    if (!is_right) measurement.skip("the kernel took no advice, or left pages in memory");
  };
}

// 64 MiB each.
const Beside cold({"heat/advice/cold_in_memory", 1, "MADV_PAGEOUT"},
                  beside(State::present, PageUse::cold, PageUse::page_out));
const Beside hot_present({"heat/advice/hot_in_memory", 1, "MADV_POPULATE_WRITE"},
                         beside(State::present, PageUse::will_need, PageUse::populate));
const Beside hot_untouched({"heat/advice/hot_never_touched", 1, "MADV_POPULATE_WRITE"},
                           beside(State::untouched, PageUse::will_need, PageUse::populate));
const Beside hot_swapped({"heat/advice/hot_in_swap", 1, "MADV_POPULATE_WRITE"},
                         beside(State::swapped, PageUse::will_need, PageUse::populate));
const Beside hot_swapped_used({"heat/advice/hot_in_swap_and_used", 1, "MADV_POPULATE_WRITE"},
                              beside(State::swapped, PageUse::will_need, PageUse::populate, true));

} // namespace
