#include "system_calls.hpp"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

// Syscall user dispatch (Linux 5.11, Documentation/admin-guide/syscall-user-dispatch.rst): while this thread's selector
// says so, each of its system calls is a SIGSYS instead, but for those that are made in a range of code. The handler
// makes the call itself, from there, or does not.

namespace cppvmm::test {

// include/uapi/linux/prctl.h (Linux 5.11), which the headers of older distributions may lack.
constexpr int set_user_dispatch = 59;
constexpr unsigned long dispatch_off = 0;
constexpr unsigned long dispatch_on = 1;

// What the headers of older distributions lack; see the modules' own definitions.
constexpr unsigned long pagemap_scan = 0xC0606610;  // _IOWR('f', 16, 96 bytes)
constexpr unsigned long procmap_query = 0xC0686611; // _IOWR('f', 17, 104 bytes)
constexpr unsigned long uffdio_continue_request = 0xC020AA07;
constexpr long cachestat_number = 451;
constexpr unsigned long populate_read = 22;
constexpr unsigned long populate_write = 23;
constexpr unsigned long dontneed_locked = 24;

using enum Fault::Kind;

// What fits is what the kernel may answer whatever there is in memory: EFAULT of UFFDIO_CONTINUE, or ENXIO of
// SEEK_DATA, would be a statement about pages, and a lie.
constexpr Fault open_faults[] = {{refused, EMFILE}, {refused, EINTR},  {refused, ENFILE},
                                 {refused, ENOMEM}, {refused, EACCES}, {refused, ENOENT}};
// The descriptor is gone whatever close(2) says.
constexpr Fault close_faults[] = {{failed_after, EINTR}, {failed_after, EIO}};
constexpr Fault read_faults[] = {{shortened}, {refused, EINTR}, {refused, EIO}, {refused, ENOMEM}, {ended}};
constexpr Fault process_vm_faults[] = {
    {shortened}, {refused, EPERM}, {refused, EFAULT}, {refused, ENOMEM}, {refused, ENOSYS}};
constexpr Fault pipe_faults[] = {{refused, EMFILE}, {refused, ENFILE}};
constexpr Fault vector_faults[] = {{refused, EINTR}, {refused, ENOMEM}};
constexpr Fault seek_faults[] = {{refused, EINVAL}, {refused, EINTR}, {refused, EIO}, {refused, ENOMEM}};
constexpr Fault status_faults[] = {{refused, ENOMEM}, {refused, EIO}, {refused, EINTR}, {refused, EOVERFLOW}};
constexpr Fault uname_faults[] = {{refused, EFAULT}};
constexpr Fault cachestat_faults[] = {{refused, ENOSYS}, {refused, EPERM}, {refused, EBADF}, {refused, EOPNOTSUPP}};
constexpr Fault map_faults[] = {{refused, ENOMEM}, {refused, EAGAIN}, {refused, EPERM}, {refused, ENODEV}};
constexpr Fault unmap_faults[] = {{refused, ENOMEM}};
constexpr Fault resident_faults[] = {{refused, EAGAIN}, {refused, ENOMEM}};
constexpr Fault discard_faults[] = {{refused, EINVAL}, {refused, EINTR}, {refused, ENOMEM}, {refused, EPERM}};
constexpr Fault remove_faults[] = {{refused, EINVAL}, {refused, EACCES}, {refused, EIO},
                                   {refused, EINTR},  {refused, EPERM},  {refused, EOPNOTSUPP}};
constexpr Fault populate_faults[] = {{refused, EINVAL}, {refused, ENOMEM}, {refused, EFAULT},
                                     {refused, EINTR},  {refused, EAGAIN}, {refused, EHWPOISON}};
constexpr Fault advice_faults[] = {{refused, EINVAL}, {refused, ENOMEM}, {refused, EAGAIN}};
constexpr Fault punch_faults[] = {
    {refused, EINTR}, {refused, EOPNOTSUPP}, {refused, EPERM}, {refused, ENOSPC}, {refused, EIO}};
constexpr Fault sync_faults[] = {{refused, EIO}, {refused, EINTR}, {refused, ENOSPC}, {refused, EINVAL}};
constexpr Fault truncate_faults[] = {{refused, EINTR}, {refused, EINVAL}, {refused, EPERM}, {refused, EFBIG}};
constexpr Fault memfd_faults[] = {{refused, EMFILE}, {refused, ENFILE}, {refused, ENOMEM}, {refused, EINVAL}};
constexpr Fault control_faults[] = {{refused, EBUSY}, {refused, EPERM}, {refused, EINVAL}};
constexpr Fault duplicate_faults[] = {{refused, EMFILE}, {refused, EINVAL}};
constexpr Fault userfaultfd_faults[] = {{refused, EPERM},  {refused, ENOSYS}, {refused, EMFILE},
                                        {refused, ENFILE}, {refused, ENOMEM}, {refused, EINVAL}};
constexpr Fault handshake_faults[] = {{refused, EINVAL}, {refused, EPERM}, {refused, EFAULT}};
constexpr Fault register_faults[] = {{refused, EBUSY}, {refused, EINVAL}, {refused, ENOMEM}, {refused, EPERM}};
constexpr Fault unregister_faults[] = {{refused, ENOMEM}, {refused, EINVAL}};
// ENOENT would be a statement about what is mapped.
constexpr Fault query_faults[] = {
    {refused, ENOTTY}, {refused, EINVAL}, {refused, ENOMEM}, {refused, EINTR}, {refused, ENAMETOOLONG}};
constexpr Fault protect_faults[] = {
    {refused, EAGAIN}, {refused, ENOENT}, {refused, ENOMEM}, {refused, EINVAL}, {refused, EFAULT}};
constexpr Fault continue_faults[] = {{refused, EAGAIN}, {refused, ENOENT}, {refused, ENOMEM}, {refused, EINVAL},
                                     {refused, EEXIST}, {refused, EIO},    {refused, ENOSPC}};
constexpr Fault scan_faults[] = {{refused, EINTR},  {refused, ENOMEM}, {refused, ENOTTY},
                                 {refused, EFAULT}, {refused, EINVAL}, {refused, EPERM}};
constexpr Fault sleep_faults[] = {{refused, EINTR}};
constexpr Fault membarrier_faults[] = {{refused, EINVAL}, {refused, ENOSYS}, {refused, EPERM}, {refused, ENOMEM}};
constexpr Fault wake_op_faults[] = {{refused, EINTR}, {refused, EAGAIN}, {refused, ENOSYS}};

constexpr SystemCallFaults all_faults[] = {
    {"open", SYS_open, any_request, open_faults},
    {"openat", SYS_openat, any_request, open_faults},
    {"close", SYS_close, any_request, close_faults},
    {"read", SYS_read, any_request, read_faults},
    {"pread64", SYS_pread64, any_request, read_faults},
    {"process_vm_readv", SYS_process_vm_readv, any_request, process_vm_faults},
    {"process_vm_writev", SYS_process_vm_writev, any_request, process_vm_faults},
    {"pipe2", SYS_pipe2, any_request, pipe_faults},
    {"readv", SYS_readv, any_request, vector_faults},
    {"writev", SYS_writev, any_request, vector_faults},
    {"lseek SEEK_DATA", SYS_lseek, SEEK_DATA, seek_faults},
    {"lseek SEEK_HOLE", SYS_lseek, SEEK_HOLE, seek_faults},
    {"fstat", SYS_fstat, any_request, status_faults},
    {"newfstatat", SYS_newfstatat, any_request, status_faults},
    {"fstatfs", SYS_fstatfs, any_request, status_faults},
    {"uname", SYS_uname, any_request, uname_faults},
    {"cachestat", cachestat_number, any_request, cachestat_faults},
    {"mmap", SYS_mmap, any_request, map_faults},
    {"munmap", SYS_munmap, any_request, unmap_faults},
    {"mincore", SYS_mincore, any_request, resident_faults},
    {"madvise MADV_DONTNEED", SYS_madvise, MADV_DONTNEED, discard_faults},
    {"madvise MADV_DONTNEED_LOCKED", SYS_madvise, dontneed_locked, discard_faults},
    {"madvise MADV_REMOVE", SYS_madvise, MADV_REMOVE, remove_faults},
    {"madvise MADV_POPULATE_READ", SYS_madvise, populate_read, populate_faults},
    {"madvise MADV_POPULATE_WRITE", SYS_madvise, populate_write, populate_faults},
    {"madvise MADV_HUGEPAGE", SYS_madvise, MADV_HUGEPAGE, advice_faults},
    {"madvise MADV_NOHUGEPAGE", SYS_madvise, MADV_NOHUGEPAGE, advice_faults},
    {"madvise MADV_DONTDUMP", SYS_madvise, MADV_DONTDUMP, advice_faults},
    {"madvise MADV_COLD", SYS_madvise, MADV_COLD, advice_faults},
    {"madvise MADV_PAGEOUT", SYS_madvise, MADV_PAGEOUT, advice_faults},
    {"madvise MADV_WILLNEED", SYS_madvise, MADV_WILLNEED, advice_faults},
    {"fallocate", SYS_fallocate, any_request, punch_faults},
    {"fdatasync", SYS_fdatasync, any_request, sync_faults},
    {"ftruncate", SYS_ftruncate, any_request, truncate_faults},
    {"memfd_create", SYS_memfd_create, any_request, memfd_faults},
    {"fcntl F_ADD_SEALS", SYS_fcntl, F_ADD_SEALS, control_faults},
    {"fcntl F_DUPFD_CLOEXEC", SYS_fcntl, F_DUPFD_CLOEXEC, duplicate_faults},
    {"userfaultfd", SYS_userfaultfd, any_request, userfaultfd_faults},
    {"ioctl UFFDIO_API", SYS_ioctl, UFFDIO_API, handshake_faults},
    {"ioctl UFFDIO_REGISTER", SYS_ioctl, UFFDIO_REGISTER, register_faults},
    {"ioctl UFFDIO_UNREGISTER", SYS_ioctl, UFFDIO_UNREGISTER, unregister_faults},
    {"ioctl UFFDIO_WRITEPROTECT", SYS_ioctl, UFFDIO_WRITEPROTECT, protect_faults},
    {"ioctl UFFDIO_CONTINUE", SYS_ioctl, uffdio_continue_request, continue_faults},
    {"ioctl PAGEMAP_SCAN", SYS_ioctl, pagemap_scan, scan_faults},
    {"ioctl PROCMAP_QUERY", SYS_ioctl, procmap_query, query_faults},
    {"nanosleep", SYS_nanosleep, any_request, sleep_faults},
    {"clock_nanosleep", SYS_clock_nanosleep, any_request, sleep_faults},
    {"membarrier", SYS_membarrier, any_request, membarrier_faults},
    // A store by the kernel. The others are of locks: those that nobody contends for make none, and one that fails
    // would be the C++ library's to look at.
    {"futex FUTEX_WAKE_OP", SYS_futex, FUTEX_WAKE_OP, wake_op_faults},
    {"futex", SYS_futex, any_request, {}},
    // They do not fail.
    {"getpid", SYS_getpid, any_request, {}},
    {"gettid", SYS_gettid, any_request, {}},
    // The allocator's. What it cannot do, operator new and malloc report: those are failed elsewhere.
    {"brk", SYS_brk, any_request, {}},
    {"mprotect", SYS_mprotect, any_request, {}},
};

static unsigned long request_of(const SystemCall& call) {
  switch (call.number) {
  case SYS_ioctl:
  case SYS_fcntl:
    return call.arguments[1];
  case SYS_futex:
    return call.arguments[1] & static_cast<unsigned>(FUTEX_CMD_MASK);
  case SYS_madvise:
  case SYS_lseek:
    return call.arguments[2];
  default:
    return any_request;
  }
}

const SystemCallFaults* faults_of(const SystemCall& call) {
  const unsigned long request = request_of(call);
  const auto* const found = std::ranges::find_if(all_faults, [&](const SystemCallFaults& row) {
    return row.number == call.number && (row.request == any_request || row.request == request);
  });
  return found == std::end(all_faults) ? nullptr : found;
}

std::string name_of(const SystemCall& call) {
  if (const SystemCallFaults* row = faults_of(call)) return row->name;
  char name[64];
  std::snprintf(name, sizeof name, "system call %ld, request %#lx", call.number, request_of(call));
  return name;
}

std::string to_string(const Fault& fault) {
  switch (fault.kind) {
  case shortened:
    return "shortened";
  case ended:
    return "ended";
  case failed_after:
    return std::string("made, and failed with ") + strerrorname_np(fault.error);
  case refused:
    break;
  }
  return strerrorname_np(fault.error);
}

} // namespace cppvmm::test

