module;
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <expected>
#include <linux/userfaultfd.h>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <sys/ioctl.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:write_watch.impl;
import :address;
import :backing;
import :book_files;
import :descriptor;
import :error;
import :evidence;
import :memory_id;
import :page_evidence;
import :region;
import :userfault;
import :write_record;

namespace cppvmm {

static std::unexpected<MemoryError> refuse(MemoryErrc code, const Region& region, const char* operation, int os_error) {
  return std::unexpected(MemoryError{.code = code,
                                     .address = region.start().value(),
                                     .length = region.bytes(),
                                     .os_error = os_error,
                                     .operation = operation});
}

/// Protects (or ends that, without the mode) in steps, so that no single call holds the address space's lock for long.
static int protect(int descriptor, std::uint64_t start, std::uint64_t bytes,
                   std::uint64_t mode = UFFDIO_WRITEPROTECT_MODE_WP) {
  constexpr std::uint64_t step = std::uint64_t{1} << 30;
  for (std::uint64_t done = 0; done < bytes;) {
    uffdio_writeprotect request{};
    request.range = {.start = start + done, .len = std::min(step, bytes - done)};
    request.mode = mode;
    if (ioctl(descriptor, UFFDIO_WRITEPROTECT, &request) != 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      return errno;
    }
    done += request.range.len;
  }
  return 0;
}

MemoryResult<std::unique_ptr<WriteWatch>> WriteWatch::arm(const Region& region, std::span<const Extent> pages) {
  // Asynchronous write protection has no handler: the kernel resolves its own faults too, and needs no privilege.
  Descriptor own = open_userfaultfd();
  if (!own.is_open())
    return refuse(errno == ENOSYS ? MemoryErrc::unavailable : MemoryErrc::os, region, "userfaultfd", errno);
  const int descriptor = own.number();
  std::unique_ptr<WriteWatch> watch(new WriteWatch(region, std::move(own)));
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = userfault_wp_async | userfault_wp_hugetlbfs_shmem;
  if (ioctl(descriptor, UFFDIO_API, &api) != 0)
    return refuse(errno == EINVAL ? MemoryErrc::unavailable : MemoryErrc::os, region,
                  "asynchronous write protection by userfaultfd (Linux 6.7)", errno);
  const auto start = reinterpret_cast<std::uintptr_t>(region.host_address());
  uffdio_register request{};
  request.range = {.start = start, .len = region.bytes()};
  request.mode = UFFDIO_REGISTER_MODE_WP;
  const int refused = [&] {
    // A survey may have it registered just now.
    const auto turn = userfault_turn();
    return ioctl(descriptor, UFFDIO_REGISTER, &request) == 0 ? 0 : errno;
  }();
  if (refused != 0)
    return refuse(refused == EBUSY ? MemoryErrc::invalid_argument : MemoryErrc::os, region,
                  "UFFDIO_REGISTER of memory to watch", refused);
  watch->is_registered_ = true;
  for (const Extent& extent : pages)
    if (const int error = protect(descriptor, start + extent.first * page_size, extent.count * page_size))
      return refuse(MemoryErrc::os, region, "UFFDIO_WRITEPROTECT of memory to watch", error);
  return watch;
}

void WriteWatch::end() {
  // In a forked child, the descriptor is of the parent's memory, and the lock may be held by a thread of the parent's.
  if (memory_ != 0 && memory_id() != memory_) return;
  // A survey of shared huge pages may look them up under this registration.
  const auto turn = userfault_turn();
  const std::lock_guard lock(ending_);
  // Closing alone ends nothing while a forked child has the descriptor too, and leaves pages protected before Linux
  // 6.10. Where it fails, closing is what is left. And memory that is another's to watch or to fill must stay so:
  // before Linux 6.17, any userfaultfd could unregister it.
  if (is_registered_ && memory_ != 0) {
    uffdio_range range{.start = reinterpret_cast<std::uintptr_t>(region_.host_address()), .len = region_.bytes()};
    static_cast<void>(ioctl(descriptor_.number(), UFFDIO_UNREGISTER, &range));
  }
  is_registered_ = false;
  descriptor_ = Descriptor();
}

void WriteWatch::forget(PageRange pages) const {
  if (!traits_of(region_.backing()).is_hugetlb) return;
  const std::shared_lock lock(ending_);
  if (!is_registered_) return;
  const auto host = reinterpret_cast<std::uintptr_t>(region_.host_address());
  const std::uint64_t from = host + (pages.first().value() - region_.pages().first().value()) * page_size;
  const std::uint64_t to = from + pages.bytes();
  // Whole huge pages are what was discarded, and what the call takes: which size they are of, it says by refusing.
  for (const HugePageSize size : {HugePageSize::two_mib, HugePageSize::one_gib}) {
    const auto unit = static_cast<std::uint64_t>(size);
    const std::uint64_t first = (from + unit - 1) / unit * unit;
    const std::uint64_t end = to / unit * unit;
    // What stays protected makes the answer smaller, no more.
    if (first >= end || protect(descriptor_.number(), first, end - first, 0) == 0) return;
  }
}

MemoryResult<std::vector<ExtentList>> WriteWatch::may_hold_data() const {
  const std::shared_lock lock(ending_);
  // The memory may have another watch by now, which knows nothing of what was written under this one.
  if (!is_registered_) return refuse(MemoryErrc::unavailable, region_, "a write watch that was disarmed meanwhile", 0);
  auto written = written_pages(region_.host_address(), region_.bytes());
  if (!written) return std::unexpected(written.error());
  std::vector<ExtentList> lists;
  lists.push_back(std::move(*written));
  lists.push_back(baseline_);
  return lists;
}

} // namespace cppvmm
