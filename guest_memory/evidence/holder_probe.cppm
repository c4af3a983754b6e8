module;
#include <cstdint>
#include <optional>
module cppvmm.guest_memory:holder_probe;
import :book_files;
import :descriptor;
import :proc_maps;

namespace cppvmm {

/// Asks whether any userfaultfd holds a mapping, without a change to it: a registration for missing pages over the
/// mapping and all up to a page behind it that can't be registered. The kernel looks at one mapping after the other
/// before it registers any (Linux fs/userfaultfd.c, userfaultfd_register): EBUSY for one that another userfaultfd
/// holds, in whatever mode; EPERM or EINVAL for one that can't be registered. To be used by one thread.
class HolderProbe {
public:
  /// Whether nobody holds the mapping, which is of anonymous, tmpfs or hugetlb memory that can be written; false too
  /// where that can't be told. `ends_at_guard_file`: what is right behind it is of a guard_file. Good for nothing until
  /// `was_heard`.
  [[nodiscard]] bool is_free(const ListedMapping& mapping, bool ends_at_guard_file);
  /// Whether it was the kernel that answered all the questions so far, and not a filter of system calls (seccomp),
  /// which may refuse them with the same errno. To be asked when all have been: a filter that is there stays.
  [[nodiscard]] bool was_heard() const;

private:
  [[nodiscard]] bool is_free_up_to_vdso(const ListedMapping& mapping);

  /// Each of these questions walks over the mappings up to a library's or the vdso, others' too.
  static constexpr int most_far_questions = 32;
  int far_questions_ = 0;
  bool is_heard_ = true; ///< By what has been closed since.

  std::optional<BookFile> shared_;
  std::optional<Descriptor> own_;
  std::optional<std::uint64_t> vdso_; ///< Where its first page begins; 0 where it is not known.
};

} // namespace cppvmm