#if defined(__x86_64__)

// NOLINTBEGIN: the names are the assembler's.
extern "C" {
extern const char cppvmm_test_gate_begin;
extern const char cppvmm_test_gate_end;
long cppvmm_test_gate_call(long number, unsigned long, unsigned long, unsigned long, unsigned long, unsigned long,
                           unsigned long);
void cppvmm_test_gate_return();
}
// NOLINTEND
asm(R"(
.pushsection .text
.globl cppvmm_test_gate_begin
.globl cppvmm_test_gate_end
.globl cppvmm_test_gate_call
.globl cppvmm_test_gate_return
cppvmm_test_gate_begin:
cppvmm_test_gate_call:
  mov %rdi, %rax
  mov %rsi, %rdi
  mov %rdx, %rsi
  mov %rcx, %rdx
  mov %r8, %r10
  mov %r9, %r8
  mov 8(%rsp), %r9
  syscall
  ret
cppvmm_test_gate_return:
  mov $15, %eax
  syscall
  ud2
cppvmm_test_gate_end:
.popsection
)");

namespace cppvmm::test {

/// Code that is in the C library: what a sanitizer calls by itself is left alone.
struct CodeRange {
  std::uintptr_t begin = 0;
  std::uintptr_t end = UINTPTR_MAX;
};

static CodeRange c_library() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    CodeRange range;
    if (line.find("/libc.so") != std::string::npos && line.find(" r-xp ") != std::string::npos &&
        std::sscanf(line.c_str(), "%lx-%lx", &range.begin, &range.end) == 2)
      return range;
  }
  return {};
}

