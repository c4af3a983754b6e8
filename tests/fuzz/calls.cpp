// Hypercalls of any kind, one after the other, on memory that is written, discarded, protected, removed and put back
// between them. The target knows by itself what each has to be answered, and what memory has to hold.
#include "input.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <new>
#include <optional>
#include <span>
#include <stop_token>
#include <utility>
#include <variant>
#include <vector>

#include "answer.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_calls;

namespace cppvmm::fuzz {
namespace {

constexpr std::uint64_t ram_pages = 192;
constexpr std::uint16_t query_code = 0x8001;
constexpr std::uint16_t boot_zeroed_code = 0x8002;
constexpr std::uint16_t simple_code = 0x0042;
constexpr std::uint16_t rep_code = 0x8020;
constexpr std::uint64_t simple_capability = 1 << 20;
constexpr std::uint64_t rep_capability = 1 << 21;
constexpr std::uint64_t other_capability = std::uint64_t{1} << 63;
constexpr int most_steps = 48;

/// A row as the target knows it.
struct Sizes {
  bool is_rep = false;
  std::uint64_t input = 0, input_per_rep = 0, output = 0, output_per_rep = 0;
};
constexpr Sizes simple_sizes{.input = 40, .output = 16};
constexpr Sizes rep_sizes{.is_rep = true, .input = 8, .input_per_rep = 24, .output = 8, .output_per_rep = 8};

HvCallProgress status(HvStatus what, std::uint64_t reps = 0) {
  return HvCallStep{.is_done = true, .value = static_cast<std::uint64_t>(what) | reps << 32};
}

class Session {
public:
  explicit Session(Input input)
      : input_(input), kind_(input_.byte()), guest_(ram_pages), is_extended_((kind_ & 1) == 0),
        is_offered_(is_extended_ && (kind_ & 2) == 0), has_rows_((kind_ & 4) == 0), hypercalls_(make()) {
    if ((kind_ & 8) == 0) return;
    auto guard = FaultGuard::install();
    if (guard) guard_.emplace(std::move(*guard));
  }

  void run(bool looks_at_all) {
    for (int step = 0; step < most_steps && !input_.is_at_end(); ++step)
      do_something();
    guest_.check(looks_at_all);
  }

private:
  ExtendedHypercalls make();
  /// What the embedder's calls do: as the input says.
  HvCallAnswer answer(const HvCheckedCall& call, const Sizes& sizes);
  void note(const HvTraceEvent& event);
  void do_something();
  void call();
  void set_survey();
  [[nodiscard]] HvCallProgress expected(const HvCall& call);
  [[nodiscard]] std::optional<Sizes> sizes_of(std::uint16_t code) const;
  [[nodiscard]] bool is_row_known(std::uint16_t code) const { return sizes_of(code).has_value(); }
  [[nodiscard]] std::uint64_t capabilities() const;
  [[nodiscard]] std::optional<PageNumber> any_overlay() {
    if (input_.flag()) return std::nullopt;
    return guest_.any_page(input_);
  }

