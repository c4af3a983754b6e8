#include "machine_facts.hpp"

#include "descriptor.hpp"
#include "kernel_files.hpp"
#include "locked_memory.hpp"
#include "swap.hpp"
#include "temporary_file.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <initializer_list>
#include <linux/kvm.h>
#include <linux/magic.h>
#include <linux/membarrier.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <system_error>
#include <unistd.h>
#include <vector>

namespace cppvmm::test {
namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t huge = std::size_t{2} << 20;

// What the headers of older distributions lack. include/uapi/asm-generic/mman-common.h: Linux 5.4, 5.14, 5.18 and 6.1.
constexpr int madv_pageout = 21;
constexpr int madv_populate_read = 22;
constexpr int madv_populate_write = 23;
constexpr int madv_dontneed_locked = 24;
constexpr int madv_collapse = 25;
constexpr int hugetlb_2m = 21 << 26;                   // MAP_HUGE_2MB
constexpr long cachestat_call = 451;                   // Linux 6.5
constexpr int uffd_user_mode_only = 1;                 // include/uapi/linux/userfaultfd.h, Linux 5.11
constexpr std::uint64_t uffd_wp_file_memory = 1 << 12; // UFFD_FEATURE_WP_HUGETLBFS_SHMEM, 5.19
constexpr std::uint64_t uffd_wp_async = 1 << 15;       // UFFD_FEATURE_WP_ASYNC, 6.7

// include/uapi/linux/fs.h, Linux 6.7.
struct ScannedPages {
  std::uint64_t start, end, categories;
};
struct ScanRequest {
  std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  std::uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
static_assert(sizeof(ScanRequest) == 96 && sizeof(ScannedPages) == 24);
constexpr unsigned long scan_request = _IOWR('f', 16, ScanRequest);
constexpr std::uint64_t is_written = 1 << 1;
constexpr std::uint64_t is_present = 1 << 3;
constexpr std::uint64_t is_swapped = 1 << 4;
constexpr std::uint64_t is_zero_page = 1 << 5;
constexpr std::uint64_t check_wp_async = 1 << 1;

// KVM_GET_SUPPORTED_HV_CPUID: in C++, some headers' struct kvm_cpuid2 has another size, and with it the request.
constexpr std::size_t cpuid_head = 2 * sizeof(std::uint32_t); // nent, padding, and then the entries
constexpr unsigned long supported_hv_cpuid = _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0xc1, cpuid_head);

/// A mapping on a border of 2 MiB, with nothing beside it that the kernel could join it with.
class Mapping {
public:
  explicit Mapping(std::size_t bytes, int flags = MAP_PRIVATE | MAP_ANONYMOUS, int file = -1)
      : bytes_(bytes), space_bytes_(bytes + 2 * huge) {
    void* const space = mmap(nullptr, space_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return;
    space_ = static_cast<std::byte*>(space);
    const std::size_t inside = huge - reinterpret_cast<std::uintptr_t>(space_) % huge;
    void* const mapped = mmap(space_ + inside, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, file, 0);
    if (mapped != MAP_FAILED) start_ = static_cast<std::byte*>(mapped);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (space_ != nullptr) munmap(space_, space_bytes_);
  }

  [[nodiscard]] bool exists() const { return start_ != nullptr; }
  [[nodiscard]] std::byte* start() const { return start_; }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  [[nodiscard]] bool advise(int advice) const { return exists() && madvise(start_, bytes_, advice) == 0; }
  void store(std::size_t number) const { *static_cast<volatile std::byte*>(start_ + number * page) = std::byte{1}; }
  [[nodiscard]] std::byte load(std::size_t number) const {
    return *static_cast<volatile std::byte*>(start_ + number * page);
  }

private:
  std::byte* space_ = nullptr;
  std::byte* start_ = nullptr;
  std::size_t bytes_;
  std::size_t space_bytes_;
};

using Pages = std::vector<std::size_t>;

/// The pages of a mapping that PAGEMAP_SCAN finds; nothing where it cannot be asked so.
std::optional<Pages> scan(const Mapping& mapping, std::uint64_t none_of, std::uint64_t any_of,
                          std::uint64_t flags = 0) {
  const Descriptor pagemap(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  std::array<ScannedPages, 512> found;
  ScanRequest request{};
  const auto start = reinterpret_cast<std::uintptr_t>(mapping.start());
  request.size = sizeof request;
  request.flags = flags;
  request.start = start;
  request.end = start + mapping.bytes();
  request.vec = reinterpret_cast<std::uintptr_t>(found.data());
  request.vec_len = found.size();
  request.category_inverted = request.category_mask = none_of;
  request.category_anyof_mask = request.return_mask = any_of;
  const int count = pagemap.is_open() ? ioctl(pagemap.number(), scan_request, &request) : -1;
  if (count < 0) return std::nullopt;
  Pages pages;
  for (int i = 0; i < count; ++i)
    for (std::uint64_t at = found[static_cast<std::size_t>(i)].start; at < found[static_cast<std::size_t>(i)].end;
         at += page)
      pages.push_back((at - start) / page);
  return pages;
}

/// As a survey asks.
std::optional<Pages> touched_pages(const Mapping& mapping) {
  return scan(mapping, is_zero_page, is_present | is_swapped);
}

/// What /proc/self/pagemap has for each page; nothing where it cannot be read.
std::vector<std::uint64_t> entry_words(const Mapping& mapping) {
  const Descriptor pagemap(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  std::vector<std::uint64_t> words(mapping.bytes() / page);
  const std::size_t size = words.size() * sizeof(std::uint64_t);
  const auto from = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(mapping.start()) / page * 8);
  if (!pagemap.is_open() || pread(pagemap.number(), words.data(), size, from) != static_cast<ssize_t>(size)) return {};
  return words;
}

// Documentation/admin-guide/mm/pagemap.rst: bit 63, present; bit 62, swapped; below bit 55, the frame.
constexpr std::uint64_t frame_bits = (std::uint64_t{1} << 55) - 1;

/// How many pages have an entry in the page tables.
std::size_t entries(const Mapping& mapping) {
  const std::vector<std::uint64_t> words = entry_words(mapping);
  return static_cast<std::size_t>(std::ranges::count_if(words, [](std::uint64_t word) { return word >> 62 != 0; }));
}

/// The sum, in bytes, of what smaps says in `fields` of the mapping that `host` is in.
std::optional<std::uint64_t> smaps_bytes(const void* host, std::initializer_list<const char*> fields) {
  const auto wanted = reinterpret_cast<std::uintptr_t>(host);
  std::ifstream smaps("/proc/self/smaps");
  std::optional<std::uint64_t> sum;
  for (std::string line; std::getline(smaps, line);) {
    std::uintptr_t start = 0;
    std::uintptr_t end = 0;
    // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
    if (std::sscanf(line.c_str(), "%zx-%zx ", &start, &end) == 2) {
      if (sum) break;
      if (start <= wanted && wanted < end) sum = 0;
      continue;
    }
    unsigned long long kib = 0;
    for (const char* const field : fields) {
      const std::size_t length = std::strlen(field);
      // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
      if (sum && line.starts_with(field) && std::sscanf(line.c_str() + length, ": %llu", &kib) == 1) *sum += kib * 1024;
    }
  }
  return sum;
}

ReadOfAbsent read_of(const Mapping& mapping) {
  const auto resident = smaps_bytes(mapping.start(), {"Rss"});
  if (!resident || entries(mapping) == 0) return ReadOfAbsent::unknown;
  return *resident == 0 ? ReadOfAbsent::shared_zero_page : ReadOfAbsent::own_page;
}

void find_reads(MachineFacts& facts) {
  const Mapping written(16 * page);
  if (written.exists()) {
    static_cast<void>(written.advise(MADV_NOHUGEPAGE)); // refused where there are no huge pages
    written.store(3);
    facts.pagemap_scan = touched_pages(written) == Pages{3};
    // Shown to the same processes as the kind of an entry of no page (fs/proc/task_mmu.c, pte_to_pagemap_entry).
    facts.entry_kinds =
        std::ranges::any_of(entry_words(written), [](std::uint64_t word) { return (word & frame_bits) != 0; });
  }
  const Mapping small(16 * page);
  if (small.exists()) {
    static_cast<void>(small.advise(MADV_NOHUGEPAGE));
    for (const std::size_t number : {2U, 3U, 4U, 9U})
      static_cast<void>(small.load(number));
    facts.read_of_absent = read_of(small);
    facts.reads_told_apart = touched_pages(small) == Pages{};
  }
  const Mapping large(huge);
  if (large.advise(MADV_HUGEPAGE)) {
    static_cast<void>(large.load(5));
    facts.huge_read = read_of(large);
    facts.huge_read_pages = entries(large);
    facts.huge_reads_told_apart = touched_pages(large) == Pages{};
  }
}

/// The word in brackets.
std::string chosen(const std::string& text) {
  const std::size_t from = text.find('[');
  const std::size_t to = text.find(']');
  return from < to && to != std::string::npos ? text.substr(from + 1, to - from - 1) : "";
}

enum class Touch : std::uint8_t { store, store_to_advised, write };

/// How many pages a memfd of 2 MiB has after one of its pages was touched.
std::uint64_t pages_of_memfd(Touch touch) {
  const Descriptor file(memfd_create("cppvmm-test", MFD_CLOEXEC));
  if (!file.is_open() || ftruncate(file.number(), huge) != 0) return 0;
  const Mapping mapping(huge, MAP_SHARED, file.number());
  if (touch == Touch::write) {
    if (pwrite(file.number(), "x", 1, 100 * page) != 1) return 0;
  } else {
    if (!mapping.exists() || (touch == Touch::store_to_advised && !mapping.advise(MADV_HUGEPAGE))) return 0;
    mapping.store(100);
  }
  struct stat status{};
  return fstat(file.number(), &status) == 0 ? static_cast<std::uint64_t>(status.st_blocks) * 512 / page : 0;
}

void find_huge_pages(MachineFacts& facts) {
  facts.thp_policy = chosen(kernel_text("/sys/kernel/mm/transparent_hugepage/enabled"));
  facts.shmem_thp_policy = chosen(kernel_text("/sys/kernel/mm/transparent_hugepage/shmem_enabled"));
  const Mapping asking(huge);
  if (asking.advise(MADV_HUGEPAGE)) {
    asking.store(100);
    facts.gives_huge_pages = huge_page_bytes(asking.start()) == huge;
  }
  const Mapping silent(huge);
  if (silent.exists()) {
    silent.store(100);
    facts.pages_at_a_store = entries(silent);
  }
  facts.shmem_pages_at_a_store = pages_of_memfd(Touch::store);
  facts.shmem_pages_at_a_write = pages_of_memfd(Touch::write);
  facts.shmem_pages_asked = pages_of_memfd(Touch::store_to_advised);

  const Mapping small(huge);
  if (small.advise(MADV_NOHUGEPAGE)) {
    for (std::size_t number = 0; number < huge / page; ++number)
      small.store(number);
    facts.collapse =
        small.advise(MADV_HUGEPAGE) && small.advise(madv_collapse) && huge_page_bytes(small.start()) == huge;
  }
}

/// Of 16 pages, the first is written where `writes`; what `count` says of them.
template <class Count>
bool counts_the_page_written(Count count) {
  for (const bool writes : {false, true}) {
    const Descriptor file(memfd_create("cppvmm-test", MFD_CLOEXEC));
    if (!file.is_open() || ftruncate(file.number(), 16 * page) != 0) return false;
    if (writes && pwrite(file.number(), "x", 1, 0) != 1) return false;
    const std::optional<std::uint64_t> counted = count(file.number());
    if (!counted || (*counted > 0) != writes) return false;
  }
  return true;
}

void find_page_cache(MachineFacts& facts) {
  facts.cachestat = counts_the_page_written([](int file) -> std::optional<std::uint64_t> {
    std::array<std::uint64_t, 2> range = {0, 16 * page}; // struct cachestat_range: off, len
    std::array<std::uint64_t, 5> counts{};               // struct cachestat: nr_cache first
    if (syscall(cachestat_call, file, range.data(), counts.data(), 0) != 0) return std::nullopt;
    return counts[0];
  });
  facts.mincore = counts_the_page_written([](int file) -> std::optional<std::uint64_t> {
    const Mapping mapping(16 * page, MAP_SHARED, file);
    std::array<unsigned char, 16> resident{};
    if (!mapping.exists() || mincore(mapping.start(), mapping.bytes(), resident.data()) != 0) return std::nullopt;
    return std::ranges::count_if(resident, [](unsigned char byte) { return (byte & 1) != 0; });
  });
  const Mapping shared(page, MAP_SHARED | MAP_ANONYMOUS);
  if (!shared.exists()) return;
  char path[96];
  const auto at = reinterpret_cast<std::uintptr_t>(shared.start());
  std::snprintf(path, sizeof path, "/proc/self/map_files/%zx-%zx", at, at + page);
  facts.map_files = Descriptor(open(path, O_RDONLY | O_CLOEXEC)).is_open();
}

void find_advice(MachineFacts& facts) {
  const Mapping read(4 * page);
  facts.populate_read = read.advise(madv_populate_read) && entries(read) == 4;
  const Mapping write(4 * page);
  facts.populate_write = write.advise(madv_populate_write) && entries(write) == 4;
  const Mapping locked(page);
  if (locked.exists()) {
    locked.store(0);
    static_cast<void>(lock_memory(locked.start(), page)); // a limit may forbid it, and the advice is known all the same
    facts.dontneed_locked = locked.advise(madv_dontneed_locked) && locked.load(0) == std::byte{0};
  }
  // Takes none of the pool: it is mapped without a reservation, and never touched.
  const Mapping pool(huge, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | hugetlb_2m | MAP_NORESERVE);
  facts.hugetlb_dontneed = pool.advise(MADV_DONTNEED);
  const Mapping cold(page);
  facts.page_out = cold.advise(madv_pageout);
  facts.mergeable = cold.advise(MADV_MERGEABLE);
  facts.ksm = kernel_number("/sys/kernel/mm/ksm/run");
}

void find_userfaultfd(MachineFacts& facts) {
  const auto make = [](std::uint64_t features) {
    Descriptor made(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | uffd_user_mode_only)));
    uffdio_api api{.api = UFFD_API, .features = features, .ioctls = 0};
    if (made.is_open() && ioctl(made.number(), UFFDIO_API, &api) != 0) return Descriptor();
    return made;
  };
  facts.userfaultfd = make(0).is_open();
  const Mapping mapping(4 * page);
  const Descriptor watch = make(uffd_wp_async | uffd_wp_file_memory);
  if (!watch.is_open() || !mapping.exists()) return;
  for (const std::size_t number : {0U, 1U, 2U, 3U})
    mapping.store(number);
  const uffdio_range range{.start = reinterpret_cast<std::uintptr_t>(mapping.start()), .len = mapping.bytes()};
  uffdio_register wanted{.range = range, .mode = UFFDIO_REGISTER_MODE_WP, .ioctls = 0};
  uffdio_writeprotect protect{.range = range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
  if (ioctl(watch.number(), UFFDIO_REGISTER, &wanted) != 0 || ioctl(watch.number(), UFFDIO_WRITEPROTECT, &protect) != 0)
    return;
  mapping.store(2);
  facts.async_write_protect = scan(mapping, is_written, is_present | is_swapped, check_wp_async) == Pages{0, 1, 3};
}

bool is_writable(const std::string& path) { return Descriptor(open(path.c_str(), O_WRONLY | O_CLOEXEC)).is_open(); }

HugePoolFacts huge_pool(const char* size) {
  const std::string folder = std::string("/sys/kernel/mm/hugepages/hugepages-") + size;
  return {.pages = kernel_number(folder + "/nr_hugepages"),
          .free = kernel_number(folder + "/free_hugepages"),
          .is_writable = is_writable(folder + "/nr_hugepages")};
}

std::string because(const char* what) { return std::string(what) + ": " + std::generic_category().message(errno); }

/// KVM's device, or why there is none.
Descriptor open_kvm(std::string& why) {
  Descriptor kvm(open("/dev/kvm", O_RDWR | O_CLOEXEC));
  if (!kvm.is_open()) {
    why = because("/dev/kvm");
    return kvm;
  }
  const int version = ioctl(kvm.number(), KVM_GET_API_VERSION, 0);
  if (version == 12) return kvm;
  why = version < 0 ? because("/dev/kvm is not KVM's device")
                    : "/dev/kvm has interface " + std::to_string(version) + ", not 12";
  return Descriptor();
}

void find_kvm(MachineFacts& facts) {
  const Descriptor kvm = open_kvm(facts.kvm_missing);
  if (!kvm.is_open()) return;
  facts.kvm_hyperv = ioctl(kvm.number(), KVM_CHECK_EXTENSION, KVM_CAP_HYPERV_CPUID) > 0;
  if (ioctl(kvm.number(), KVM_CHECK_EXTENSION, KVM_CAP_SYS_HYPERV_CPUID) <= 0) return;
  constexpr std::uint32_t most = 64;
  std::vector<std::byte> room(cpuid_head + most * sizeof(kvm_cpuid_entry2));
  std::uint32_t count = most;
  std::memcpy(room.data(), &count, sizeof count);
  if (ioctl(kvm.number(), supported_hv_cpuid, room.data()) != 0) return;
  std::memcpy(&count, room.data(), sizeof count);
  for (std::uint32_t i = 0; i < std::min(count, most); ++i) {
    kvm_cpuid_entry2 entry{};
    std::memcpy(&entry, room.data() + cpuid_head + i * sizeof entry, sizeof entry);
    if (entry.function == 0x4000'0003) facts.kvm_forwards = (entry.ebx >> 20 & 1) != 0;
  }
}

MachineFacts find_facts() {
  MachineFacts facts;
  utsname name{};
  if (uname(&name) == 0) facts.kernel = name.release;
  facts.is_root = geteuid() == 0;
  find_reads(facts);
  find_huge_pages(facts);
  find_page_cache(facts);
  find_advice(facts);
  facts.membarrier = syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) == 0;
  find_userfaultfd(facts);
  facts.has_swap = has_swap();
  facts.zram = access("/sys/class/zram-control/hot_add", R_OK) == 0; // reading it would make one
  facts.compaction = is_writable("/proc/sys/vm/compact_memory");
  facts.huge_pool_2m = huge_pool("2048kB");
  facts.huge_pool_1g = huge_pool("1048576kB");
  facts.files = file_facts(temporary_folder());
  find_kvm(facts);
  return facts;
}

/// By the number of a file system.
bool pages_are_known(long type) {
  utsname kernel{};
  unsigned major_number = 0;
  unsigned minor_number = 0;
  switch (type) {
  case TMPFS_MAGIC:
  case EXT4_SUPER_MAGIC:
    return true;
  case XFS_SUPER_MAGIC:
    // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
    return uname(&kernel) == 0 && std::sscanf(kernel.release, "%u.%u", &major_number, &minor_number) == 2 &&
           (major_number > 6 || (major_number == 6 && minor_number >= 9));
  default:
    return false;
  }
}

/// Whether /proc/self/maps names the file as fstat does.
bool is_named_by_fstat(int file, const struct stat& status) {
  const Mapping mapping(page, MAP_SHARED, file);
  std::ifstream maps("/proc/self/maps");
  for (std::string line; mapping.exists() && std::getline(maps, line);) {
    std::uintptr_t start = 0;
    std::uintptr_t end = 0;
    unsigned major_number = 0;
    unsigned minor_number = 0;
    unsigned long inode = 0;
    // NOLINTNEXTLINE(cert-err34-c): the kernel's own words
    if (std::sscanf(line.c_str(), "%zx-%zx %*s %*x %x:%x %lu", &start, &end, &major_number, &minor_number, &inode) ==
            5 &&
        start == reinterpret_cast<std::uintptr_t>(mapping.start()))
      return inode == status.st_ino && makedev(major_number, minor_number) == status.st_dev;
  }
  return false;
}

} // namespace

const MachineFacts& machine_facts() {
  static const MachineFacts facts = find_facts();
  return facts;
}

FileFacts file_facts(const std::string& folder) {
  const auto made = temporary_file(folder);
  if (!made) return {};
  const Descriptor file(*made);
  return ftruncate(file.number(), 1 << 20) == 0 ? file_facts(file.number()) : FileFacts{};
}

FileFacts file_facts(int file) {
  FileFacts facts;
  struct stat status{};
  struct statfs system{};
  if (fstat(file, &status) != 0 || fstatfs(file, &system) != 0) return facts;
  const auto empty = [&] { return ftruncate(file, 0) == 0 && ftruncate(file, status.st_size) == 0; };
  constexpr off_t somewhere = 1 << 19;
  if (!empty() || pwrite(file, "x", 1, somewhere) != 1 || fsync(file) != 0) return facts;
  facts.in_memory = system.f_type == TMPFS_MAGIC;
  facts.pages_are_known = pages_are_known(system.f_type);
  facts.block_bytes = static_cast<std::uint64_t>(status.st_blksize);
  const off_t hole = lseek(file, 0, SEEK_HOLE);
  const off_t data = lseek(file, 0, SEEK_DATA);
  facts.tell_holes = hole == 0 && data > 0;
  if (facts.tell_holes) facts.data_bytes = static_cast<std::uint64_t>(lseek(file, data, SEEK_HOLE) - data);
  facts.named_by_fstat = is_named_by_fstat(file, status);
  {
    const Mapping mapping(page, MAP_SHARED, file);
    if (!mapping.exists()) return facts;
    static_cast<void>(mapping.load(0));
    facts.reads_make_data = facts.tell_holes && lseek(file, 0, SEEK_DATA) == 0;
  }
  facts.can_be_made = empty();
  return facts;
}

std::string kvm_missing() {
  std::string why;
  static_cast<void>(open_kvm(why));
  return why;
}

std::optional<std::uint64_t> huge_page_bytes(const void* host) {
  return smaps_bytes(host, {"AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"});
}

} // namespace cppvmm::test
