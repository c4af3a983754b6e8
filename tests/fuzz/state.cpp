// What a guest sets up of its Hyper-V interface, by MSRs and by saved states of any content; the pages that are laid
// over its own, and what these held before. The target knows by itself what each register and each page has to hold.
#include "input.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "guest.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_calls;

namespace cppvmm::fuzz {
namespace {

constexpr std::uint64_t ram_pages = 16;
constexpr int most_steps = 64;
constexpr std::array code = {std::byte{0x0F}, std::byte{0x01}, std::byte{0xC1}, std::byte{0xC3}};
constexpr std::uint64_t ten_mhz = 10'000'000;

/// A page that lies over one of the guest's.
struct Overlay {
  Page content{};
  std::optional<PageNumber> page;
  std::optional<Page> covered;
};

constexpr GuestAddress start_of(PageNumber page) { return GuestAddress(page.value() << page_shift); }

class Session {
public:
  explicit Session(Input input) : input_(input), hyperv_(guest_.memory(), code) {
    hypercall_page_.content.fill(std::byte{0xCC});
    std::ranges::copy(code, hypercall_page_.content.begin());
  }

  void run(bool looks_at_all) {
    read_bytes();
    for (int step = 0; step < most_steps && !input_.is_at_end(); ++step) {
      do_something();
      check_registers();
    }
    guest_.check(looks_at_all);
  }

private:
  void read_bytes();
  void do_something();
  void write_msr();
  void read_msr();
  void set_time();
  void restore(const HvState& state);
  void restore_something();
  void check_registers();
  [[nodiscard]] bool write_hypercall(std::uint64_t value);
  [[nodiscard]] bool write_reference_tsc(std::uint64_t value);
  /// What a page that is laid by `restore` held before, or holds as it was laid.
  void restored_or_not(PageNumber page, const Page& content);
  [[nodiscard]] bool lay(Overlay& overlay, PageNumber page);
  void lift(Overlay& overlay);
  void set_up_nothing();
  void set_scale(HvTscScale scale);
  [[nodiscard]] HvState any_state();