/// What is caught, of one thread. The handler allocates nothing.
struct Catcher {
  static constexpr std::size_t most_calls = 1 << 16;
  volatile char selector = 0;
  CodeRange library;
  std::vector<SystemCall> calls;
  long number = any_call;
  std::size_t before = most_calls; ///< So many calls of that number are left alone.
  std::size_t which = 0;
  iovec shorter{}; ///< Instead of the only part of a call that is shortened.
};

static thread_local Catcher* catcher = nullptr;

/// Whether the call is answered otherwise than by the kernel, to what it is.
static bool inject(const Fault& fault, SystemCall& call) {
  switch (fault.kind) {
  case Fault::Kind::refused:
    call.result = -fault.error;
    return true;
  case Fault::Kind::ended:
    call.result = 0;
    return true;
  case Fault::Kind::failed_after:
    return false;
  case Fault::Kind::shortened:
    break;
  }
  // read, pread: bytes; process_vm_readv, process_vm_writev: parts of the other process, or bytes of the only one.
  const bool has_parts = call.number == SYS_process_vm_readv || call.number == SYS_process_vm_writev;
  unsigned long& count = call.arguments[has_parts ? 4 : 2];
  if (has_parts && count == 1) {
    iovec& part = catcher->shorter;
    part = *reinterpret_cast<const iovec*>(call.arguments[3]);
    part.iov_len = (part.iov_len + 1) / 2;
    call.arguments[3] = reinterpret_cast<unsigned long>(&part);
  } else {
    count = (count + 1) / 2;
  }
  return false;
}

