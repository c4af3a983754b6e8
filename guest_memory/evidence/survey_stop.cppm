module;
#include <chrono>
#include <cstdint>
#include <stop_token>
#include <utility>
module cppvmm.guest_memory:survey_stop;
import :error;

namespace cppvmm {

/// When a survey is to end early: when it is asked to, or its time is over.
class SurveyStop {
public:
  using Clock = std::chrono::steady_clock;

  SurveyStop(std::stop_token token, Clock::time_point begin, std::chrono::nanoseconds max_time)
      : token_(std::move(token)),
        deadline_(max_time < Clock::time_point::max() - begin ? begin + max_time : Clock::time_point::max()) {}

  [[nodiscard]] const std::stop_token& token() const { return token_; }
  [[nodiscard]] Clock::time_point deadline() const { return deadline_; }
  [[nodiscard]] bool has_deadline() const { return deadline_ != Clock::time_point::max(); }
  /// Whether it may come to that.
  [[nodiscard]] bool is_possible() const { return has_deadline() || token_.stop_possible(); }
  [[nodiscard]] bool is_set() const { return token_.stop_requested() || (has_deadline() && Clock::now() >= deadline_); }

private:
  std::stop_token token_;
  Clock::time_point deadline_;
};

/// While it lives, what this thread looks up is for a survey that ends so.
class SurveyStopScope {
public:
  explicit SurveyStopScope(const SurveyStop& stop);
  SurveyStopScope(const SurveyStopScope&) = delete;
  SurveyStopScope& operator=(const SurveyStopScope&) = delete;
  ~SurveyStopScope();

private:
  const SurveyStop* outer_;
};

/// Whether the survey that this thread makes, if it makes one, is to end: asked between pieces of all that may take
/// long. Who finds that it is gives up, with survey_stopped or ECANCELED for an error.
[[nodiscard]] bool is_survey_stopped();
/// Whether it may come to that, so that pieces are to be small.
[[nodiscard]] bool may_survey_stop();
[[nodiscard]] MemoryError survey_stopped(std::uint64_t address, std::uint64_t bytes);

} // namespace cppvmm
