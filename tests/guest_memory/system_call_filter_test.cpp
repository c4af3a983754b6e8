#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <tuple>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/in_child.hpp"

#include "support/surveyed_memory.hpp"

import cppvmm.guest_memory;

// A process that may make the system calls of docs/jail.md alone, and ends at any other, makes its surveys as one that
// may make all.

using namespace cppvmm;
using test::MemoryKind;

namespace {

#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool has_sanitizer = true; // which makes calls of its own
#else
constexpr bool has_sanitizer = false;
#endif

struct Allowed {
  std::uint32_t number;
  std::optional<std::uint32_t> request = std::nullopt; ///< Of an ioctl; all of them otherwise.
};
using Calls = std::vector<Allowed>;

constexpr std::uint32_t ioctl_of(unsigned long request) { return static_cast<std::uint32_t>(request); }

// What the headers of older distributions lack; see the modules' own definitions.
constexpr std::uint32_t pagemap_scan = 0xC0606610;
constexpr std::uint32_t procmap_query = 0xC0686611;
constexpr std::uint32_t uffdio_continue = 0xC020AA07;
constexpr std::uint32_t userfaultfd_new = 0xAA00;
constexpr std::uint32_t cachestat = 451;

// The rows of docs/jail.md, in their order.
const Calls every_survey{{SYS_pread64}, {SYS_fstat},  {SYS_newfstatat}, {SYS_futex},
                         {SYS_mmap},    {SYS_munmap}, {SYS_madvise},    {SYS_brk}};
const Calls without_books{{SYS_openat}, {SYS_close}};
const Calls mappings_and_holders{{SYS_ioctl, procmap_query},
                                 {SYS_userfaultfd},
                                 {SYS_ioctl, userfaultfd_new},
                                 {SYS_ioctl, ioctl_of(UFFDIO_API)},
                                 {SYS_ioctl, ioctl_of(UFFDIO_REGISTER)},
                                 {SYS_ioctl, ioctl_of(UFFDIO_UNREGISTER)},
                                 {SYS_close}};
const Calls anonymous{{SYS_ioctl, pagemap_scan}, {SYS_pread64}};
const Calls files{{SYS_fstatfs}, {SYS_uname}, {SYS_lseek}, {cachestat}, {SYS_pread64}};
const Calls private_file{{SYS_ioctl, procmap_query}};
const Calls shared_anonymous{{SYS_openat}, {SYS_close}};
const Calls transparent_huge_pages{{SYS_membarrier}};
const Calls hugetlb{{SYS_userfaultfd},
                    {SYS_ioctl, userfaultfd_new},
                    {SYS_ioctl, ioctl_of(UFFDIO_API)},
                    {SYS_ioctl, ioctl_of(UFFDIO_REGISTER)},
                    {SYS_ioctl, ioctl_of(UFFDIO_UNREGISTER)},
                    {SYS_ioctl, pagemap_scan},
                    {SYS_getpid},
                    {SYS_close}};
const Calls hugetlb_before_6_7{{SYS_ioctl, uffdio_continue},
                               {SYS_ioctl, ioctl_of(UFFDIO_WRITEPROTECT)},
                               {SYS_mincore},
                               {SYS_process_vm_readv},
                               {SYS_read},
                               {SYS_clock_nanosleep}};
const Calls hugetlb_memfd{{SYS_ioctl, uffdio_continue}, {SYS_fstatfs}};
const Calls content{{SYS_pread64}, {SYS_mincore}, {SYS_mmap}, {SYS_munmap}};
const Calls marks{{SYS_membarrier}};
const Calls accesses_to_adopted{{SYS_process_vm_readv}, {SYS_process_vm_writev}, {SYS_gettid}, {SYS_futex}};
const Calls write_watch{{SYS_userfaultfd},
                        {SYS_ioctl, userfaultfd_new},
                        {SYS_ioctl, ioctl_of(UFFDIO_API)},
                        {SYS_ioctl, ioctl_of(UFFDIO_REGISTER)},
                        {SYS_ioctl, ioctl_of(UFFDIO_WRITEPROTECT)},
                        {SYS_ioctl, ioctl_of(UFFDIO_UNREGISTER)},
                        {SYS_ioctl, pagemap_scan},
                        {SYS_getpid},
                        {SYS_close}};
const Calls swapped_out{{SYS_mincore}, {SYS_madvise}};
// How the test says what came of it.
const Calls its_own{{SYS_write}, {SYS_exit_group}, {SYS_rt_sigreturn}};

/// A call that is not allowed is named, and the end.
void complain(int /*signal*/, siginfo_t* info, void* context) {
  std::array<char, 96> text{};
  const auto request = static_cast<unsigned long>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RSI]);
  const int length =
      std::snprintf(text.data(), text.size(), "not allowed: system call %d, request %#lx\n", info->si_syscall, request);
  static_cast<void>(write(STDERR_FILENO, text.data(), static_cast<std::size_t>(length)));
  _exit(1);
}

