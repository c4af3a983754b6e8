module;
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <utility>
#include <vector>
module cppvmm.hv_ext:extended_hypercalls.impl;
import :boot_zeroed_memory;
import :error;
import :extended_hypercalls;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

struct ExtendedHypercalls::State {
  const GuestMemory& memory;
  HvOptions options;
  std::atomic<std::uint64_t> query_capabilities = 0;
  std::atomic<std::uint64_t> get_boot_zeroed_memory = 0;
  std::atomic<std::uint64_t> other = 0;
  std::mutex mutex;                // of the next two
  std::vector<PageNumber> outputs; // pages that calls in progress will write their output to
  std::optional<PageNumber> hypercall_page;
  std::mutex survey_mutex; // held while an answer is made

  State(const GuestMemory& guest_memory, HvOptions chosen) : memory(guest_memory), options(std::move(chosen)) {}

  [[nodiscard]] HvStatus answer_capabilities(GuestAddress output) const;
  [[nodiscard]] HvStatus answer_boot_zeroed(GuestAddress output);
  [[nodiscard]] bool is_hypercall_page(PageNumber page) {
    const std::lock_guard lock(mutex);
    return hypercall_page == page;
  }
  /// Pages that read zero now, or could, and are not the guest's to take for free.
  [[nodiscard]] PageSet pages_to_keep();
};

/// Keeps a call's output page known to all surveys while the call is in progress: it reads zero until the answer is
/// written, so that evidence cannot tell.
class OutputPage {
public:
  OutputPage(std::mutex& mutex, std::vector<PageNumber>& pages, PageNumber page)
      : mutex_(mutex), pages_(pages), page_(page) {
    const std::lock_guard lock(mutex_);
    pages_.push_back(page_);
  }
  ~OutputPage() {
    const std::lock_guard lock(mutex_);
    pages_.erase(std::ranges::find(pages_, page_));
  }
  OutputPage(const OutputPage&) = delete;
  OutputPage& operator=(const OutputPage&) = delete;

private:
  std::mutex& mutex_;
  std::vector<PageNumber>& pages_;
  PageNumber page_;
};

ExtendedHypercalls::ExtendedHypercalls(std::unique_ptr<State> state) : state_(std::move(state)) {}
ExtendedHypercalls::~ExtendedHypercalls() = default;
ExtendedHypercalls::ExtendedHypercalls(ExtendedHypercalls&&) noexcept = default;
ExtendedHypercalls& ExtendedHypercalls::operator=(ExtendedHypercalls&&) noexcept = default;

HvResult<ExtendedHypercalls> ExtendedHypercalls::create(const GuestMemory& memory, HvOptions options) {
  if (options.boot_zeroed_memory && !options.extended_hypercalls)
    return std::unexpected(
        HvError{.code = HvErrc::invalid_options, .operation = "boot_zeroed_memory without extended_hypercalls"});
  return ExtendedHypercalls(std::make_unique<State>(memory, std::move(options)));
}

const HvOptions& ExtendedHypercalls::options() const { return state_->options; }
const GuestMemory& ExtendedHypercalls::memory() const { return state_->memory; }
void ExtendedHypercalls::set_hypercall_page(std::optional<PageNumber> page) {
  const std::lock_guard lock(state_->mutex);
  state_->hypercall_page = page;
}

HypercallCounts ExtendedHypercalls::counts() const {
  return {.query_capabilities = state_->query_capabilities.load(std::memory_order_relaxed),
          .get_boot_zeroed_memory = state_->get_boot_zeroed_memory.load(std::memory_order_relaxed),
          .other = state_->other.load(std::memory_order_relaxed)};
}

static HvStatus check_output(GuestAddress output, std::uint64_t bytes) {
  const bool fits = output.is_aligned(hv_parameter_alignment) && output.offset_in_page() + bytes <= page_size &&
                    output.checked_add(bytes).has_value();
  return fits ? HvStatus::success : HvStatus::invalid_alignment;
}

