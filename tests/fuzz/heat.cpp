// Memory heat hints: lists of any ranges, from anywhere in them on, whole or in steps, and lists that change between
// the steps. The target knows by itself which pages a list names, and what each holds afterwards.
#include "input.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "answer.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_calls;

namespace cppvmm::fuzz {
namespace {

constexpr std::uint64_t large_page = 512; // in pages of 4 KiB
constexpr std::uint64_t ram_pages = large_page;
constexpr std::uint64_t huge_page = large_page << 9;
constexpr std::uint64_t space_pages = guest_space_end >> page_shift;
constexpr std::uint64_t heat_code = 0x8003;
constexpr std::uint64_t boot_zeroed_code = 0x8002;
constexpr std::uint64_t cold_discard = 2;
constexpr int most_steps = 16;

/// The pages that a range of a list names; nothing where it is none.
std::optional<PageRange> named_by(std::uint64_t range) {
  const std::uint64_t count = (range & 0x7FF) + 1;
  if ((range & 0x800) == 0) {
    const auto pages = PageRange::make(PageNumber(range >> 12), count);
    return pages ? std::optional(*pages) : std::nullopt;
  }
  const std::uint64_t first = range >> 21 << 9;
  const std::uint64_t size = (range & 0x1000) != 0 ? huge_page : large_page;
  if ((range & 0x1F'E000) != 0 || first % size != 0) return std::nullopt;
  const auto pages = PageRange::make(PageNumber(first), count * size);
  return pages ? std::optional(*pages) : std::nullopt;
}

class Session {
public:
  explicit Session(Input input) : input_(input), kind_(input_.byte()), guest_(ram_pages), hypercalls_(make()) {
    // Something to lose.
    for (std::uint64_t page = 0; page < 2 * ram_pages; page += 31) {
      const std::array data = {std::byte{0xDA}, std::byte{0x7A}};
      const GuestAddress address(page << page_shift);
      require(guest_.memory().write(address, data).has_value(), "RAM can be written");
      guest_.note_write(address, data);
    }
  }

  void run(bool looks_at_all) {
    for (int step = 0; step < most_steps && !input_.is_at_end(); ++step)
      do_something();
    guest_.check(looks_at_all);
  }

private:
  /// A list as it is in guest memory.
  struct List {
    GuestAddress address;
    std::uint64_t size = 0;
    std::uint64_t heat = 0;
    std::vector<std::uint64_t> ranges{};
  };
  /// What a call has to come to, as far as that is certain.
  struct Right {
    HvStatus status = HvStatus::success;
    std::uint64_t reps = 0;
    bool may_fail = false; ///< The kernel may refuse it.
    PageSet named{};       ///< By the ranges that are done.
    std::uint64_t named_pages = 0;
  };

  ExtendedHypercalls make();
  void do_something();
  void hint();
  void answer();
  void set_in_use();
  [[nodiscard]] std::uint64_t any_range();
  void write_list(List& list);
  [[nodiscard]] Right expected(const List& list, std::uint64_t start) const;
  /// Pages that no answer names, and no discard takes.
  [[nodiscard]] PageSet in_use(PageNumber parameters) const;
  [[nodiscard]] bool has_gone(PageRange range) const;
  void note_discard(const PageSet& pages, bool is_certain);
  /// To its end; nothing: in more steps than it may take.
  [[nodiscard]] std::optional<HypercallResult> call(HvCall call, List& list, std::uint64_t most, PageSet& also_named);

  Input input_;
  std::uint8_t kind_;
  Guest guest_;
  PageSet leave_out_;
  PageSet pinned_;
  std::optional<PageNumber> hypercall_page_;
  std::optional<PageNumber> reference_tsc_page_;
  /// Of each vCPU, where in what a call ended that it does not go on with: heat, rep start, range. Another that is the
  /// same can't be told from one that goes on.
  std::array<std::array<std::uint64_t, 3>, 2> abandoned_{{{UINT64_MAX}, {UINT64_MAX}}};
  ExtendedHypercalls hypercalls_;
};

ExtendedHypercalls Session::make() {
  HvOptions options;
  constexpr std::array uses = {PageUse::cold, PageUse::page_out, PageUse::will_need, PageUse::populate};
  options.memory_heat.policy =
      standard_heat_policy(guest_.memory(), {.cold = uses[kind_ % 2], .hot = uses[2 + kind_ / 2 % 2]});
  options.memory_heat.offers_cold_discard = (kind_ & 0x0C) != 0x0C;
  options.call_time = std::chrono::nanoseconds((kind_ & 0x10) != 0 ? 20'000 : 0);
  if ((kind_ & 0xE0) == 0xE0)
    options.rate_limit = {.time = std::chrono::microseconds(50), .period = std::chrono::milliseconds(1)};
  auto made = ExtendedHypercalls::create(guest_.memory(), std::move(options));
  require(made.has_value(), "the options are valid");
  return std::move(*made);
}

std::uint64_t Session::any_range() {
  const std::uint8_t how = input_.byte();
  if (how >= 0xF8) return input_.take<std::uint64_t>();
  const std::uint64_t more = (how & 0x20) != 0   ? input_.byte() % 4
                             : (how & 0x10) != 0 ? input_.byte() % 32
                                                 : input_.below(0x800);
  const std::uint64_t page = guest_.any_page(input_).value();
  if ((how & 3) != 0) return page << 12 | more;
  const std::uint64_t reserved = (how & 0xC4) == 0xC4 ? std::uint64_t{input_.byte()} << 13 : 0;
  const std::uint64_t size = (how & 0x48) == 0x48 ? 0x1000 : 0;
  return page >> 9 << 21 | reserved | size | 0x800 | more;
}

void Session::write_list(List& list) {
  const std::size_t at = input_.below(list.size + 1);
  const std::uint64_t value = at == 0 ? input_.byte() % 4 : any_range();
  (at == 0 ? list.heat : list.ranges[at - 1]) = value;
  const auto bytes = std::as_bytes(std::span(&value, 1));
  const GuestAddress address(list.address.value() + at * 8);
  require(guest_.memory().write(address, bytes).has_value(), "the guest writes its list");
  guest_.note_write(address, bytes);
}

bool Session::has_gone(PageRange range) const {
  const PageRange embedders = guest_.pages_of(Guest::adopted);
  for (std::uint64_t page = embedders.first().value(); page < embedders.end().value(); ++page)
    if (range.contains(PageNumber(page)) && !guest_.can_write(PageNumber(page))) return true;
  return false;
}

Session::Right Session::expected(const List& list, std::uint64_t start) const {
  Right right;
  right.reps = start;
  if (list.heat > cold_discard || (list.heat == cold_discard && (kind_ & 0x0C) == 0x0C)) {
    right.status = HvStatus::invalid_parameter;
    return right;
  }
  PageSet ram;
  for (const auto slot : {Guest::anonymous, Guest::memfd, Guest::adopted, Guest::last})
    if (guest_.is_ram(guest_.pages_of(slot).first())) ram.add(guest_.pages_of(slot));
  for (; right.reps < list.size; ++right.reps) {
    const auto pages = named_by(list.ranges[right.reps]);
    if (!pages || !ram.contains(*pages)) {
      right.status = HvStatus::invalid_parameter;
      break;
    }
    right.may_fail = right.may_fail || has_gone(*pages);
    right.named.add(*pages);
    right.named_pages += pages->count();
  }
  return right;
}

PageSet Session::in_use(PageNumber parameters) const {
  PageSet pages = leave_out_;
  for (const auto& page : {std::optional(parameters), hypercall_page_, reference_tsc_page_})
    if (page && page->value() < space_pages) pages.add(*PageRange::make(*page, 1));
  return pages;
}

void Session::note_discard(const PageSet& pages, bool is_certain) {
  for (const PageRange& range : pages.ranges()) {
    if (is_certain) {
      guest_.note_zero(range);
    } else {
      for (std::uint64_t i = 0; i < range.count(); ++i)
        guest_.note_maybe_zero(PageNumber(range.first().value() + i));
    }
  }
}

std::optional<HypercallResult> Session::call(HvCall call, List& list, std::uint64_t most, PageSet& also_named) {
  if (most == 0) return hypercalls_.handle(call);
  for (std::uint64_t step = 0; step < most; ++step) {
    const HvCallProgress progress = hypercalls_.handle_some(call);
    if (!progress) return std::unexpected(progress.error());
    if (progress->is_done) return HypercallResult(progress->value);
    constexpr std::uint64_t start_mask = std::uint64_t{0xFFF} << 48;
    require((progress->value & ~start_mask) == (call.control & ~start_mask), "a call that goes on is the same one");
    require((progress->value & start_mask) >= (call.control & start_mask), "a call that goes on does not go back");
    require((progress->value >> 48 & 0xFFF) < list.size, "a call that goes on has something left");
    call.control = progress->value;
    if ((kind_ & 0x20) == 0 || input_.is_at_end()) continue;
    also_named.add(expected(list, 0).named);
    if (input_.byte() % 4 == 0 || !guest_.can_write(list.address.page())) break;
    write_list(list);
    also_named.add(expected(list, 0).named);
  }
  const std::uint64_t start = call.control >> 48 & 0xFFF;
  if (start < list.size) abandoned_[call.vp_index] = {list.heat, start, list.ranges[start]};
  return std::nullopt;
}

void Session::hint() {
  const std::uint8_t how = input_.byte();
  List list{.address = GuestAddress(guest_.any_address(input_)), .size = 1 + input_.below((how & 7) == 0 ? 600 : 6)};
  list.heat = (how & 8) != 0 ? cold_discard : input_.byte() % 4;
  if (how == 0xFF) list.heat = input_.take<std::uint64_t>();
  for (std::uint64_t i = 0; i < list.size; ++i)
    list.ranges.push_back(any_range());
  std::vector<std::uint64_t> words = {list.heat};
  words.insert(words.end(), list.ranges.begin(), list.ranges.end());
  const auto bytes = std::as_writable_bytes(std::span(words));
  const bool is_there = guest_.can_read(list.address.page()) && list.address.value() % 8 == 0 &&
                        list.address.offset_in_page() + bytes.size() <= page_size;
  if (is_there && guest_.can_write(list.address.page())) {
    require(guest_.memory().write(list.address, bytes).has_value(), "the guest writes its list");
    guest_.note_write(list.address, bytes);
  } else if (is_there) {
    const Page page = guest_.content(list.address.page());
    std::ranges::copy(std::span(page).subspan(list.address.offset_in_page(), bytes.size()), bytes.begin());
    list.heat = words.front();
    list.ranges.assign(words.begin() + 1, words.end());
  }
  const std::uint64_t start = (how & 0x30) == 0x30 ? input_.byte() : 0;
  HvCall call{.control = heat_code | list.size << 32 | start << 48, .input = list.address, .vp_index = how & 1U};
  call.output = GuestAddress(input_.byte());
  const std::uint64_t more =
      (how & 0xC0) == 0xC0 ? input_.take<std::uint64_t>() & ~std::uint64_t{0x0FFF'0FFF'0000'FFFF} : 0;
  call.control |= more;

  if (!is_there || more != 0 || start >= list.size) {
    const HypercallResult result = hypercalls_.handle(call);
    require(result.has_value() && (*result & 0xFFFF) != 0, "a call that cannot be is refused");
    return guest_.check(false);
  }
  const Right right = expected(list, start);
  PageSet also_named;
  const bool may_go_on = abandoned_[call.vp_index] == std::array{list.heat, start, list.ranges[start]};
  if (list.heat <= cold_discard && (kind_ & 0xE0) != 0xE0) abandoned_[call.vp_index] = {UINT64_MAX};
  const bool in_steps = (kind_ & 0x40) == 0;
  const auto result =
      this->call(call, list, in_steps ? right.named_pages / large_page + list.size / 64 + 2 : 0, also_named);
  const bool has_changed = !also_named.empty();
  require(result.has_value() || has_changed, "a call comes to an end");
  if (result) require(result->has_value(), "a heat hint has a result");
  const HypercallResult value = result.value_or(HypercallResult(0));
  const auto status = static_cast<HvStatus>(*value & 0xFFFF);
  const std::uint64_t reps = *value >> 32;
  const bool is_limited = (kind_ & 0xE0) == 0xE0 && status == HvStatus::operation_denied && reps <= right.reps;
  const bool is_right = status == right.status && reps == right.reps;
  const bool is_refused = right.may_fail && reps <= right.reps &&
                          (status == HvStatus::insufficient_memory || status == HvStatus::operation_denied);
  require(is_right || is_refused || is_limited || has_changed,
          "a heat hint has the result that the interface promises");
  if (list.heat == cold_discard || has_changed) {
    PageSet gone = right.named;
    gone.add(also_named);
    gone.remove(in_use(list.address.page()));
    gone.remove(pinned_);
    note_discard(gone, is_right && !has_changed && !may_go_on);
  }
  guest_.check(false);
}

void Session::answer() {
  HvCall call{.control = boot_zeroed_code, .output = GuestAddress(guest_.any_page(input_).value() << page_shift)};
  const HypercallResult result = hypercalls_.handle(call);
  require(result.has_value(), "the call is answered");
  if (*result == 0) take_answer(guest_, call.output, in_use(call.output.page()));
  guest_.check(false);
}

void Session::set_in_use() {
  const auto page = [&] { return input_.flag() ? std::optional(guest_.any_page(input_)) : std::nullopt; };
  switch (input_.byte() % 4) {
  case 0:
    return hypercalls_.set_hypercall_page(hypercall_page_ = page());
  case 1:
    return hypercalls_.set_reference_tsc_page(reference_tsc_page_ = page());
  case 2:
    pinned_ = {guest_.any_range(input_, 300)};
    return hypercalls_.set_pinned(pinned_);
  default:
    leave_out_ = {guest_.any_range(input_, 300)};
    return hypercalls_.set_survey({.leave_out = leave_out_});
  }
}

void Session::do_something() {
  switch (input_.byte() % 12) {
  default:
    return hint();
  case 5:
  case 6:
    return guest_.write_something(input_);
  case 7:
    return set_in_use();
  case 8:
    return guest_.toggle(static_cast<Guest::Slot>(input_.byte() % Guest::slots));
  case 9:
    return guest_.protect(input_);
  case 10:
    return answer();
  case 11:
    static_cast<void>(guest_.discard_something(input_));
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