/// From now on, this process may make these calls alone. Whether that is so.
bool allow(const std::vector<Calls>& rows) {
  std::vector<sock_filter> program;
  constexpr std::uint32_t second_argument = offsetof(seccomp_data, args) + sizeof(std::uint64_t);
  const auto load = [&](std::uint32_t offset) { program.push_back(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset)); };
  const auto allow_if = [&](std::uint32_t value) {
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1));
    program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  };
  load(offsetof(seccomp_data, nr));
  for (const Calls& row : rows)
    for (const Allowed& call : row)
      if (!call.request) allow_if(call.number);
  program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 1, 0));
  program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP));
  load(second_argument);
  for (const Calls& row : rows)
    for (const Allowed& call : row)
      if (call.request) allow_if(*call.request);
  program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP));

  struct sigaction action{};
  action.sa_sigaction = complain;
  action.sa_flags = SA_SIGINFO;
  const sock_fprog filter{.len = static_cast<unsigned short>(program.size()), .filter = program.data()};
  return sigaction(SIGSYS, &action, nullptr) == 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

/// What is known beside the evidence, or asked beside it.
enum class Beside : std::uint8_t { nothing, content, watch, log, marks };

const char* name_of(Beside beside) {
  switch (beside) {
  case Beside::nothing:
    return "alone";
  case Beside::content:
    return "with_content_check";
  case Beside::watch:
    return "with_write_watch";
  case Beside::log:
    return "with_write_log";
  case Beside::marks:
    return "with_marks";
  }
  return "?";
}

void PrintTo(Beside beside, std::ostream* out) { *out << name_of(beside); }