[[gnu::noinline]] static void answer_call(const siginfo_t* info, void* context) {
  auto* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto from = reinterpret_cast<std::uintptr_t>(info->si_call_addr);
  Catcher& caught = *catcher;
  SystemCall call{
      .number = static_cast<long>(registers[REG_RAX]),
      .arguments = {static_cast<unsigned long>(registers[REG_RDI]), static_cast<unsigned long>(registers[REG_RSI]),
                    static_cast<unsigned long>(registers[REG_RDX]), static_cast<unsigned long>(registers[REG_R10]),
                    static_cast<unsigned long>(registers[REG_R8]), static_cast<unsigned long>(registers[REG_R9])}};
  if (call.number == SYS_openat) {
    const auto* const path = reinterpret_cast<const char*>(call.arguments[1]);
    for (std::size_t i = 0; i + 1 < call.path.size() && path[i] != '\0'; ++i)
      call.path[i] = path[i];
  }
  const bool counts = from >= caught.library.begin && from < caught.library.end && call.number != SYS_prctl &&
                      caught.calls.size() < caught.calls.capacity();
  const bool is_chosen = counts && (caught.number == any_call || caught.number == call.number) && caught.before-- == 0;
  const SystemCallFaults* const row = is_chosen ? faults_of(call) : nullptr;
  call.is_faulted = row != nullptr && caught.which < row->faults.size();
  const bool is_answered = call.is_faulted && inject(row->faults[caught.which], call);
  if (!is_answered)
    call.result = cppvmm_test_gate_call(call.number, call.arguments[0], call.arguments[1], call.arguments[2],
                                        call.arguments[3], call.arguments[4], call.arguments[5]);
  if (call.is_faulted && row->faults[caught.which].kind == Fault::Kind::failed_after)
    call.result = -row->faults[caught.which].error;
  registers[REG_RAX] = call.result;
  if (counts) caught.calls.push_back(call);
}

