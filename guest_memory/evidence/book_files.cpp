module;
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>
#include <vector>
module cppvmm.guest_memory:book_files.impl;
import :address;
import :book_files;
import :descriptor;
import :unmap;

namespace cppvmm {

MemoryToken::MemoryToken()
    : page_(mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
  if (page_ == MAP_FAILED || madvise(page_, page_size, MADV_WIPEONFORK) != 0) {
    error_ = errno;
    return;
  }
  *static_cast<volatile char*>(page_) = 1;
}

MemoryToken::~MemoryToken() {
  if (page_ != MAP_FAILED) unmap(page_, page_size);
}

bool MemoryToken::is_of_this_memory() const { return error_ == 0 && *static_cast<const volatile char*>(page_) == 1; }

KeptFile::KeptFile(Descriptor file) : file_(std::move(file)) {
  struct stat status{};
  if (!file_.is_open() || fstat(file_.number(), &status) != 0) return;
  device_ = status.st_dev;
  inode_ = status.st_ino;
}

KeptFile& KeptFile::operator=(KeptFile&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(inode_, other.inode_);
  std::swap(file_, other.file_);
  return *this;
}

KeptFile::~KeptFile() {
  if (number() < 0) static_cast<void>(file_.release());
}

int KeptFile::number() const {
  struct stat status{};
  const bool is_the_same =
      file_.is_open() && fstat(file_.number(), &status) == 0 && is_of(status.st_dev, status.st_ino);
  return is_the_same ? file_.number() : -1;
}

static std::mutex keeping;
static std::shared_ptr<const BookSet> kept_set;

static std::unique_lock<std::mutex> lock_kept() {
  // A child of fork has a copy of the lock, and none of the thread that may hold it.
  [[maybe_unused]] static const int registered =
      pthread_atfork([] { keeping.lock(); }, [] { keeping.unlock(); }, [] { keeping.unlock(); });
  return std::unique_lock(keeping);
}

void prepare_books_for_fork() { static_cast<void>(lock_kept()); }

bool keep(std::shared_ptr<const BookSet> set) {
  const auto lock = lock_kept();
  if (kept_set && kept_set->token.is_of_this_memory()) return false;
  // A parent's goes after the lock.
  kept_set.swap(set);
  return true;
}

void end_keeping(const BookSet* set) {
  std::shared_ptr<const BookSet> ended;
  const auto lock = lock_kept();
  if (set != nullptr && kept_set.get() == set) ended.swap(kept_set);
}

/// Whoever has it, parent or child.
static std::shared_ptr<const BookSet> any_kept() {
  const auto lock = lock_kept();
  return kept_set;
}

static std::shared_ptr<const BookSet> kept() {
  auto set = any_kept();
  if (set && !set->token.is_of_this_memory()) set.reset();
  return set;
}

std::ptrdiff_t BookText::read(char* into, std::size_t size) {
  for (;;) {
    const ssize_t got = pread(file_.number(), into, size, at_);
    if (got < 0 && errno == EINTR) continue;
    if (got > 0) at_ += got;
    return got;
  }
}

static Descriptor open_for_reading(const char* path) { return Descriptor(open(path, O_RDONLY | O_CLOEXEC)); }

/// The kept one, or one that `open` opens.
template <class Open>
static BookFile open_file(KeptFile BookSet::* file, Open open) {
  if (auto set = kept())
    if (const int number = ((*set).*file).number(); number >= 0) return {std::move(set), number};
  return BookFile(open());
}

BookFile open_page_tables() {
  return open_file(&BookSet::page_tables, [] { return open_for_reading("/proc/self/pagemap"); });
}
BookFile open_mapping_list() {
  return open_file(&BookSet::mapping_list, [] { return open_for_reading("/proc/self/maps"); });
}
BookFile open_probe() { return open_file(&BookSet::probe, make_probe); }

static BookText open_text(KeptFile BookSet::* file, const char* path) {
  if (auto set = kept())
    if (const int number = ((*set).*file).number(); number >= 0) {
      std::mutex& reading = set->reading;
      return {BookFile(std::move(set), number), reading};
    }
  return BookText(BookFile(open_for_reading(path)));
}

BookText open_mappings() { return open_text(&BookSet::mappings, "/proc/self/smaps"); }
BookText open_mapping_list_text() { return open_text(&BookSet::mapping_list, "/proc/self/maps"); }
BookText open_counts() { return open_text(&BookSet::counts, "/proc/thread-self/status"); }

BookFile open_shared_memory(std::uint64_t start, std::uint64_t end, std::uint64_t device, std::uint64_t inode) {
  auto set = kept();
  char path[96];
  const int folder = set ? set->shared_memory.number() : -1;
  std::snprintf(path, sizeof path, "%s%llx-%llx", folder >= 0 ? "" : "/proc/self/map_files/",
                static_cast<unsigned long long>(start), static_cast<unsigned long long>(end));
  Descriptor own(openat(folder >= 0 ? folder : AT_FDCWD, path, O_RDONLY | O_CLOEXEC));
  if (own.is_open() || !set) return BookFile(std::move(own));
  const int refused = errno;
  const auto file =
      std::ranges::find_if(set->shared_files, [&](const KeptFile& shared) { return shared.is_of(device, inode); });
  if (file != set->shared_files.end())
    if (const int number = file->number(); number >= 0) return {std::move(set), number};
  errno = refused;
  return BookFile(Descriptor());
}

Descriptor open_again(int descriptor, int flags) {
  const auto set = kept();
  char path[64];
  const int folder = set ? set->descriptors.number() : -1;
  std::snprintf(path, sizeof path, "%s%d", folder >= 0 ? "" : "/proc/self/fd/", descriptor);
  return Descriptor(openat(folder >= 0 ? folder : AT_FDCWD, path, flags));
}

Descriptor open_userfaultfd() {
  constexpr int flags = O_CLOEXEC | O_NONBLOCK | 1; // UFFD_USER_MODE_ONLY
  constexpr unsigned long make_one = _IO(0xAA, 0);  // USERFAULTFD_IOC_NEW (include/uapi/linux/userfaultfd.h, Linux 6.1)
  // The device is nobody's: what it makes is of the memory of who asks.
  if (const auto set = any_kept())
    if (const int device = set->userfaultfd.number(); device >= 0) return Descriptor(ioctl(device, make_one, flags));
  Descriptor own(static_cast<int>(syscall(SYS_userfaultfd, flags)));
  if (own.is_open()) return own;
  const int refused = errno;
  if (const Descriptor device(open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)); device.is_open())
    own = Descriptor(ioctl(device.number(), make_one, flags));
  errno = refused;
  return own;
}

Descriptor make_probe() {
  Descriptor own = open_userfaultfd();
  if (!own.is_open()) return own;
  uffdio_api api{};
  api.api = UFFD_API;
  if (ioctl(own.number(), UFFDIO_API, &api) != 0) return {};
  return own;
}

} // namespace cppvmm