class SystemCallFilter : public test::SurveyedMemory,
                         public testing::WithParamInterface<std::tuple<MemoryKind, Beside>> {
protected:
  [[nodiscard]] MemoryKind kind() const override { return std::get<MemoryKind>(GetParam()); }
  [[nodiscard]] static Beside beside() { return std::get<Beside>(GetParam()); }

  void SetUp() override {
    if (has_sanitizer) GTEST_SKIP() << "the sanitizer makes system calls of its own";
    SurveyedMemory::SetUp();
  }

  [[nodiscard]] std::vector<Calls> rows(bool has_books) const {
    std::vector<Calls> rows{its_own, every_survey, anonymous};
    if (!has_books) rows.push_back(without_books);
    const bool is_in_memory = backing() == Backing::memfd || backing() == Backing::shared_anonymous;
    if (is_in_memory || is_hugetlb()) rows.push_back(mappings_and_holders);
    if (is_in_memory || is_file()) rows.push_back(files);
    if (backing() == Backing::shared_anonymous) rows.push_back(shared_anonymous);
    if (backing() == Backing::private_file) rows.push_back(private_file);
    if (is_hugetlb()) rows.push_back(hugetlb);
    if (is_hugetlb() && !test::machine_facts().async_write_protect) rows.push_back(hugetlb_before_6_7);
    if (backing() == Backing::hugetlb_memfd) rows.push_back(hugetlb_memfd);
    if (backing() == Backing::anonymous || backing() == Backing::private_file) rows.push_back(transparent_huge_pages);
    if (beside() == Beside::marks) rows.push_back(marks);
    if (beside() == Beside::content) {
      rows.push_back(content);
      const bool is_private = backing() == Backing::anonymous || backing() == Backing::private_file || is_hugetlb();
      if (is_private) rows.push_back(write_watch);
      if (backing() == Backing::anonymous) rows.push_back(mappings_and_holders);
      if (own != nullptr) rows.push_back(accesses_to_adopted);
    }
    if (beside() == Beside::watch) rows.push_back(write_watch);
    if (beside() == Beside::watch || beside() == Beside::log) rows.push_back(swapped_out);
    return rows;
  }

  /// A survey, with what is to be known beside it, and what came of it.
  [[nodiscard]] std::string survey() {
    if (beside() == Beside::watch && !memory.arm_write_watch(GuestAddress(0))) return "no write watch";
    if (beside() == Beside::log &&
        !memory.begin_write_log(
            {.collect = [](PageRange, std::span<std::uint64_t>) -> MemoryResult<void> { return {}; }},
            {.complete = false}))
      return "no write log";
    if (beside() == Beside::marks) memory.mark_touched(*PageRange::make(PageNumber(77), 3), Touchers(Toucher::device));
    SurveyOptions asked = options();
    if (beside() == Beside::content) asked.content_check.emplace();
    const Survey survey = memory.survey(asked);
    const RegionSurvey& report = survey.regions[0];
    return std::string(to_string(report.evidence)) + ", touched " + std::to_string(survey.touched.page_count()) +
           " and 77: " + (survey.touched.contains(PageNumber(77)) ? "yes" : "no") + ", zeroed " +
           std::to_string(survey.zeroed().page_count()) + (report.error ? ", " + report.error->message() : "");
  }

  /// The same by a child, which has no other calls if it is `filtered`.
  [[nodiscard]] std::string survey_of_child(bool filtered, bool has_books) {
    return test::in_child([&] -> std::string {
      // Not ended: nothing may be called for it.
      static std::optional<KernelBooks> books;
      if (has_books) {
        auto opened = KernelBooks::open();
        if (!opened) return opened.error().message();
        books.emplace(std::move(*opened));
      }
      if (filtered && !allow(rows(has_books))) return "seccomp: " + std::string(strerrorname_np(errno));
      return survey();
    });
  }
};

constexpr MemoryKind kinds[] = {
    {"anonymous", Backing::anonymous},
    {"anonymous_huge", Backing::anonymous, EvidenceSource::automatic, true},
    {"memfd", Backing::memfd},
    {"shared_anonymous", Backing::shared_anonymous},
    {"hugetlb", Backing::hugetlb},
    {"hugetlb_memfd", Backing::hugetlb_memfd},
    {"private_file", Backing::private_file},
    {"shared_file", Backing::shared_file},
};

INSTANTIATE_TEST_SUITE_P(Kinds, SystemCallFilter,
                         testing::Combine(testing::ValuesIn(kinds),
                                          testing::Values(Beside::nothing, Beside::content, Beside::watch, Beside::log,
                                                          Beside::marks)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" + name_of(std::get<1>(info.param));
                         });

TEST_P(SystemCallFilter, LeavesASurveyWhatItNeeds) {
  for (const bool has_books : {true, false}) {
    const std::string free = survey_of_child(false, has_books);
    if (free == "no write watch") GTEST_SKIP() << "this memory, or kernel, has no write watch";
    EXPECT_EQ(survey_of_child(true, has_books), free) << (has_books ? "with books" : "without books");
  }
}

} // namespace
