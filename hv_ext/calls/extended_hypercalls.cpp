module;
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <utility>
#include <vector>
module cppvmm.hv_calls:extended_hypercalls.impl;
import :boot_zeroed_memory;
import :call;
import :call_table;
import :error;
import :extended_hypercalls;
import :memory_heat_hint;
import :query_capabilities;
import :rate_limit;
import :tlfs;
import :trace;
import cppvmm.guest_memory;

namespace cppvmm {

using Clock = std::chrono::steady_clock;

namespace {

constexpr auto query_code = static_cast<std::uint16_t>(HvCallCode::ext_query_capabilities);
constexpr auto boot_zeroed_code = static_cast<std::uint16_t>(HvCallCode::ext_get_boot_zeroed_memory);
constexpr auto heat_code = static_cast<std::uint16_t>(HvCallCode::ext_memory_heat_hint);

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
  void add_parameter(PageNumber page) {
    const std::lock_guard lock(mutex_);
    parameters_.push_back(page);
  }
  void remove_parameter(PageNumber page) {
    const std::lock_guard lock(mutex_);
    parameters_.erase(std::ranges::find(parameters_, page));
  }
  [[nodiscard]] PageSet pages() const {
    PageSet pages;
    const std::lock_guard lock(mutex_);
    const auto add = [&](PageNumber page) {
      if (const auto range = PageRange::make(page, 1)) pages.add(*range);
    };
    for (const PageNumber page : parameters_)
      add(page);
    if (hypercall_page_) add(*hypercall_page_);
    if (reference_tsc_page_) add(*reference_tsc_page_);
    return pages;
  }

private:
  mutable std::mutex mutex_;
  std::vector<PageNumber> parameters_; // of calls in progress
  std::optional<PageNumber> hypercall_page_;
  std::optional<PageNumber> reference_tsc_page_;
};

/// Pages of a device, which may write them without the kernel's knowing.
class PinnedPages {
public:
  explicit PinnedPages(PageSet pages) : pages_(std::move(pages)) {}
  void set(PageSet pages) {
    // Those who come later wait for it. What there was is freed without the lock.
    const std::lock_guard gate(gate_);
    const std::lock_guard lock(mutex_);
    std::swap(pages_, pages);
  }
  /// They stay so until `use` returns.
  template <class Use>
  void with(Use use) {
    std::unique_lock gate(gate_);
    const std::shared_lock lock(mutex_);
    gate.unlock();
    use(std::as_const(pages_));
  }

private:
  std::mutex gate_; // without it, a shared lock that is never free would keep `set` out for ever
  std::shared_mutex mutex_;
  PageSet pages_;
};

/// The sum of what was done, by many threads.
class HeatSum {
public:
  void add(const HeatHinted& hinted) {
    const HeatDone& done = hinted.done;
    add(named_[static_cast<std::size_t>(hinted.heat)],
        done.freed_pages + done.cleared_pages + done.advised_pages + done.kept_pages + done.failed_pages);
    add(freed_, done.freed_pages);
    add(cleared_, done.cleared_pages);
    add(advised_, done.advised_pages);
    add(kept_, done.kept_pages);
    add(failed_, done.failed_pages);
  }
  [[nodiscard]] HeatCounts sum() const {
    const auto named = [&](HvMemoryHeat heat) { return get(named_[static_cast<std::size_t>(heat)]); };
    return {.cold_pages = named(HvMemoryHeat::cold),
            .hot_pages = named(HvMemoryHeat::hot),
            .discard_pages = named(HvMemoryHeat::cold_discard),
            .done = {.freed_pages = get(freed_),
                     .cleared_pages = get(cleared_),
                     .advised_pages = get(advised_),
                     .kept_pages = get(kept_),
                     .failed_pages = get(failed_)}};
  }

private:
  using Pages = std::atomic<std::uint64_t>;
  static void add(Pages& sum, std::uint64_t pages) { sum.fetch_add(pages, std::memory_order_relaxed); }
  static std::uint64_t get(const Pages& sum) { return sum.load(std::memory_order_relaxed); }
  std::array<Pages, 3> named_{};
  Pages freed_ = 0;
  Pages cleared_ = 0;
  Pages advised_ = 0;
  Pages kept_ = 0;
  Pages failed_ = 0;
};

/// Keeps a page of a call's parameters known while the call is in progress. That of the output reads zero until the
/// answer is written, so that evidence cannot tell a survey.
class PageInUse {
public:
  PageInUse(PagesInUse& pages, PageNumber page) : pages_(pages), page_(page) { pages_.add_parameter(page_); }
  ~PageInUse() { pages_.remove_parameter(page_); }
  PageInUse(const PageInUse&) = delete;
  PageInUse& operator=(const PageInUse&) = delete;

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
  PinnedPages pinned;
  HeatSum heat;
  std::optional<TimeBudget> budget;
  mutable std::mutex changing; // guards the three below
  SurveyOptions survey;
  bool offers_boot_zeroed;
  bool has_asked = false;
  bool is_row_theirs = false; // the embedder's row of HvExtCallGetBootZeroedMemory, in ours' place
  std::atomic<std::uint64_t> query_capabilities = 0;
  std::atomic<std::uint64_t> get_boot_zeroed_memory = 0;
  std::atomic<std::uint64_t> memory_heat_hint = 0;
  std::atomic<std::uint64_t> other = 0;