HvStatus ExtendedHypercalls::State::answer_capabilities(GuestAddress output) const {
  const std::uint64_t capabilities =
      options.boot_zeroed_memory ? static_cast<std::uint64_t>(HvExtCapability::get_boot_zeroed_memory) : 0;
  return memory.write_value(output, capabilities) ? HvStatus::success : HvStatus::invalid_parameter;
}

PageSet ExtendedHypercalls::State::pages_to_keep() {
  PageSet pages;
  const std::lock_guard lock(mutex);
  const auto keep = [&](PageNumber page) {
    if (const auto range = PageRange::make(page, 1)) pages.add(*range);
  };
  for (const PageNumber page : outputs)
    keep(page);
  if (hypercall_page) keep(*hypercall_page);
  return pages;
}

HvStatus ExtendedHypercalls::State::answer_boot_zeroed(GuestAddress output) {
  // Before the work, and before the output page is held back from others' answers.
  if (!memory.snapshot()->check_write(output, hv_boot_zeroed_output_bytes)) return HvStatus::invalid_parameter;
  const OutputPage kept(mutex, outputs, output.page());
  BootZeroedAnswer answer{.output = output, .ranges = {}, .survey = {}};
  {
    const std::lock_guard one_at_a_time(survey_mutex);
    SurveyOptions survey_options = options.survey;
    survey_options.leave_out.add(pages_to_keep());
    answer.survey = memory.survey(survey_options);
    answer.ranges = answer.survey.zeroed.largest(hv_boot_zeroed_max_ranges);
    if (!memory.write(output, encode_boot_zeroed(answer.ranges))) return HvStatus::invalid_parameter;
  }
  if (options.on_boot_zeroed) options.on_boot_zeroed(answer);
  return HvStatus::success;
}

HypercallResult ExtendedHypercalls::handle(std::uint64_t control_value, GuestAddress /*input*/, GuestAddress output,
                                           unsigned cpl) {
  if (cpl != 0) return std::unexpected(UndefinedOpcode{});
  const HvControl control{control_value};
  const std::uint16_t code = control.call_code();
  const bool is_query = code == static_cast<std::uint16_t>(HvCallCode::ext_query_capabilities);
  const bool is_boot_zeroed = code == static_cast<std::uint16_t>(HvCallCode::ext_get_boot_zeroed_memory);
  auto& count = is_query ? state_->query_capabilities : is_boot_zeroed ? state_->get_boot_zeroed_memory : state_->other;
  count.fetch_add(1, std::memory_order_relaxed);

  const HvOptions& offered = state_->options;
  const bool is_extended = code >= hv_ext_call_first && code <= hv_ext_call_last;
  if (is_extended && !offered.extended_hypercalls) return hv_result(HvStatus::access_denied);
  if (control.has_reserved_bits() || control.is_nested()) return hv_result(HvStatus::invalid_hypercall_input);
  if (is_extended && control.is_fast()) return hv_result(HvStatus::invalid_parameter);
  if (!is_query && !(is_boot_zeroed && offered.boot_zeroed_memory)) return hv_result(HvStatus::invalid_hypercall_code);
  if (control.rep_count() != 0 || control.rep_start() != 0 || control.variable_header_size() != 0)
    return hv_result(HvStatus::invalid_hypercall_input);

  const std::uint64_t bytes = is_query ? hv_query_capabilities_output_bytes : hv_boot_zeroed_output_bytes;
  if (const HvStatus status = check_output(output, bytes); status != HvStatus::success) return hv_result(status);
  if (state_->is_hypercall_page(output.page())) return hv_result(HvStatus::invalid_parameter);
  try {
    return hv_result(is_query ? state_->answer_capabilities(output) : state_->answer_boot_zeroed(output));
  } catch (const std::bad_alloc&) {
    // How much a survey needs depends on how the guest scattered its writes.
    return hv_result(HvStatus::insufficient_memory);
  }
}

} // namespace cppvmm
