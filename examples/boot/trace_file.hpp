// What cppvmm-boot --trace writes: one JSON object a line, which read_trace.py prints.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <expected>
#include <memory>
#include <mutex>
#include <string>

#include "options.hpp"

import cppvmm.hv_calls;

namespace cppvmm::boot {

/// Safe to use from any thread. A guest that calls without end fills it: what comes then is left out, and counted.
class TraceFile {
public:
  /// Creates options.trace, of which no more than so many bytes are written, and says in its first line what runs. An
  /// error is one line.
  [[nodiscard]] static std::expected<std::unique_ptr<TraceFile>, std::string>
  create(const Options& options, std::uint64_t most_bytes = std::uint64_t{64} << 20);

  void add(const HvTraceEvent& event) noexcept;
  /// The guest starts, for the first time or anew.
  void begin_boot(std::uint32_t number, Hypercalls transport) noexcept;
  /// Whether all is written, but for what was left out.
  [[nodiscard]] bool finish() noexcept;

private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  TraceFile() = default;
  /// Whether the file is full: nothing is to be made for it then, however often a guest calls.
  [[nodiscard]] bool leaves_out();
  /// Adds a line to the file, unless it is full.
  template <class Object>
  void write(Object object);

  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  std::mutex mutex_; // of what follows
  std::unique_ptr<std::FILE, Close> file_;
  std::uint64_t room_ = 0; // in bytes
  std::uint64_t left_out_ = 0;
  bool has_failed_ = false;
  std::atomic<bool> is_full_ = false;
};

} // namespace cppvmm::boot
