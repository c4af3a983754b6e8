#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <ios>
#include <mutex>
#include <ratio>

#include "host_memory_log.hpp"

namespace cppvmm::boot {

std::expected<std::unique_ptr<HostMemoryLog>, std::string> HostMemoryLog::start(const std::string& path,
                                                                                const GuestMemory& memory) {
  std::unique_ptr<HostMemoryLog> log(new HostMemoryLog(path, memory));
  if (!log->file_) return std::unexpected("cannot write " + path);
  log->thread_ = std::jthread([raw = log.get()](const std::stop_token& stop) { raw->sample_until(stop); });
  return log;
}

HostMemoryLog::HostMemoryLog(const std::string& path, const GuestMemory& memory)
    : path_(path), memory_(memory), file_(path, std::ios::trunc) {}

std::expected<void, std::string> HostMemoryLog::finish() {
  thread_.request_stop();
  if (thread_.joinable()) thread_.join();
  add("");
  const std::scoped_lock lock(mutex_);
  file_.close();
  if (error_) return std::unexpected(*error_);
  if (file_.fail()) return std::unexpected("cannot write " + path_);
  return {};
}

void HostMemoryLog::add(const char* what) {
  const std::scoped_lock lock(mutex_);
  std::uint64_t sum = 0;
  for (const auto map = memory_.snapshot(); const auto& region : map->regions()) {
    const auto bytes = region.resident_bytes();
    if (!bytes) {
      if (!error_) error_ = path_ + " is incomplete: " + bytes.error().message();
      return;
    }
    sum += *bytes;
  }
  const std::chrono::duration<double, std::milli> since = std::chrono::steady_clock::now() - started_;
  file_ << static_cast<std::uint64_t>(since.count()) << ' ' << sum << what << '\n';
}

void HostMemoryLog::sample_until(const std::stop_token& stop) {
  constexpr std::chrono::milliseconds period(200);
  std::mutex mutex;
  std::condition_variable_any never;
  std::unique_lock lock(mutex);
  while (!stop.stop_requested()) {
    add("");
    never.wait_for(lock, stop, period, [] { return false; });
  }
}

} // namespace cppvmm::boot
