// Host memory that guest RAM takes, over time, in a file. Include it after all other headers: it imports a module.
#pragma once

#include <chrono>
#include <expected>
#include <fstream>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <thread>

import cppvmm.guest_memory;

namespace cppvmm::boot {

/// A line a sample: milliseconds since the log was started, and bytes (Region::resident_bytes, of all regions), with a
/// space between. Samples are 200 ms apart, or as far as one takes; there is one more when an answer was made, whose
/// third word is "answer".
class HostMemoryLog {
public:
  /// `memory` outlives it. An error is one line for a person.
  [[nodiscard]] static std::expected<std::unique_ptr<HostMemoryLog>, std::string> start(const std::string& path,
                                                                                        const GuestMemory& memory);
  HostMemoryLog(const HostMemoryLog&) = delete;
  HostMemoryLog& operator=(const HostMemoryLog&) = delete;
  ~HostMemoryLog() = default;

  /// Samples at once, before the guest goes on. From any thread.
  void add_answer() { add(" answer"); }
  /// Ends with one more sample; an error if not all could be taken and written.
  [[nodiscard]] std::expected<void, std::string> finish();

private:
  HostMemoryLog(const std::string& path, const GuestMemory& memory);
  void add(const char* what);
  void sample_until(const std::stop_token& stop);

  std::string path_;
  const GuestMemory& memory_;
  std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  std::mutex mutex_; // of what follows
  std::ofstream file_;
  std::optional<std::string> error_;
  std::jthread thread_; // ends before the rest
};

} // namespace cppvmm::boot
