module;
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>
module cppvmm.guest_memory:book_files;
import :descriptor;

namespace cppvmm {

/// A page of this process's memory that a forked child finds wiped (MADV_WIPEONFORK, Linux 4.14), however it was
/// forked; threads and vfork, which share the memory, find it as it was.
class MemoryToken {
public:
  MemoryToken();
  MemoryToken(const MemoryToken&) = delete;
  MemoryToken& operator=(const MemoryToken&) = delete;
  ~MemoryToken();

  /// 0, or errno: why there is none.
  [[nodiscard]] int error() const { return error_; }
  /// Whether this is still the memory that it was made in.
  [[nodiscard]] bool is_of_this_memory() const;

private:
  void* page_;
  int error_ = 0;
};

/// A file that stays open, and is known again: a jailer may close all descriptors that it does not know, and then their
/// numbers are other files'.
class KeptFile {
public:
  KeptFile() = default;
  explicit KeptFile(Descriptor file);
  KeptFile(KeptFile&& other) noexcept = default;
  KeptFile& operator=(KeptFile&& other) noexcept;
  /// What is another file's by now stays open.
  ~KeptFile();

  /// The number, -1 where there is none, or none of that file any more.
  [[nodiscard]] int number() const;
  [[nodiscard]] bool is_of(std::uint64_t device, std::uint64_t inode) const {
    return device_ == device && inode_ == inode;
  }
  [[nodiscard]] bool is_same_file(const KeptFile& other) const { return is_of(other.device_, other.inode_); }

private:
  std::uint64_t device_ = 0;
  std::uint64_t inode_ = 0;
  Descriptor file_;
};

/// What KernelBooks keeps open; any may be closed.
struct BookSet {
  KeptFile page_tables;               ///< /proc/self/pagemap
  KeptFile mappings;                  ///< /proc/self/smaps
  KeptFile counts;                    ///< /proc/self/status
  KeptFile descriptors;               ///< /proc/self/fd
  KeptFile shared_memory;             ///< /proc/self/map_files
  KeptFile userfaultfd;               ///< /dev/userfaultfd
  KeptFile mapping_list;              ///< /proc/self/maps
  KeptFile probe;                     ///< What open_probe gives.
  std::vector<KeptFile> shared_files; ///< Behind shared anonymous mappings.
  std::array<int, 7> errors{};        ///< By KernelBook: why it is closed, errno.
  /// An open file of text has one place that it is read at, and what is read from the start again is made anew.
  mutable std::mutex reading;
  MemoryToken token;
};

/// The set that everyone goes by from now on, unless there is one of this memory already: whether it was taken.
[[nodiscard]] bool keep(std::shared_ptr<const BookSet> set);
/// If it is kept.
void end_keeping(const BookSet* set);

/// A file of the kernel's: a kept one, or one of its own.
class BookFile {
public:
  explicit BookFile(Descriptor own) : own_(std::move(own)) {}
  BookFile(std::shared_ptr<const BookSet> kept, int number) : kept_(std::move(kept)), number_(number) {}

  [[nodiscard]] bool is_open() const { return number() >= 0; }
  [[nodiscard]] int number() const { return kept_ ? number_ : own_.number(); }

private:
  std::shared_ptr<const BookSet> kept_;
  int number_ = -1;
  Descriptor own_;
};

/// A file of text, from its beginning on. Whoever reads a kept one keeps all others waiting, so that none may be opened
/// by the same thread meanwhile.
class BookText {
public:
  explicit BookText(BookFile file) : file_(std::move(file)) {}
  BookText(BookFile file, std::mutex& reading) : file_(std::move(file)), turn_(reading) {}

  [[nodiscard]] bool is_open() const { return file_.is_open(); }
  /// Up to `size` bytes that come next: how many, 0 at the end, -1 with errno.
  [[nodiscard]] std::ptrdiff_t read(char* into, std::size_t size);

private:
  BookFile file_;
  std::unique_lock<std::mutex> turn_; // given back before the file
  std::int64_t at_ = 0;
};

// What could not be opened is closed, and errno says why. What is kept comes first, if it is of this process's memory:
// a forked child has its parent's descriptors, and they go on to show the parent's memory.

/// Has fork wait for the lock of what is kept; once. To be called before a lock that is taken before this one is
/// registered with fork.
void prepare_books_for_fork();

/// /proc/self/pagemap. It stays tied to the memory of who opened it, so it is opened for each look unless it is kept.
[[nodiscard]] BookFile open_page_tables();
/// /proc/self/smaps.
[[nodiscard]] BookText open_mappings();
/// /proc/self/maps, to ask for single mappings.
[[nodiscard]] BookFile open_mapping_list();
/// The same, to be read.
[[nodiscard]] BookText open_mapping_list_text();
/// /proc/thread-self/status: the first thread may have ended, and has no memory then. The kept one is the process's.
[[nodiscard]] BookText open_counts();
/// The file behind the shared anonymous mapping, for reading, by /proc/self/map_files.
[[nodiscard]] BookFile open_shared_memory(std::uint64_t start, std::uint64_t end, std::uint64_t device,
                                          std::uint64_t inode);
/// The file of the descriptor anew, by /proc/self/fd, with flags of open(2).
[[nodiscard]] Descriptor open_again(int descriptor, int flags);
/// A userfaultfd for faults in user mode, for which no privilege is needed (UFFD_USER_MODE_ONLY, Linux 5.11): by
/// /dev/userfaultfd (Linux 6.1) if that is kept, so that a process that may not call userfaultfd(2) does not; else by
/// that call; else by the device.
[[nodiscard]] Descriptor open_userfaultfd();

/// A userfaultfd that is ready to be asked for registrations, which are all to fail: it is used by everyone. One that
/// is not kept costs a walk over all mappings of the process when it is closed.
[[nodiscard]] BookFile open_probe();
/// The same, which is nobody else's.
[[nodiscard]] Descriptor make_probe();

} // namespace cppvmm
