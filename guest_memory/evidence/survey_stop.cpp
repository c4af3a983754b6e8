module;
#include <cerrno>
#include <cstdint>
#include <utility>
module cppvmm.guest_memory:survey_stop.impl;
import :error;
import :survey_stop;

namespace cppvmm {

static constinit thread_local const SurveyStop* current = nullptr;

SurveyStopScope::SurveyStopScope(const SurveyStop& stop) : outer_(std::exchange(current, &stop)) {}
SurveyStopScope::~SurveyStopScope() { current = outer_; }

bool is_survey_stopped() { return current != nullptr && current->is_set(); }

bool may_survey_stop() { return current != nullptr && current->is_possible(); }

MemoryError survey_stopped(std::uint64_t address, std::uint64_t bytes) {
  return {.code = MemoryErrc::stopped,
          .address = address,
          .length = bytes,
          .os_error = ECANCELED,
          .operation = "a survey that was to end early"};
}

} // namespace cppvmm
