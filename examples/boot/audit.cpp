#include "audit.hpp"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <system_error>
#include <unistd.h>
#include <utility>
#include <vector>

namespace cppvmm::boot {
namespace {

constexpr std::uint64_t page_bytes = 4096;
constexpr std::uint64_t chunk_pages = 256;

template <class T>
using Result = std::expected<T, std::string>;

std::unexpected<std::string> failure(const char* what, int error) {
  return std::unexpected(std::string("audit: ") + what + ": " + std::generic_category().message(error));
}

/// A child with a copy-on-write snapshot of this process's memory, which does nothing but wait to be killed.
class Snapshot {
public:
  static Result<Snapshot> take() {
    // With signals blocked, none of this program's handlers can run in the child.
    sigset_t all{};
    sigset_t before{};
    sigfillset(&all);
    if (const int error = pthread_sigmask(SIG_SETMASK, &all, &before); error != 0)
      return failure("pthread_sigmask", error);
    const pid_t parent = getpid();
    const auto child = static_cast<pid_t>(syscall(SYS_fork));
    if (child == 0) wait_for_death(parent);
    const int error = errno;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (child < 0) return failure("fork", error);
    return Snapshot(child);
  }

  Snapshot(Snapshot&& other) noexcept : child_(std::exchange(other.child_, -1)) {}
  Snapshot& operator=(Snapshot&&) = delete;
  ~Snapshot() {
    if (child_ < 0) return;
    kill(child_, SIGKILL);
    while (waitpid(child_, nullptr, 0) < 0 && errno == EINTR) {
    }
  }

  [[nodiscard]] pid_t pid() const { return child_; }

private:
  explicit Snapshot(pid_t child) : child_(child) {}

  /// In the child of a process that may have many threads: system calls only, without the C library's locks or a
  /// sanitizer's interceptors.
  [[noreturn, clang::no_sanitize("address", "thread", "undefined")]] static void wait_for_death(pid_t parent) {
    syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    // The parent may have died before the line above.
    while (syscall(SYS_getppid) == parent)
      syscall(SYS_pause);
    syscall(SYS_exit_group, 0);
    __builtin_unreachable();
  }

