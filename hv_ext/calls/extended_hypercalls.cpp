module;
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <expected>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>
module cppvmm.hv_calls:extended_hypercalls.impl;
import :boot_zeroed_memory;
import :call;
import :call_table;
import :error;
import :extended_hypercalls;
import :query_capabilities;
import :tlfs;
import :trace;
import cppvmm.guest_memory;

namespace cppvmm {

namespace {

constexpr auto query_code = static_cast<std::uint16_t>(HvCallCode::ext_query_capabilities);
constexpr auto boot_zeroed_code = static_cast<std::uint16_t>(HvCallCode::ext_get_boot_zeroed_memory);

/// Pages that read zero now, or could, and are not the guest's to take for free.
class PagesInUse {
public:
  void set_hypercall_page(std::optional<PageNumber> page) {
    const std::lock_guard lock(mutex_);
    hypercall_page_ = page;
  }
  void set_reference_tsc_page(std::optional<PageNumber> page) {
    const std::lock_guard lock(mutex_);
    reference_tsc_page_ = page;
  }
  [[nodiscard]] bool is_overlay(PageNumber page) const {
    const std::lock_guard lock(mutex_);
    return hypercall_page_ == page || reference_tsc_page_ == page;
  }
  void add_output(PageNumber page) {
    const std::lock_guard lock(mutex_);
    outputs_.push_back(page);
  }
  void remove_output(PageNumber page) {
    const std::lock_guard lock(mutex_);
    outputs_.erase(std::ranges::find(outputs_, page));
  }
  [[nodiscard]] PageSet pages() const {
    PageSet pages;
    const std::lock_guard lock(mutex_);
    const auto add = [&](PageNumber page) {
      if (const auto range = PageRange::make(page, 1)) pages.add(*range);
    };
    for (const PageNumber page : outputs_)
      add(page);
    if (hypercall_page_) add(*hypercall_page_);
    if (reference_tsc_page_) add(*reference_tsc_page_);
    return pages;
  }

private:
  mutable std::mutex mutex_;
  std::vector<PageNumber> outputs_; // that calls in progress will write to
  std::optional<PageNumber> hypercall_page_;
  std::optional<PageNumber> reference_tsc_page_;
};

/// Keeps a call's output page known to all surveys while the call is in progress: it reads zero until the answer is
/// written, so that evidence cannot tell.
class OutputPage {
public:
  OutputPage(PagesInUse& pages, PageNumber page) : pages_(pages), page_(page) { pages_.add_output(page_); }
  ~OutputPage() { pages_.remove_output(page_); }
  OutputPage(const OutputPage&) = delete;
  OutputPage& operator=(const OutputPage&) = delete;

private:
  PagesInUse& pages_;
  PageNumber page_;
};

} // namespace

struct ExtendedHypercalls::State {
  const GuestMemory& memory;
  HvOptions options;
  HvCallTable table;
  PagesInUse in_use;
  mutable std::mutex changing; // guards the three below
  SurveyOptions survey;
  bool offers_boot_zeroed;
  bool has_asked = false;
  bool is_row_theirs = false; // the embedder's row of HvExtCallGetBootZeroedMemory, in ours' place
  std::atomic<std::uint64_t> query_capabilities = 0;
  std::atomic<std::uint64_t> get_boot_zeroed_memory = 0;
  std::atomic<std::uint64_t> other = 0;

  State(const GuestMemory& guest_memory, HvOptions chosen)
      : memory(guest_memory), options(std::move(chosen)), survey(options.survey),
        offers_boot_zeroed(options.boot_zeroed_memory) {
    if (offers_boot_zeroed ||
        std::ranges::find(options.calls, boot_zeroed_code, &HvCallRow::code) == options.calls.end())
      return;
    offers_boot_zeroed = is_row_theirs = true;
  }