  State(const GuestMemory& guest_memory, HvOptions chosen)
      : memory(guest_memory), options(std::move(chosen)), pinned(options.memory_heat.pinned), survey(options.survey),
        offers_boot_zeroed(options.boot_zeroed_memory) {
    if (options.rate_limit) budget.emplace(options.rate_limit->time, options.rate_limit->period);
    if (offers_boot_zeroed ||
        std::ranges::find(options.calls, boot_zeroed_code, &HvCallRow::code) == options.calls.end())
      return;
    offers_boot_zeroed = is_row_theirs = true;
  }

  [[nodiscard]] HvResult<HvCallTable> make_table();
  [[nodiscard]] HvCallRow make_heat_row();
  /// HeatOptions::without_kept.
  void without_kept(PageSet& pages, const std::function<void()>& discard);
  /// HvOptions::on_boot_zeroed, and the trace before it.
  [[nodiscard]] std::function<void(const BootZeroedAnswer&)> traced();
  [[nodiscard]] SurveyOptions chosen_survey() const;
  [[nodiscard]] std::uint64_t capabilities() const;
  void count(std::uint16_t code);
  /// Notes an extended call; whether it is offered, if there is such a call.
  [[nodiscard]] bool note(std::uint16_t code);
  /// Of an extended call, or another one of the table.
  [[nodiscard]] HvCallStep answer(const HvCall& call, const HvCallRow* row, Clock::time_point until);
  /// Of one that fits its row.
  [[nodiscard]] HvCallStep answer(const HvCheckedCall& call, const HvCallRow& row);
  [[nodiscard]] HvCallProgress handle(const HvCall& call, Clock::time_point until);
  /// The same, and tells the trace.
  [[nodiscard]] HvCallProgress trace_and_handle(const HvCall& call, Clock::time_point until);
};

HvResult<HvCallTable> ExtendedHypercalls::State::make_table() {
  std::vector<HvCallRow> rows = options.calls;
  if (!is_row_theirs)
    rows.push_back(boot_zeroed_memory_row(memory, {.survey = [this] { return chosen_survey(); },
                                                   .on_answer = options.trace ? traced() : options.on_boot_zeroed}));
  if (options.memory_heat.policy) rows.push_back(make_heat_row());
  rows.push_back(query_capabilities_row(memory, [this] { return capabilities(); }));
  return HvCallTable::make(std::move(rows));
}

HvCallRow ExtendedHypercalls::State::make_heat_row() {
  const HvHeatOptions& chosen = options.memory_heat;
  return memory_heat_hint_row(
      memory, {.policy = chosen.policy,
               .offers_cold_discard = chosen.offers_cold_discard,
               .without_kept = [this](PageSet& pages, const auto& discard) { without_kept(pages, discard); },
               .on_hint =
                   [this, told = chosen.on_hint](const HeatHinted& hinted) {
                     heat.add(hinted);
                     if (told) told(hinted);
                   }});
}

void ExtendedHypercalls::State::without_kept(PageSet& pages, const std::function<void()>& discard) {
  pages.remove(in_use.pages());
  {
    const std::lock_guard lock(changing);
    pages.remove(survey.leave_out);
  }
  pinned.with([&](const PageSet& kept) {
    pages.remove(kept);
    discard();
  });
}

std::function<void(const BootZeroedAnswer&)> ExtendedHypercalls::State::traced() {
  return [this](const BootZeroedAnswer& answer) {
    HvRangesAnswered told{
        .output = answer.output, .ranges = answer.ranges, .ram_pages = answer.survey.ram.page_count()};
    answer.survey.for_each_zeroed(answer.leave_out, [&](const PageRange& range) {
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
  const auto refuse = [](const char* mistake) {
    return std::unexpected(HvError{.code = HvErrc::invalid_options, .operation = mistake});
  };
  if (options.boot_zeroed_memory && !options.extended_hypercalls)
    return refuse("boot_zeroed_memory without extended_hypercalls");
  if (options.memory_heat.policy && !options.extended_hypercalls)
    return refuse("memory_heat without extended_hypercalls");
  if (options.rate_limit && options.rate_limit->period <= std::chrono::nanoseconds::zero())
    return refuse("a rate limit without a period");
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

void ExtendedHypercalls::set_pinned(PageSet pages) { state_->pinned.set(std::move(pages)); }

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
  {
    const std::lock_guard lock(state_->changing);
    state_->has_asked = false;
  }
  for (const HvCallRow& row : state_->table.rows())
    if (row.on_abandoned) row.on_abandoned(std::nullopt);
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
          .memory_heat_hint = state_->memory_heat_hint.load(std::memory_order_relaxed),
          .other = state_->other.load(std::memory_order_relaxed)};
}

HeatCounts ExtendedHypercalls::heat_counts() const { return state_->heat.sum(); }

void ExtendedHypercalls::State::count(std::uint16_t code) {
  (code == query_code         ? query_capabilities
   : code == boot_zeroed_code ? get_boot_zeroed_memory
   : code == heat_code        ? memory_heat_hint
                              : other)
      .fetch_add(1, std::memory_order_relaxed);
}

static HvCallStep done(HvStatus status, std::uint16_t reps_completed = 0) {
  return {.value = hv_result(status, reps_completed)};
}

HvCallStep ExtendedHypercalls::State::answer(const HvCheckedCall& call, const HvCallRow& row) {
  const HvCallAnswer answer = row.handler(call);
  if (row.kind == HvCallKind::simple) return done(answer.status);
  const std::uint16_t reps = call.control.rep_count();
  const bool is_whole = answer.goes_on ? answer.reps_completed >= reps : answer.status == HvStatus::success;
  if (is_whole) return done(HvStatus::success, reps);
  if (!answer.goes_on) return done(answer.status, answer.reps_completed);
  return {.is_done = false, .value = call.control.with_rep_start(answer.reps_completed).value};
}

HvCallStep ExtendedHypercalls::State::answer(const HvCall& call, const HvCallRow* row, Clock::time_point until) {
  const HvControl control{call.control};
  const std::uint16_t reps_before =
      row != nullptr && row->kind == HvCallKind::rep ? control.rep_start() : std::uint16_t{0};
  const auto refuse = [&](HvStatus status) {
    if (row != nullptr && row->on_abandoned) row->on_abandoned(call.vp_index);
    // Where the control word is at fault, it says nothing of a list.
    const bool has_list = status != HvStatus::invalid_hypercall_input && !control.is_fast();
    return done(status, has_list ? reps_before : std::uint16_t{0});
  };
  if (control.has_reserved_bits() || control.is_nested()) return refuse(HvStatus::invalid_hypercall_input);
  if (control.is_fast()) return refuse(HvStatus::invalid_parameter);
  if (row == nullptr) return refuse(HvStatus::invalid_hypercall_code);
  HvCallInput input;
  auto checked = check_call(call, *row, memory, input);
  if (!checked) return refuse(checked.error());
  checked->until = until;
  const bool has_output = row->output_bytes != 0 || row->output_bytes_per_rep != 0;
  if (has_output && in_use.is_overlay(call.output.page())) return refuse(HvStatus::invalid_parameter);
  const Clock::time_point begin = Clock::now();
  const bool is_limited = budget && row->is_costly;
  if (is_limited && budget->is_used_up(begin)) return refuse(HvStatus::operation_denied);
  HvCallStep step;
  try {
    std::optional<PageInUse> output;
    std::optional<PageInUse> list;
    if (has_output) output.emplace(in_use, call.output.page());
    if (!checked->input.empty()) list.emplace(in_use, call.input.page());
    step = answer(*checked, *row);
  } catch (const std::bad_alloc&) {
    // How much an answer needs depends on how the guest scattered its writes.
    step = done(HvStatus::insufficient_memory, reps_before);
  }
  if (is_limited) budget->take(Clock::now() - begin);
  return step;
}

HvCallProgress ExtendedHypercalls::State::handle(const HvCall& call, Clock::time_point until) {
  if (call.cpl != 0) return std::unexpected(HvNoResult::undefined_opcode);
  const std::uint16_t code = HvControl{call.control}.call_code();
  count(code);
  const bool is_extended = code >= hv_ext_call_first && code <= hv_ext_call_last;
  const HvCallRow* row = table.find(code);
  // The parameters of a fast call are in registers, which a row knows nothing of.
  if (!is_extended && (row == nullptr || HvControl{call.control}.is_fast()))
    return std::unexpected(HvNoResult::not_ours);
  if (is_extended && !options.extended_hypercalls) return done(HvStatus::access_denied);
  if (is_extended && !note(code)) row = nullptr;
  return answer(call, row, until);
}

HvCallProgress ExtendedHypercalls::State::trace_and_handle(const HvCall& call, Clock::time_point until) {
  if (!options.trace) return handle(call, until);
  const Clock::time_point begin = Clock::now();
  const HvCallProgress progress = handle(call, until);
  HvCallEnded ended{.call = call, .took = Clock::now() - begin};
  if (!progress)
    ended.no_result = progress.error();
  else if (progress->is_done)
    ended.result = progress->value;
  else
    ended.goes_on = progress->value;
  options.trace(ended);
  return progress;
}

HypercallResult ExtendedHypercalls::handle(const HvCall& call) {
  HvCall next = call;
  for (;;) {
    const HvCallProgress progress = state_->trace_and_handle(next, Clock::time_point::max());
    if (!progress) return std::unexpected(progress.error());
    if (progress->is_done) return progress->value;
    next.control = progress->value;
  }
}

HvCallProgress ExtendedHypercalls::handle_some(const HvCall& call) {
  const Clock::time_point now = Clock::now();
  const std::chrono::nanoseconds time = state_->options.call_time;
  return state_->trace_and_handle(call, time < Clock::time_point::max() - now ? now + time : Clock::time_point::max());
}

} // namespace cppvmm