  pid_t child_;
};

Result<void> read_process(pid_t pid, const void* host, std::span<std::byte> into) {
  std::size_t done = 0;
  while (done < into.size()) {
    const iovec local{into.data() + done, into.size() - done};
    // Only an address for the kernel, never written through.
    const iovec remote{const_cast<std::byte*>(static_cast<const std::byte*>(host)) + done, into.size() - done};
    const ssize_t count = process_vm_readv(pid, &local, 1, &remote, 1, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EPERM)
      return failure("process_vm_readv (kernel.yama.ptrace_scope is to be 0 or 1)", EPERM);
    if (count < 0) return failure("process_vm_readv", errno);
    if (count == 0) return failure("process_vm_readv", EFAULT);
    done += static_cast<std::size_t>(count);
  }
  return {};
}

Result<void> read_file(int fd, std::uint64_t offset, std::span<std::byte> into) {
  std::size_t done = 0;
  while (done < into.size()) {
    const ssize_t count = pread(fd, into.data() + done, into.size() - done, static_cast<off_t>(offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return failure("pread", errno);
    if (count == 0) return std::unexpected("audit: pread: the file ends within the region");
    done += static_cast<std::size_t>(count);
  }
  return {};
}

/// Reads the pages that exist and leaves the others of `into` zero.
Result<void> read_present(const void* host, std::span<std::byte> into) {
  unsigned char present[chunk_pages];
  const std::size_t pages = into.size() / page_bytes;
  // mincore's parameter is not const, but it is an address to look up.
  if (mincore(const_cast<void*>(host), into.size(), present) != 0) return failure("mincore", errno);
  std::ranges::fill(into, std::byte{0});
  for (std::size_t page = 0; page < pages;) {
    std::size_t end = page;
    while (end < pages && (present[end] & 1) != 0)
      ++end;
    if (end == page) {
      ++page;
      continue;
    }
    const auto part = into.subspan(page * page_bytes, (end - page) * page_bytes);
    if (auto read = read_process(getpid(), static_cast<const std::byte*>(host) + page * page_bytes, part); !read)
      return read;
    page = end;
  }
  return {};
}

bool is_zero(const std::byte* page) {
  std::uint64_t any = 0;
  for (std::size_t at = 0; at < page_bytes; at += sizeof any) {
    std::uint64_t word;
    std::memcpy(&word, page + at, sizeof word);
    any |= word;
  }
  return any == 0;
}

struct Interval {
  std::uint64_t first;
  std::uint64_t end;
};

/// The reported pages as disjoint ascending intervals.
std::vector<Interval> normalized(std::span<const ReportedRange> reported) {
  std::vector<Interval> sorted;
  for (const auto& range : reported) {
    constexpr auto last = std::numeric_limits<std::uint64_t>::max();
    const std::uint64_t end = range.count > last - range.first ? last : range.first + range.count;
    if (end > range.first) sorted.push_back({range.first, end});
  }
  std::ranges::sort(sorted, {}, &Interval::first);
  std::vector<Interval> merged;
  for (const auto& interval : sorted) {
    if (!merged.empty() && interval.first <= merged.back().end)
      merged.back().end = std::max(merged.back().end, interval.end);
    else
      merged.push_back(interval);
  }
  return merged;
}

} // namespace

std::expected<AuditFigures, std::string> audit(std::span<const AuditedRegion> regions,
                                               std::span<const ReportedRange> reported, const std::stop_token& stop) {
  using Memory = AuditedRegion::Memory;
  const std::vector<Interval> intervals = normalized(reported);

  std::optional<Snapshot> snapshot;
  if (std::ranges::any_of(regions, [](const auto& region) { return region.memory == Memory::private_anonymous; })) {
    auto taken = Snapshot::take();
    if (!taken) return std::unexpected(std::move(taken.error()));
    snapshot.emplace(std::move(*taken));
  }

  const pid_t copy = snapshot ? snapshot->pid() : -1;

  AuditFigures figures;
  const auto buffer = std::make_unique<std::byte[]>(chunk_pages * page_bytes);
  for (const auto& region : regions) {
    auto next = std::ranges::lower_bound(intervals, region.first_page, {}, [](const Interval& i) { return i.end - 1; });
    for (std::uint64_t at = 0; at < region.page_count; at += chunk_pages) {
      if (stop.stop_requested()) return std::unexpected("audit: stopped");
      const std::uint64_t count = std::min(chunk_pages, region.page_count - at);
      const std::span bytes(buffer.get(), count * page_bytes);
      const void* host = static_cast<const std::byte*>(region.host) + at * page_bytes;
      Result<void> read;
      switch (region.memory) {
      case Memory::private_anonymous:
        read = read_process(copy, host, bytes);
        break;
      case Memory::shared_file:
        read = read_file(region.fd, region.fd_offset + at * page_bytes, bytes);
        break;
      case Memory::private_hugetlb:
        read = read_present(host, bytes);
        break;
      }
      if (!read) return std::unexpected(std::move(read.error()));

      for (std::uint64_t i = 0; i < count; ++i) {
        const std::uint64_t page = region.first_page + at + i;
        while (next != intervals.end() && next->end <= page)
          ++next;
        const bool was_reported = next != intervals.end() && next->first <= page;
        const bool zero = is_zero(bytes.data() + i * page_bytes);
        figures.data_pages += zero ? 0 : 1;
        figures.reported_pages += was_reported ? 1 : 0;
        figures.missed_zero_pages += zero && !was_reported ? 1 : 0;
        if (!zero && was_reported) {
          ++figures.unsound_pages;
          if (!figures.first_unsound_page) figures.first_unsound_page = page;
        }
      }
    }
    figures.ram_pages += region.page_count;
  }
  return figures;
}

} // namespace cppvmm::boot