  [[nodiscard]] HvResult<HvCallTable> make_table();
  /// HvOptions::on_boot_zeroed, and the trace before it.
  [[nodiscard]] std::function<void(const BootZeroedAnswer&)> traced();
  [[nodiscard]] SurveyOptions chosen_survey() const;
  [[nodiscard]] std::uint64_t capabilities() const;
  void count(std::uint16_t code);
  /// Notes an extended call; whether it is offered, if there is such a call.
  [[nodiscard]] bool note(std::uint16_t code);
  /// Of an extended call, or another one of the table.
  [[nodiscard]] std::uint64_t answer(const HvCall& call, const HvCallRow* row);
  [[nodiscard]] HypercallResult handle(const HvCall& call);
};

HvResult<HvCallTable> ExtendedHypercalls::State::make_table() {
  std::vector<HvCallRow> rows = options.calls;
  if (!is_row_theirs)
    rows.push_back(boot_zeroed_memory_row(memory, {.survey = [this] { return chosen_survey(); },
                                                   .on_answer = options.trace ? traced() : options.on_boot_zeroed}));
  rows.push_back(query_capabilities_row(memory, [this] { return capabilities(); }));
  return HvCallTable::make(std::move(rows));
}

std::function<void(const BootZeroedAnswer&)> ExtendedHypercalls::State::traced() {
  return [this](const BootZeroedAnswer& answer) {
    HvRangesAnswered told{
        .output = answer.output, .ranges = answer.ranges, .ram_pages = answer.survey.ram.page_count()};
    answer.survey.zeroed.for_each_without(answer.leave_out, [&](const PageRange& range) {
      told.zeroed_pages += range.count();
      ++told.zeroed_ranges;
    });
    options.trace(told);
    if (options.on_boot_zeroed) options.on_boot_zeroed(answer);
  };
}

SurveyOptions ExtendedHypercalls::State::chosen_survey() const {
  SurveyOptions chosen;
  {
    const std::lock_guard lock(changing);
    chosen = survey;
  }
  chosen.leave_out.add(in_use.pages());
  return chosen;
}

std::uint64_t ExtendedHypercalls::State::capabilities() const {
  std::uint64_t bits = options.capabilities;
  const std::lock_guard lock(changing);
  for (const HvCallRow& row : table.rows())
    if (row.code != boot_zeroed_code || offers_boot_zeroed) bits |= row.capability;
  return bits;
}

bool ExtendedHypercalls::State::note(std::uint16_t code) {
  const std::lock_guard lock(changing);
  if (code == query_code || code == boot_zeroed_code) has_asked = true;
  return code != boot_zeroed_code || offers_boot_zeroed;
}

ExtendedHypercalls::ExtendedHypercalls(std::unique_ptr<State> state) : state_(std::move(state)) {}
ExtendedHypercalls::~ExtendedHypercalls() = default;
ExtendedHypercalls::ExtendedHypercalls(ExtendedHypercalls&&) noexcept = default;
ExtendedHypercalls& ExtendedHypercalls::operator=(ExtendedHypercalls&&) noexcept = default;

HvResult<ExtendedHypercalls> ExtendedHypercalls::create(const GuestMemory& memory, HvOptions options) {
  if (options.boot_zeroed_memory && !options.extended_hypercalls)
    return std::unexpected(
        HvError{.code = HvErrc::invalid_options, .operation = "boot_zeroed_memory without extended_hypercalls"});
  auto state = std::make_unique<State>(memory, std::move(options));
  auto table = state->make_table();
  if (!table) return std::unexpected(table.error());
  state->table = std::move(*table);
  return ExtendedHypercalls(std::move(state));
}

void ExtendedHypercalls::set_survey(SurveyOptions survey) {
  // What there was is freed without the lock.
  const std::lock_guard lock(state_->changing);
  std::swap(state_->survey, survey);
}

HvResult<void> ExtendedHypercalls::offer_boot_zeroed_memory(bool is_offered) {
  const auto refused = [](HvErrc code) {
    return std::unexpected(HvError{.code = code, .operation = "offer HvExtCallGetBootZeroedMemory"});
  };
  if ((is_offered && !state_->options.extended_hypercalls) || state_->is_row_theirs)
    return refused(HvErrc::invalid_options);
  const std::lock_guard lock(state_->changing);
  if (state_->has_asked) return refused(HvErrc::too_late);
  state_->offers_boot_zeroed = is_offered;
  return {};
}

bool ExtendedHypercalls::offers_boot_zeroed_memory() const {
  const std::lock_guard lock(state_->changing);
  return state_->offers_boot_zeroed;
}

void ExtendedHypercalls::reset() {
  const std::lock_guard lock(state_->changing);
  state_->has_asked = false;
}

const HvOptions& ExtendedHypercalls::options() const { return state_->options; }
const GuestMemory& ExtendedHypercalls::memory() const { return state_->memory; }
const HvCallTable& ExtendedHypercalls::table() const { return state_->table; }
void ExtendedHypercalls::set_hypercall_page(std::optional<PageNumber> page) { state_->in_use.set_hypercall_page(page); }
void ExtendedHypercalls::set_reference_tsc_page(std::optional<PageNumber> page) {
  state_->in_use.set_reference_tsc_page(page);
}

HypercallCounts ExtendedHypercalls::counts() const {
  return {.query_capabilities = state_->query_capabilities.load(std::memory_order_relaxed),
          .get_boot_zeroed_memory = state_->get_boot_zeroed_memory.load(std::memory_order_relaxed),
          .other = state_->other.load(std::memory_order_relaxed)};
}

void ExtendedHypercalls::State::count(std::uint16_t code) {
  (code == query_code         ? query_capabilities
   : code == boot_zeroed_code ? get_boot_zeroed_memory
                              : other)
      .fetch_add(1, std::memory_order_relaxed);
}

std::uint64_t ExtendedHypercalls::State::answer(const HvCall& call, const HvCallRow* row) {
  const HvControl control{call.control};
  if (control.has_reserved_bits() || control.is_nested()) return hv_result(HvStatus::invalid_hypercall_input);
  if (control.is_fast()) return hv_result(HvStatus::invalid_parameter);
  if (row == nullptr) return hv_result(HvStatus::invalid_hypercall_code);
  HvCallInput input;
  const auto checked = check_call(call, *row, memory, input);
  if (!checked) return hv_result(checked.error());
  const bool has_output = row->output_bytes != 0 || row->output_bytes_per_rep != 0;
  if (has_output && in_use.is_overlay(call.output.page())) return hv_result(HvStatus::invalid_parameter);
  try {
    std::optional<OutputPage> kept;
    if (has_output) kept.emplace(in_use, call.output.page());
    const HvCallAnswer answer = row->handler(*checked);
    if (row->kind == HvCallKind::simple) return hv_result(answer.status);
    return hv_result(answer.status, answer.status == HvStatus::success ? control.rep_count() : answer.reps_completed);
  } catch (const std::bad_alloc&) {
    // How much an answer needs depends on how the guest scattered its writes.
    return hv_result(HvStatus::insufficient_memory);
  }
}

HypercallResult ExtendedHypercalls::State::handle(const HvCall& call) {
  if (call.cpl != 0) return std::unexpected(HvNoResult::undefined_opcode);
  const std::uint16_t code = HvControl{call.control}.call_code();
  count(code);
  const bool is_extended = code >= hv_ext_call_first && code <= hv_ext_call_last;
  const HvCallRow* row = table.find(code);
  // The parameters of a fast call are in registers, which a row knows nothing of.
  if (!is_extended && (row == nullptr || HvControl{call.control}.is_fast()))
    return std::unexpected(HvNoResult::not_ours);
  if (is_extended && !options.extended_hypercalls) return hv_result(HvStatus::access_denied);
  if (is_extended && !note(code)) row = nullptr;
  return answer(call, row);
}

HypercallResult ExtendedHypercalls::handle(const HvCall& call) {
  if (!state_->options.trace) return state_->handle(call);
  const auto begin = std::chrono::steady_clock::now();
  const HypercallResult result = state_->handle(call);
  HvCallEnded ended{.call = call, .took = std::chrono::steady_clock::now() - begin};
  if (result)
    ended.result = *result;
  else
    ended.no_result = result.error();
  state_->options.trace(ended);
  return result;
}

} // namespace cppvmm
