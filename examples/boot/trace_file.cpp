#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <sys/utsname.h>
#include <system_error>
#include <utility>
#include <variant>

#include "trace_file.hpp"

import cppvmm.guest_memory;

namespace cppvmm::boot {
namespace {

using Json = nlohmann::ordered_json;

/// As text: not every reader of JSON has 64-bit numbers.
Json hex(std::uint64_t value) {
  char text[19];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

Json describe(const HvCpuidGiven& leaf) {
  return {{"event", "cpuid"},     {"vp", leaf.vp_index},  {"leaf", hex(leaf.function)}, {"eax", hex(leaf.eax)},
          {"ebx", hex(leaf.ebx)}, {"ecx", hex(leaf.ecx)}, {"edx", hex(leaf.edx)}};
}

Json describe(const HvMsrTouched& msr) {
  const char* access = "read";
  if (msr.access == HvMsrAccess::write) access = "write";
  if (msr.access == HvMsrAccess::held) access = "held";
  return {{"event", "msr"},
          {"vp", msr.vp_index},
          {"access", access},
          {"msr", hex(msr.index)},
          {"value", msr.value ? hex(*msr.value) : Json()},
          {"refused", msr.is_refused}};
}

Json describe(const HvRangesAnswered& answer) {
  Json ranges = Json::array();
  for (const PageRange& range : answer.ranges)
    ranges.push_back(Json::array({hex(range.first().value()), range.count()}));
  return {{"event", "ranges"},
          {"output", hex(answer.output.value())},
          {"ram_pages", answer.ram_pages},
          {"zeroed_pages", answer.zeroed_pages},
          {"zeroed_ranges", answer.zeroed_ranges},
          {"ranges", std::move(ranges)}};
}

Json describe(const HvCallEnded& ended) {
  Json result;
  if (ended.result)
    result = hex(*ended.result);
  else if (ended.goes_on)
    result = "goes_on";
  else
    result = ended.no_result == HvNoResult::not_ours ? "not_ours" : "undefined_opcode";
  return {{"event", "call"},
          {"vp", ended.call.vp_index},
          {"control", hex(ended.call.control)},
          {"input", hex(ended.call.input.value())},
          {"output", hex(ended.call.output.value())},
          {"cpl", ended.call.cpl},
          {"result", std::move(result)},
          {"us", std::chrono::duration<double, std::micro>(ended.took).count()}};
}

} // namespace

bool TraceFile::leaves_out() {
  if (!is_full_) return false;
  const std::lock_guard lock(mutex_);
  ++left_out_;
  return true;
}

template <class Object>
void TraceFile::write(Object object) {
  const std::chrono::duration<double, std::micro> at = std::chrono::steady_clock::now() - begin_;
  object["at_us"] = at.count();
  const std::string line = object.dump() + "\n";
  const std::lock_guard lock(mutex_);
  // What is shorter than one that was left out is left out too.
  if (is_full_ || line.size() > room_) {
    is_full_ = true;
    ++left_out_;
    return;
  }
  room_ -= line.size();
  if (std::fputs(line.c_str(), file_.get()) < 0) has_failed_ = true;
}

std::expected<std::unique_ptr<TraceFile>, std::string> TraceFile::create(const Options& options,
                                                                         std::uint64_t most_bytes) {
  std::unique_ptr<TraceFile> trace(new TraceFile());
  trace->room_ = most_bytes;
  trace->file_.reset(std::fopen(options.trace.c_str(), "we"));
  if (!trace->file_)
    return std::unexpected("cannot write " + options.trace + ": " + std::generic_category().message(errno));
  // What there is of a guest that hangs is to be read.
  std::setvbuf(trace->file_.get(), nullptr, _IOLBF, BUFSIZ);
  utsname name{};
  uname(&name);
  trace->write(Json{{"event", "trace"},
                    {"version", 1},
                    {"kernel", name.release},
                    {"guest", options.kernel.empty() ? "zeroing" : options.kernel},
                    {"memory_bytes", options.memory_bytes},
                    {"backing", to_string(options.backing)},
                    {"cpus", options.cpus}});
  return trace;
}

void TraceFile::add(const HvTraceEvent& event) noexcept {
  if (leaves_out()) return;
  try {
    write(std::visit([](const auto& each) { return describe(each); }, event));
  } catch (const std::exception&) {
    const std::lock_guard lock(mutex_);
    has_failed_ = true;
  }
}

void TraceFile::begin_boot(std::uint32_t number, Hypercalls transport) noexcept {
  try {
    write(Json{{"event", "boot"}, {"number", number}, {"hypercalls", to_string(transport)}});
  } catch (const std::exception&) {
    const std::lock_guard lock(mutex_);
    has_failed_ = true;
  }
}

bool TraceFile::finish() noexcept {
  const std::lock_guard lock(mutex_);
  if (left_out_ != 0)
    std::fprintf(file_.get(), "{\"event\":\"full\",\"left_out\":%llu}\n", static_cast<unsigned long long>(left_out_));
  left_out_ = 0;
  return std::fflush(file_.get()) == 0 && std::ferror(file_.get()) == 0 && !has_failed_;
}

} // namespace cppvmm::boot