// What a sanitizer calls for the handler's own sake is not caught: the handler would call it again. So nothing of a
// sanitizer's may be in this one.
[[clang::disable_sanitizer_instrumentation]] static void on_call(int /*signal*/, siginfo_t* info, void* context) {
  Catcher* const caught = catcher;
  caught->selector = 0;
  answer_call(info, context);
  caught->selector = 1;
}

/// As the kernel takes it: that of the C library would have its own way to return from a handler.
struct KernelAction {
  void (*handler)(int, siginfo_t*, void*);
  unsigned long flags;
  void (*restorer)();
  std::uint64_t mask;
};

static bool set_handler() {
  constexpr unsigned long has_restorer = 0x04000000; // SA_RESTORER
  const KernelAction action{.handler = on_call,
                            .flags = SA_SIGINFO | SA_NODEFER | has_restorer,
                            .restorer = cppvmm_test_gate_return,
                            .mask = 0};
  return syscall(SYS_rt_sigaction, SIGSYS, &action, nullptr, sizeof action.mask) == 0;
}

/// Catches while it lives.
class Catching {
public:
  explicit Catching(Catcher& to) {
    catcher = &to;
    const auto* const begin = &cppvmm_test_gate_begin;
    is_on_ = set_handler() && prctl(set_user_dispatch, dispatch_on, begin, &cppvmm_test_gate_end - begin + 1,
                                    const_cast<char*>(&to.selector)) == 0;
  }
  Catching(const Catching&) = delete;
  Catching& operator=(const Catching&) = delete;
  ~Catching() {
    catcher->selector = 0;
    if (is_on_) prctl(set_user_dispatch, dispatch_off, 0, 0, 0);
    catcher = nullptr;
  }
  [[nodiscard]] bool is_on() const { return is_on_; }

private:
  bool is_on_ = false;
};

std::string system_calls_missing() {
  Catcher to;
  to.calls.reserve(16);
  const Catching catching(to);
  if (!catching.is_on()) return std::string("syscall user dispatch: ") + std::strerror(errno);
  to.selector = 1;
  static_cast<void>(syscall(SYS_getpid));
  to.selector = 0;
  return to.calls.size() == 1 ? "" : "syscall user dispatch catches nothing";
}

std::vector<SystemCall> record_system_calls(const std::function<void()>& work) {
  return fault_system_call(work, Catcher::most_calls, 0);
}

std::vector<SystemCall> fault_system_call(const std::function<void()>& work, std::size_t at, std::size_t which,
                                          long number) {
  static const CodeRange library = c_library();
  Catcher to;
  to.library = library;
  to.calls.reserve(Catcher::most_calls);
  to.number = number;
  to.before = at;
  to.which = which;
  const Catching catching(to);
  if (!catching.is_on()) return {};
  to.selector = 1;
  work();
  to.selector = 0;
  return std::move(to.calls);
}

} // namespace cppvmm::test

#else

namespace cppvmm::test {

std::string system_calls_missing() { return "not on this processor"; }
std::vector<SystemCall> record_system_calls(const std::function<void()>&) { return {}; }
std::vector<SystemCall> fault_system_call(const std::function<void()>&, std::size_t, std::size_t, long) { return {}; }

} // namespace cppvmm::test

#endif