  Input input_;
  Guest guest_{ram_pages};
  HypervInterface hyperv_;
  std::uint64_t guest_os_id_ = 0;
  std::uint64_t hypercall_ = 0;
  std::uint64_t reference_tsc_ = 0;
  Overlay hypercall_page_;
  Overlay reference_tsc_page_;
  std::optional<HvTimeSource> source_;
  HvTscScale scale_;
  std::uint32_t sequence_ = 0;
  std::uint64_t last_time_ = 0;
};

/// Bytes are refused, or are what the state that they are is saved as.
void check_bytes(std::span<const std::byte> bytes) {
  const auto state = hv_state_from_bytes(bytes);
  if (!state) return;
  require(check_hv_state(*state).has_value(), "a state that is read is a possible one");
  require(std::ranges::equal(to_bytes(*state), bytes), "a state is saved as the bytes that it was read of");
}

void Session::read_bytes() {
  const std::uint8_t how = input_.byte();
  if (how < 0x80) return;
  if (how < 0xC0) return check_bytes(input_.bytes(8300));
  auto bytes = to_bytes(any_state());
  for (int i = 0; i < how % 4; ++i)
    bytes[input_.below(bytes.size())] = std::byte{input_.byte()};
  // Behind the signature are numbers, in the low bytes of which small ones are.
  if ((how & 0x10) != 0) bytes[8 + 4 * input_.below(14)] = std::byte{input_.byte()};
  if ((how & 0x20) != 0) bytes.resize(input_.below(8300));
  check_bytes(bytes);
}

bool Session::lay(Overlay& overlay, PageNumber page) {
  if (!guest_.can_write(page)) return false;
  if (overlay.page != page) {
    const Page covered = guest_.expected(page);
    guest_.note_write(start_of(page), overlay.content);
    lift(overlay);
    overlay.covered = covered;
    overlay.page = page;
  } else {
    guest_.note_write(start_of(page), overlay.content);
  }
  return true;
}

void Session::lift(Overlay& overlay) {
  if (overlay.page && overlay.covered && guest_.can_write(*overlay.page) &&
      is_equal(guest_.expected(*overlay.page).data(), overlay.content))
    guest_.note_write(start_of(*overlay.page), *overlay.covered);
  overlay.page.reset();
  overlay.covered.reset();
}

void Session::set_scale(HvTscScale scale) {
  const std::uint32_t sequence = hyperv_.state().reference_tsc_sequence;
  require(sequence != 0 && sequence != sequence_, "another scale or offset has another sequence, which is not 0");
  sequence_ = sequence;
  scale_ = scale;
  reference_tsc_page_.content = hv_reference_tsc_page(sequence_, scale_);
}

void Session::set_up_nothing() {
  guest_os_id_ = hypercall_ = reference_tsc_ = last_time_ = 0;
  for (Overlay* overlay : {&hypercall_page_, &reference_tsc_page_}) {
    overlay->page.reset();
    overlay->covered.reset();
  }
}

bool Session::write_hypercall(std::uint64_t value) {
  if ((hypercall_ & 2) != 0) return false;
  if (guest_os_id_ == 0) return true;
  if ((value & 1) == 0)
    lift(hypercall_page_);
  else if (GuestAddress(value).page() == reference_tsc_page_.page || !lay(hypercall_page_, GuestAddress(value).page()))
    return false;
  hypercall_ = value;
  return true;
}

bool Session::write_reference_tsc(std::uint64_t value) {
  if (!source_) return false;
  if ((value & 1) == 0)
    lift(reference_tsc_page_);
  else if (GuestAddress(value).page() == hypercall_page_.page || !lay(reference_tsc_page_, GuestAddress(value).page()))
    return false;
  reference_tsc_ = value;
  return true;
}

void Session::write_msr() {
  const std::uint8_t how = input_.byte();
  if (how % 4 == 0) {
    const std::uint64_t id = (how & 0x10) != 0 ? input_.byte() : 0x8100'0000'0000'0001;
    require(hyperv_.write_msr(hv_msr_guest_os_id, id), "any OS ID can be written");
    guest_os_id_ = id;
    if (id != 0) return;
    hypercall_ &= ~std::uint64_t{1};
    lift(hypercall_page_);
  } else if (how % 4 == 3) {
    const std::uint32_t msr = input_.take<std::uint32_t>();
    if (msr == hv_msr_guest_os_id || msr == hv_msr_hypercall || msr == hv_msr_reference_tsc) return;
    require(!hyperv_.write_msr(msr, input_.take<std::uint64_t>()), "no other MSR can be written");
  } else {
    const std::uint64_t address = guest_.any_address(input_);
    const std::uint64_t value =
        (how & 0x80) != 0 ? address : (address & ~std::uint64_t{0xFFF}) | ((how & 0x70) != 0 ? 1 : 0);
    const bool is_hypercall = how % 4 == 1;
    const bool is_done = hyperv_.write_msr(is_hypercall ? hv_msr_hypercall : hv_msr_reference_tsc, value);
    require(is_done == (is_hypercall ? write_hypercall(value) : write_reference_tsc(value)),
            "a page is enabled where it can be, and nowhere else");
  }
}

void Session::read_msr() {
  const std::uint64_t tsc = input_.take<std::uint64_t>();
  const std::uint32_t msr = input_.flag() ? hv_msr_time_ref_count : input_.take<std::uint32_t>();
  const auto found = hyperv_.read_msr(7, msr, tsc);
  if (msr != hv_msr_time_ref_count) return;
  require(found.has_value() == source_.has_value(), "there is time where it was given");
  if (!found) return;
  const std::uint64_t now = scale_.time_at(tsc);
  require(static_cast<std::int64_t>(*found - last_time_) > 0, "time goes on");
  require(*found == now || static_cast<std::int64_t>(now - last_time_) <= 0, "time is that of the TSC");
  last_time_ = *found;
}

void Session::set_time() {
  const HvTimeSource source{.tsc_hz = input_.flag() ? 2'500'000'000 : ten_mhz + input_.byte(),
                            .apic_hz = input_.flag() ? 1'000'000'000U : 0U};
  const bool is_right = source.tsc_hz > ten_mhz && (!source_ || source_ == source);
  require(hyperv_.set_time(source).has_value() == is_right, "time is by one TSC, faster than 10 MHz");
  if (!is_right || source_) return;
  source_ = source;
  set_scale(*HvTscScale::of(source.tsc_hz));
}

HvState Session::any_state() {
  const std::uint8_t how = input_.byte();
  const auto page = [&] {
    Page covered;
    covered.fill(std::byte{input_.byte()});
    return covered;
  };
  HvState state{.guest_os_id = input_.byte(), .hypercall = guest_.any_address(input_) | input_.byte() % 4};
  if ((how & 1) != 0) state.hypercall_page_covers = page();
  if ((how & 2) == 0) return state;
  state.reference_tsc = guest_.any_address(input_) | input_.byte() % 2;
  if ((how & 4) != 0) state.reference_tsc_page_covers = page();
  state.reference_tsc_sequence = (how & 8) != 0 ? input_.take<std::uint32_t>() : 0xFFFF'FFFF;
  state.tsc = input_.take<std::uint64_t>();
  state.reference_time = input_.take<std::uint64_t>();
  return state;
}

bool is_possible(const HvState& state) {
  const bool has_page = (state.hypercall & 1) != 0;
  const bool has_time_page = (state.reference_tsc & 1) != 0;
  return (!has_page || state.guest_os_id != 0) && (has_page || !state.hypercall_page_covers) &&
         (has_time_page || !state.reference_tsc_page_covers) &&
         (state.reference_tsc == 0 || state.reference_tsc_sequence != 0) &&
         (!has_page || !has_time_page || state.hypercall >> 12 != state.reference_tsc >> 12) &&
         state.reference_time < std::uint64_t{1} << 63;
}

void Session::restored_or_not(PageNumber page, const Page& content) {
  if (guest_.can_read(page) && is_equal(guest_.content(page).data(), content))
    guest_.note_write(start_of(page), content);
}

void Session::restore(const HvState& state) {
  const bool is_right = is_possible(state);
  require(check_hv_state(state).has_value() == is_right, "a state is checked for what no guest can have set up");
  const auto read = hv_state_from_bytes(to_bytes(state));
  require(read.has_value() == is_right && (!read || *read == state), "a state comes back as it was saved");

  const bool has_page = (state.hypercall & 1) != 0;
  const bool has_time = state.reference_tsc_sequence != 0;
  const bool has_time_page = has_time && (state.reference_tsc & 1) != 0;
  const PageNumber page = GuestAddress(state.hypercall).page();
  const PageNumber time_page = GuestAddress(state.reference_tsc).page();
  const bool can_be = is_right && (!has_page || guest_.can_write(page)) && (!has_time || source_) &&
                      (!has_time_page || guest_.can_write(time_page));
  const auto done = hyperv_.restore(state);
  require(done.has_value() == can_be, "a state is restored where it can be");
  set_up_nothing();
  if (source_) {
    // The one that the guest knows is the one that was saved.
    sequence_ = !can_be ? 0 : has_time ? state.reference_tsc_sequence : sequence_;
    set_scale(can_be && has_time ? scale_.through(state.tsc, state.reference_time) : HvTscScale{.scale = scale_.scale});
  }
  if (!can_be) {
    if (is_right && has_page) restored_or_not(page, hypercall_page_.content);
    return;
  }
  guest_os_id_ = state.guest_os_id;
  hypercall_ = state.hypercall;
  if (has_page) {
    guest_.note_write(start_of(page), hypercall_page_.content);
    hypercall_page_.page = page;
    hypercall_page_.covered = state.hypercall_page_covers;
  }
  if (!has_time) return;
  reference_tsc_ = state.reference_tsc;
  last_time_ = state.reference_time;
  if (!has_time_page) return;
  guest_.note_write(start_of(time_page), reference_tsc_page_.content);
  reference_tsc_page_.page = time_page;
  reference_tsc_page_.covered = state.reference_tsc_page_covers;
}

void Session::restore_something() {
  if (input_.flag()) return restore(any_state());
  const HvState saved = hyperv_.state(input_.take<std::uint64_t>());
  require(is_possible(saved), "what is saved can be restored");
  require(saved.guest_os_id == guest_os_id_ && saved.hypercall == hypercall_ &&
              saved.hypercall_page_covers == hypercall_page_.covered && saved.reference_tsc == reference_tsc_ &&
              saved.reference_tsc_page_covers == reference_tsc_page_.covered,
          "what is saved is what was set up");
  restore(saved);
}

void Session::check_registers() {
  require(hyperv_.read_msr(7, hv_msr_guest_os_id) == guest_os_id_, "GUEST_OS_ID is what was written");
  require(hyperv_.read_msr(7, hv_msr_hypercall) == hypercall_, "HYPERCALL is what was written");
  require(hyperv_.read_msr(7, hv_msr_reference_tsc) == (source_ ? std::optional(reference_tsc_) : std::nullopt),
          "REFERENCE_TSC is what was written");
  require(hyperv_.hypercall_page() == hypercall_page_.page, "the hypercall page is where it was enabled");
  require(hyperv_.reference_tsc_page() == reference_tsc_page_.page, "the reference TSC page is where it was enabled");
  require(hyperv_.takes_hypercalls() == (guest_os_id_ != 0), "hypercalls are taken of a guest that has an OS ID");
  guest_.check(false);
}

void Session::do_something() {
  switch (input_.byte() % 12) {
  default:
    return write_msr();
  case 4:
    return read_msr();
  case 5:
    return guest_.write_something(input_);
  case 6:
    static_cast<void>(guest_.discard_something(input_));
    return;
  case 7:
    return guest_.toggle(static_cast<Guest::Slot>(input_.byte() % Guest::slots));
  case 8:
    return guest_.protect(input_);
  case 9:
    return set_time();
  case 10:
    return restore_something();
  case 11:
    hyperv_.reset();
    set_up_nothing();
    if (source_) set_scale({.scale = scale_.scale});
    return;
  }
}

} // namespace
} // namespace cppvmm::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace cppvmm::fuzz;
  Session(Input(std::as_bytes(std::span(data, size)))).run(size % 4 == 0);
  return 0;
}