  Input input_;
  std::uint8_t kind_;
  Guest guest_;
  bool is_extended_;
  bool is_offered_;
  bool has_rows_;
  bool has_asked_ = false;
  HvCallAnswer embedders_; // what its calls answer
  bool is_out_of_memory_ = false;
  std::optional<std::vector<std::byte>> embedders_input_; // that it has to be given; nothing: it is not to be called
  PageSet leave_out_;
  PageSet marked_;
  std::optional<PageNumber> hypercall_page_;
  std::optional<PageNumber> reference_tsc_page_;
  std::optional<HvCallProgress> traced_;
  std::optional<FaultGuard> guard_;
  ExtendedHypercalls hypercalls_;
};

ExtendedHypercalls Session::make() {
  HvOptions options{.extended_hypercalls = is_extended_, .boot_zeroed_memory = is_offered_};
  options.capabilities = other_capability;
  if ((kind_ & 0x10) != 0) options.trace = [this](const HvTraceEvent& event) { note(event); };
  if (has_rows_) {
    options.calls.push_back({.code = simple_code,
                             .input_bytes = simple_sizes.input,
                             .output_bytes = simple_sizes.output,
                             .capability = simple_capability,
                             .handler = [this](const HvCheckedCall& call) { return answer(call, simple_sizes); }});
    options.calls.push_back({.code = rep_code,
                             .kind = HvCallKind::rep,
                             .input_bytes = rep_sizes.input,
                             .input_bytes_per_rep = rep_sizes.input_per_rep,
                             .output_bytes = rep_sizes.output,
                             .output_bytes_per_rep = rep_sizes.output_per_rep,
                             .capability = rep_capability,
                             .handler = [this](const HvCheckedCall& call) { return answer(call, rep_sizes); }});
  }
  auto made = ExtendedHypercalls::create(guest_.memory(), std::move(options));
  require(made.has_value(), "the options are valid");
  return std::move(*made);
}

HvCallAnswer Session::answer(const HvCheckedCall& call, const Sizes& sizes) {
  require(embedders_input_.has_value(), "a call that does not fit its row is not handed on");
  require(std::ranges::equal(call.input, *embedders_input_), "a handler is given the guest's input");
  if (is_out_of_memory_) throw std::bad_alloc();
  if (embedders_.status == HvStatus::success && !embedders_.goes_on) {
    const std::vector<std::byte> output(sizes.output + call.control.rep_count() * sizes.output_per_rep,
                                        std::byte{0x5A});
    require(guest_.memory().write(call.output, output).has_value(), "output that was checked can be written");
    guest_.note_write(call.output, output);
  }
  return embedders_;
}

void Session::note(const HvTraceEvent& event) {
  const auto* const ended = std::get_if<HvCallEnded>(&event);
  if (ended == nullptr) return;
  if (ended->no_result)
    traced_ = std::unexpected(*ended->no_result);
  else
    traced_ =
        HvCallStep{.is_done = ended->result.has_value(), .value = ended->result.value_or(ended->goes_on.value_or(0))};
}

std::optional<Sizes> Session::sizes_of(std::uint16_t code) const {
  switch (code) {
  case query_code:
    return Sizes{.output = 8};
  case boot_zeroed_code:
    return is_offered_ ? std::optional(Sizes{.output = 0xFF8}) : std::nullopt;
  case simple_code:
    return has_rows_ ? std::optional(simple_sizes) : std::nullopt;
  case rep_code:
    return has_rows_ ? std::optional(rep_sizes) : std::nullopt;
  default:
    return std::nullopt;
  }
}

std::uint64_t Session::capabilities() const {
  return other_capability | (has_rows_ ? simple_capability | rep_capability : 0) | (is_offered_ ? 1 : 0);
}

/// By what the interface promises.
HvCallProgress Session::expected(const HvCall& call) {
  embedders_input_.reset();
  const std::uint64_t control = call.control;
  const auto code = static_cast<std::uint16_t>(control);
  const bool is_extended = code >= 0x8001 && code <= 0x8041;
  const bool is_fast = (control >> 16 & 1) != 0;
  if (call.cpl != 0) return std::unexpected(HvNoResult::undefined_opcode);
  if (!is_extended && (!is_row_known(code) || is_fast)) return std::unexpected(HvNoResult::not_ours);
  if (is_extended && !is_extended_) return status(HvStatus::access_denied);
  if (code == query_code || code == boot_zeroed_code) has_asked_ = true;
  constexpr std::uint64_t reserved_or_nested = 0xF000'F000'F800'0000;
  if ((control & reserved_or_nested) != 0) return status(HvStatus::invalid_hypercall_input);
  if (is_fast) return status(HvStatus::invalid_parameter);
  const auto sizes = sizes_of(code);
  if (!sizes) return status(HvStatus::invalid_hypercall_code);
  const std::uint64_t reps = control >> 32 & 0xFFF;
  const std::uint64_t start = control >> 48 & 0xFFF;
  if ((control >> 17 & 0x3FF) != 0 || (sizes->is_rep ? start >= reps : reps != 0 || start != 0))
    return status(HvStatus::invalid_hypercall_input);
  const std::uint64_t input = sizes->input + reps * sizes->input_per_rep;
  const std::uint64_t output = sizes->output + reps * sizes->output_per_rep;
  const auto fits = [](GuestAddress address, std::uint64_t bytes) {
    return bytes == 0 ||
           (address.value() % 8 == 0 && address.offset_in_page() + bytes <= 4096 && address.value() < guest_space_end);
  };
  if (!fits(call.input, input) || !fits(call.output, output)) return status(HvStatus::invalid_alignment, start);
  if ((output != 0 && !guest_.can_write(call.output.page())) || (input != 0 && !guest_.can_read(call.input.page())))
    return status(HvStatus::invalid_parameter, start);
  if (output != 0 && (call.output.page() == hypercall_page_ || call.output.page() == reference_tsc_page_))
    return status(HvStatus::invalid_parameter, start);
  if (code != simple_code && code != rep_code) return status(HvStatus::success);
  const Page page = guest_.content(call.input.page());
  const auto from = page.begin() + static_cast<std::ptrdiff_t>(call.input.offset_in_page());
  embedders_input_.emplace(from, from + static_cast<std::ptrdiff_t>(input));
  if (is_out_of_memory_) return status(HvStatus::insufficient_memory, start);
  if (!sizes->is_rep) return status(embedders_.status);
  if (embedders_.goes_on && embedders_.reps_completed < reps) {
    const std::uint64_t others = control & ~(std::uint64_t{0xFFF} << 48);
    return HvCallStep{.is_done = false, .value = others | std::uint64_t{embedders_.reps_completed} << 48};
  }
  if (embedders_.goes_on || embedders_.status == HvStatus::success) return status(HvStatus::success, reps);
  return status(embedders_.status, embedders_.reps_completed);
}

void Session::call() {
  constexpr std::array codes = {query_code, boot_zeroed_code, boot_zeroed_code, simple_code, rep_code};
  HvCall call;
  const std::uint8_t how = input_.byte();
  call.control = how % 8 < codes.size() ? codes[how % 8] : input_.take<std::uint16_t>();
  if ((how & 0x08) != 0) call.control |= std::uint64_t{input_.byte()} << 32 | std::uint64_t{input_.byte()} << 48;
  if ((how & 0x30) == 0x30) call.control |= input_.take<std::uint64_t>() & ~std::uint64_t{0xFFFF};
  if ((how & 0xC0) == 0xC0) call.cpl = input_.byte() % 4;
  call.output = GuestAddress(guest_.any_address(input_));
  if ((how & 0x80) == 0) call.input = GuestAddress(guest_.any_address(input_));
  call.vp_index = input_.byte();
  const std::uint8_t embedders = input_.byte();
  embedders_.status = embedders < 0x80 ? HvStatus::success : static_cast<HvStatus>(embedders & 0x1F);
  embedders_.reps_completed = embedders;
  embedders_.goes_on = embedders % 4 == 3;
  is_out_of_memory_ = embedders == 0xFF;

  const HvCallProgress right = expected(call);
  HvCallProgress progress;
  if ((how & 0x40) != 0 || embedders_.goes_on) {
    progress = hypercalls_.handle_some(call);
  } else {
    const HypercallResult result = hypercalls_.handle(call);
    progress = result ? HvCallProgress(HvCallStep{.value = *result}) : std::unexpected(result.error());
  }
  require(progress == right, "a call has the result that the interface promises");
  if ((kind_ & 0x10) != 0) require(traced_ == right, "a call is traced with its result");
  const auto code = static_cast<std::uint16_t>(call.control);
  const bool is_answered = progress && progress->is_done && (progress->value & 0xFFFF) == 0;
  if (is_answered && code == query_code) {
    const std::uint64_t bits = capabilities();
    guest_.note_write(call.output, std::as_bytes(std::span(&bits, 1)));
  } else if (is_answered && code == boot_zeroed_code) {
    PageSet not_to_tell = leave_out_;
    not_to_tell.add(marked_);
    for (const auto& page : {std::optional(call.output.page()), hypercall_page_, reference_tsc_page_})
      if (page && page->value() < guest_space_end >> page_shift) not_to_tell.add(*PageRange::make(*page, 1));
    take_answer(guest_, call.output, not_to_tell);
  }
  guest_.check(false);
}

void Session::set_survey() {
  SurveyOptions survey;
  const std::uint8_t how = input_.byte();
  for (int i = 0; i < how % 4; ++i)
    survey.leave_out.add(guest_.any_range(input_, 64));
  if ((how & 0x10) != 0) survey.source = EvidenceSource::legacy;
  if ((how & 0x20) != 0) {
    survey.content_check.emplace();
    if ((how & 0x04) != 0) survey.content_check->max_bytes = input_.take<std::uint16_t>() * std::uint64_t{64};
  }
  if ((how & 0xC0) == 0x80) survey.max_time = std::chrono::nanoseconds(input_.take<std::uint16_t>());
  if ((how & 0xC0) == 0xC0) {
    std::stop_source stop;
    stop.request_stop();
    survey.stop = stop.get_token();
  }
  leave_out_ = survey.leave_out;
  hypercalls_.set_survey(std::move(survey));
}

void Session::do_something() {
  GuestMemory& memory = guest_.memory();
  switch (input_.byte() % 16) {
  default:
    return call();
  case 6:
    return guest_.write_something(input_);
  case 7:
    return set_survey();
  case 8:
    hypercall_page_ = any_overlay();
    return hypercalls_.set_hypercall_page(hypercall_page_);
  case 9:
    reference_tsc_page_ = any_overlay();
    return hypercalls_.set_reference_tsc_page(reference_tsc_page_);
  case 10:
    return guest_.toggle(static_cast<Guest::Slot>(input_.byte() % Guest::slots));
  case 11:
    return guest_.protect(input_);
  case 12: {
    const PageRange pages = guest_.any_range(input_, 64);
    marked_.add(pages);
    return memory.mark_touched(pages, Toucher::device);
  }
  case 13:
    return marked_.remove(guest_.discard_something(input_));
  case 14: {
    const bool is_offered = input_.flag();
    const auto done = hypercalls_.offer_boot_zeroed_memory(is_offered);
    require(done.has_value() == ((is_extended_ || !is_offered) && !has_asked_),
            "it is offered until the guest has asked");
    if (done) is_offered_ = is_offered;
    return;
  }
  case 15:
    // A write watch takes longer than all else.
    if (input_.byte() % 4 != 0) {
      has_asked_ = false;
      return hypercalls_.reset();
    }
    const PageNumber start = guest_.pages_of(static_cast<Guest::Slot>(input_.byte() % Guest::slots)).first();
    if (!memory.disarm_write_watch(GuestAddress(start.value() << page_shift)))
      static_cast<void>(memory.arm_write_watch(GuestAddress(start.value() << page_shift),
                                               {.written_through_this_mapping_only = true}));
  }
}

} // namespace
} // namespace cppvmm::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace cppvmm::fuzz;
  Session(Input(std::as_bytes(std::span(data, size)))).run(size % 4 == 0);
  return 0;
}
