module;
#include <fcntl.h>
#include <linux/memfd.h>
#include <string_view>
#include <sys/mman.h>
module cppvmm.guest_memory:guard_file;
import :descriptor;

namespace cppvmm {

/// A file without bytes, for guard pages. Its shared mappings can never be made writable (F_SEAL_FUTURE_WRITE, Linux
/// 5.1), so that no userfaultfd can be registered over them: EPERM (Linux fs/userfaultfd.c, userfaultfd_register).
/// None where it can't be had.
[[nodiscard]] inline Descriptor guard_file() {
  constexpr int seal_future_write = 0x0010; // include/uapi/linux/fcntl.h, which older headers lack it in
  Descriptor file(memfd_create("cppvmm-guard", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (file.is_open() && fcntl(file.number(), F_ADD_SEALS, seal_future_write) != 0) return {};
  return file;
}

/// What the kernel's list of mappings says of it.
inline constexpr std::string_view guard_file_path = "/memfd:cppvmm-guard (deleted)";

} // namespace cppvmm
