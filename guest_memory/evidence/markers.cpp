module;
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <linux/userfaultfd.h>
#include <optional>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>
module cppvmm.guest_memory:markers.impl;
import :address;
import :book_files;
import :descriptor;
import :evidence;
import :markers;
import :page_evidence;
import :unmap;

namespace cppvmm {

/// A page of memory without anything in it.
class ScratchPage {
public:
  ScratchPage() = default;
  ScratchPage(const ScratchPage&) = delete;
  ScratchPage& operator=(const ScratchPage&) = delete;
  ~ScratchPage() {
    if (is_mapped()) unmap(page_, page_size);
  }
  [[nodiscard]] bool is_mapped() const { return page_ != MAP_FAILED; }
  [[nodiscard]] std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(page_); }

private:
  void* page_ = mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
};

static std::optional<std::uint64_t> entry_of(int pagemap, std::uint64_t address) {
  std::uint64_t entry = 0;
  const auto offset = static_cast<off_t>(address / page_size * sizeof entry);
  ssize_t got = 0;
  do
    got = pread(pagemap, &entry, sizeof entry, offset);
  while (got < 0 && errno == EINTR);
  return got == sizeof entry ? std::optional(entry) : std::nullopt;
}

static std::optional<std::uint64_t> make_marker(int pagemap) {
  constexpr std::uint64_t wp_unpopulated = 1 << 13; // UFFD_FEATURE_WP_UNPOPULATED, which older headers lack
  constexpr std::uint64_t type_and_offset = (std::uint64_t{1} << 55) - 1;
  const ScratchPage page;
  const Descriptor userfaultfd = open_userfaultfd();
  if (!page.is_mapped() || !userfaultfd.is_open()) return std::nullopt;
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = wp_unpopulated;
  uffdio_register request{};
  request.range = {.start = page.address(), .len = page_size};
  request.mode = UFFDIO_REGISTER_MODE_WP;
  uffdio_writeprotect protect{};
  protect.range = request.range;
  protect.mode = UFFDIO_WRITEPROTECT_MODE_WP;
  if (ioctl(userfaultfd.number(), UFFDIO_API, &api) != 0 ||
      ioctl(userfaultfd.number(), UFFDIO_REGISTER, &request) != 0 ||
      ioctl(userfaultfd.number(), UFFDIO_WRITEPROTECT, &protect) != 0)
    return std::nullopt;
  const auto entry = entry_of(pagemap, page.address());
  // To those without privilege, all that is not present looks the same.
  if (!entry || (*entry & pagemap_present) != 0 || (*entry & pagemap_swapped) == 0 ||
      (*entry & pagemap_write_protected) == 0 || (*entry & type_and_offset) == 0)
    return std::nullopt;
  return entry;
}

std::optional<std::uint64_t> write_protect_marker(int pagemap) {
  // The same for all of this kernel, and as it always has a type: matched by nothing that is shown to who may not know.
  static std::atomic<std::uint64_t> known = 0;
  std::uint64_t marker = known.load(std::memory_order_relaxed);
  if (marker == 0) {
    const auto made = make_marker(pagemap);
    if (!made) return std::nullopt;
    marker = *made;
    known.store(marker, std::memory_order_relaxed);
  }
  return marker;
}

} // namespace cppvmm
