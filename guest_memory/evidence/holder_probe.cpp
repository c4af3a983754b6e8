module;
#include <cerrno>
#include <cstdint>
#include <elf.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <string>
#include <sys/auxv.h>
#include <sys/ioctl.h>
module cppvmm.guest_memory:holder_probe.impl;
import :address;
import :book_files;
import :descriptor;
import :holder_probe;
import :proc_maps;

namespace cppvmm {

/// What the kernel answers: errno, or 0 where the registration did not fail.
static int ask(int userfaultfd, std::uint64_t start, std::uint64_t end) {
  uffdio_register request{};
  request.range = {.start = start, .len = end - start};
  request.mode = UFFDIO_REGISTER_MODE_MISSING;
  return ioctl(userfaultfd, UFFDIO_REGISTER, &request) == 0 ? 0 : errno;
}

/// One that could not be had has given no answer.
template <class File>
static bool refuses_nothing(const std::optional<File>& userfaultfd) {
  return !userfaultfd || !userfaultfd->is_open() ||
         (ioctl(userfaultfd->number(), UFFDIO_REGISTER, nullptr) != 0 && errno == EFAULT);
}

bool HolderProbe::was_heard() const { return is_heard_ && refuses_nothing(shared_) && refuses_nothing(own_); }

bool HolderProbe::is_free(const ListedMapping& mapping, bool ends_at_guard_file) {
  if (!ends_at_guard_file) return is_free_up_to_vdso(mapping);
  if (!shared_) shared_.emplace(open_probe());
  if (!shared_->is_open()) return false;
  const std::uint64_t end = mapping.end + page_size;
  const int answer = ask(shared_->number(), mapping.start, end);
  if (answer == 0) {
    // What was behind the memory went just now. Whoever meets a missing page meanwhile goes on then, or, in the
    // kernel's own accesses, is refused it.
    uffdio_range range{.start = mapping.start, .len = end - mapping.start};
    static_cast<void>(ioctl(shared_->number(), UFFDIO_UNREGISTER, &range));
  }
  return answer == EPERM;
}

/// The kernel's own page in every process, which can't be registered; 0 where this process has it no more.
static std::uint64_t find_vdso() {
  const std::uint64_t start = getauxval(AT_SYSINFO_EHDR);
  const auto mapping = start != 0 ? listed_mapping_at(start) : std::nullopt;
  return mapping && mapping->start == start && mapping->path == "[vdso]" ? start : 0;
}

// Nothing of ours is mapped behind memory that is not ours: whoever maps something there, at an address that was known
// to be free, would lose it when ours goes. What is in between is asked for too, and makes no more than a doubt.
bool HolderProbe::is_free_up_to_vdso(const ListedMapping& mapping) {
  if (!vdso_) vdso_ = find_vdso();
  if (!own_) own_.emplace(make_probe());
  if (*vdso_ < mapping.end || !own_->is_open() || ++far_questions_ > most_far_questions) return false;
  const int answer = ask(own_->number(), mapping.start, *vdso_ + page_size);
  // One that succeeds ends with the descriptor, which takes nothing from others.
  if (answer == 0) {
    is_heard_ = is_heard_ && refuses_nothing(own_);
    own_.emplace(make_probe());
  }
  return answer == EPERM || answer == EINVAL;
}

} // namespace cppvmm
