#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <malloc.h>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <thread>
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
const Calls every_survey{{SYS_fstat},   {SYS_newfstatat}, {SYS_futex}, {SYS_mmap},         {SYS_munmap},
                         {SYS_madvise}, {SYS_mprotect},   {SYS_brk},   {SYS_clock_gettime}};
const Calls mappings{{SYS_pread64}};
const Calls without_books{{SYS_openat}, {SYS_close}};
const Calls mappings_and_holders{{SYS_ioctl, procmap_query},
                                 {SYS_userfaultfd},
                                 {SYS_ioctl, userfaultfd_new},
                                 {SYS_ioctl, ioctl_of(UFFDIO_API)},
                                 {SYS_ioctl, ioctl_of(UFFDIO_REGISTER)},
                                 {SYS_ioctl, ioctl_of(UFFDIO_UNREGISTER)},
                                 {SYS_close}};
const Calls of_our_memory_with_books{
    {SYS_ioctl, procmap_query}, {SYS_ioctl, ioctl_of(UFFDIO_REGISTER)}, {SYS_ioctl, ioctl_of(UFFDIO_UNREGISTER)}};
const Calls anonymous{{SYS_ioctl, pagemap_scan}, {SYS_pread64}};
const Calls files{{SYS_fstatfs}, {SYS_uname}, {SYS_lseek}, {cachestat}, {SYS_pread64}};
const Calls shared_anonymous{{SYS_openat}, {SYS_close}};
const Calls private_file{{SYS_ioctl, procmap_query}};
const Calls transparent_huge_pages{{SYS_membarrier}};
const Calls hugetlb{{SYS_userfaultfd},
                    {SYS_ioctl, userfaultfd_new},
                    {SYS_ioctl, ioctl_of(UFFDIO_API)},
                    {SYS_ioctl, ioctl_of(UFFDIO_REGISTER)},
                    {SYS_ioctl, ioctl_of(UFFDIO_UNREGISTER)},
                    {SYS_ioctl, pagemap_scan},
                    {SYS_close}};
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
                        {SYS_close}};
// How the test says what came of it.
const Calls its_own{{SYS_write}, {SYS_exit_group}, {SYS_exit}, {SYS_rt_sigprocmask}};

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

/// Of what the data is not in.
constexpr PageNumber marked(77);

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
    if (IsSkipped() || HasFatalFailure()) return;
    if (is_in_small_pages()) {
      ASSERT_TRUE(region->set_huge_pages(HugePages::never));
    }
  }

  [[nodiscard]] bool is_in_small_pages() const { return std::string_view(kind().name) == small_pages; }
  [[nodiscard]] bool is_in_memory() const {
    return backing() == Backing::memfd || backing() == Backing::shared_anonymous;
  }
  [[nodiscard]] bool is_private() const {
    return backing() == Backing::anonymous || backing() == Backing::hugetlb || backing() == Backing::private_file;
  }
  /// Without Linux 6.7 there is no watch.
  [[nodiscard]] bool is_watchable() const { return !is_file() && test::machine_facts().async_write_protect; }

  [[nodiscard]] std::vector<Calls> rows(bool has_books) const {
    std::vector<Calls> rows{its_own, every_survey, mappings, anonymous};
    if (!has_books) rows.push_back(without_books);
    const bool is_ours = own == nullptr;
    if (is_in_memory() || is_hugetlb() || is_in_small_pages() ||
        (backing() == Backing::anonymous && beside() != Beside::nothing && beside() != Beside::marks))
      rows.push_back(is_ours && has_books ? of_our_memory_with_books : mappings_and_holders);
    if (is_in_memory() || is_file()) rows.push_back(files);
    if (backing() == Backing::shared_anonymous) rows.push_back(shared_anonymous);
    if (backing() == Backing::private_file) rows.push_back(private_file);
    if (is_hugetlb()) rows.push_back(hugetlb);
    if (backing() == Backing::hugetlb_memfd) rows.push_back(hugetlb_memfd);
    if (backing() == Backing::anonymous || backing() == Backing::private_file) rows.push_back(transparent_huge_pages);
    if (beside() == Beside::marks) rows.push_back(marks);
    // A watch, or a log, begins with a look at the content.
    if (beside() == Beside::content || beside() == Beside::watch || beside() == Beside::log) {
      rows.push_back(content);
      if (is_private() || beside() == Beside::watch) rows.push_back(write_watch);
      if (!is_ours) rows.push_back(accesses_to_adopted);
    }
    return rows;
  }

  /// A log that has the data.
  [[nodiscard]] WriteLog log() const {
    return {.collect = [this](PageRange of, std::span<std::uint64_t> bitmap) -> MemoryResult<void> {
      for (std::uint64_t page = of.first().value(); page < of.end().value(); ++page)
        if (page == 5 || (page >= count / 2 && page % 8 == 0 && !is_huge()))
          bitmap[(page - of.first().value()) / 64] |= std::uint64_t{1} << (page - of.first().value()) % 64;
      return {};
    }};
  }

  /// A survey, with what is to be known beside it, and what came of it.
  [[nodiscard]] std::string survey() {
    if (beside() == Beside::watch)
      if (const auto armed = memory.arm_write_watch(GuestAddress(0), {.written_through_this_mapping_only = true});
          !armed)
        return "no write watch: " + armed.error().message();
    if (beside() == Beside::log)
      if (const auto begun = memory.begin_write_log(log(), {.complete = true}); !begun)
        return "no write log: " + begun.error().message();
    if (beside() == Beside::marks) memory.mark_touched(*PageRange::make(marked, 3), Toucher::device);
    SurveyOptions asked = options();
    if (beside() == Beside::content) asked.content_check.emplace();
    const Survey survey = memory.survey(asked);
    const RegionSurvey& report = survey.regions[0];
    return std::string(to_string(report.evidence)) + ", touched " + std::to_string(survey.touched.page_count()) +
           (survey.touched.contains(marked) ? " with" : " without") + " page 77, zeroed " +
           std::to_string(survey.zeroed().page_count()) + (report.error ? ", " + report.error->message() : "");
  }

  /// The same by a child, on a thread of its own as a vCPU's is, which has no other calls if it is `filtered`.
  [[nodiscard]] std::string survey_of_child(bool filtered, bool has_books) {
    return test::in_child([&] -> std::string {
      // A heap that shrinks has malloc look at /proc/sys/vm/overcommit_memory.
      mallopt(M_TRIM_THRESHOLD, 1 << 30);
      std::optional<KernelBooks> books;
      if (has_books) {
        auto opened = KernelBooks::open();
        if (!opened) return opened.error().message();
        books.emplace(std::move(*opened));
      }
      std::string said;
      std::thread([&] {
        if (filtered && !allow(rows(has_books)))
          said = std::string("seccomp: ") + strerrorname_np(errno);
        else
          said = survey();
      }).join();
      return said;
    });
  }

  static constexpr std::string_view small_pages = "anonymous_small";
};

constexpr MemoryKind kinds[] = {
    {"anonymous", Backing::anonymous},
    {"anonymous_small", Backing::anonymous},
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
  if (beside() == Beside::watch && !is_watchable()) GTEST_SKIP() << "this memory, or kernel, has no write watch";
  for (const bool has_books : {true, false}) {
    const std::string free = survey_of_child(false, has_books);
    if (free.starts_with(to_string(Evidence::none)))
      GTEST_SKIP() << "nothing is known to a forked process here: " << free;
    EXPECT_TRUE(free.find(", touched ") != std::string::npos) << free;
    EXPECT_EQ(survey_of_child(true, has_books), free) << (has_books ? "with books" : "without books");
  }
}

} // namespace
