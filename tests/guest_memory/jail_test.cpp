#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <grp.h>
#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"
#include "support/huge_pages.hpp"
#include "support/in_child.hpp"
#include "support/machine_facts.hpp"
#include "support/temporary_file.hpp"

import cppvmm.guest_memory;

// Processes that may not open /proc (any more): they go by what they opened before, and know nothing without it.

using namespace cppvmm;
using test::in_child;

namespace {

constexpr std::uint64_t bytes = std::uint64_t{8} << 20;

/// An empty folder.
class EmptyFolder {
public:
  EmptyFolder() : path_(test::temporary_folder() + "/cppvmm-jail-XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) path_.clear();
  }
  EmptyFolder(const EmptyFolder&) = delete;
  EmptyFolder& operator=(const EmptyFolder&) = delete;
  ~EmptyFolder() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove(path_, ignored);
  }
  [[nodiscard]] const char* path() const { return path_.c_str(); }

private:
  std::string path_;
};

enum class Jail {
  without_privileges, ///< Another user, with which the process is not to be dumped any more.
  without_proc,       ///< Privileged, in an empty folder.
  complete,           ///< Both.
};

constexpr const char* jail_leaks = "the jail leaks";

/// Empty, or why not.
std::string go_into(Jail jail, const char* folder) {
  constexpr unsigned nobody = 65534;
  const auto refused = [](const char* call) { return call + (": " + std::generic_category().message(errno)); };
  if (jail != Jail::without_privileges && (chroot(folder) != 0 || chdir("/") != 0)) return refused("chroot");
  if (jail == Jail::without_proc) return "";
  if (setgroups(0, nullptr) != 0) return refused("setgroups");
  if (setgid(nobody) != 0 || setuid(nobody) != 0) return refused("setuid");
  if (prctl(PR_SET_DUMPABLE, 0) != 0) return refused("PR_SET_DUMPABLE");
  // What a jail is for.
  if (open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC) >= 0) return jail_leaks;
  return "";
}

/// Why a process is not let into it here; empty if it is. A jail that leaks is no such reason.
std::string why_not(Jail jail, const char* folder) {
  return in_child([&] {
    std::string said = go_into(jail, folder);
    return said == jail_leaks ? "" : said;
  });
}

/// Memory of a kind, of this process: it is gone with it.
struct Made {
  std::string name;
  std::optional<Region> region;
};

/// Some of each kind that this machine has, with data in it.
std::vector<Made> all_kinds() {
  std::vector<Made> made;
  const auto at = [&] { return GuestAddress(made.size() * bytes); };
  const auto add = [&](const char* name, const MemoryResult<Region>& region) {
    if (!region) return;
    madvise(region->host_address(), bytes, MADV_NOHUGEPAGE);
    made.push_back({name, *region});
  };
  add("anonymous", Region::anonymous(at(), bytes));
  add("memfd", Region::memfd(at(), bytes));
  void* const shared = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  add("shared_anonymous",
      Region::adopt(at(), {.host_address = shared, .bytes = bytes, .backing = Backing::shared_anonymous}));
  if (const auto file = test::temporary_file(); file && ftruncate(*file, bytes) == 0) {
    if (pwrite(*file, "data", 4, 100 * page_size) == 4)
      add("private_file", Region::private_file(at(), bytes, *file, 0));
    close(*file);
  }
  add("hugetlb", Region::hugetlb(at(), bytes, HugePageSize::two_mib));
  add("hugetlb_memfd", Region::hugetlb_memfd(at(), bytes, HugePageSize::two_mib));
  return made;
}

MemoryMap map_of(const std::vector<Made>& made) {
  std::vector<Region> regions;
  for (const Made& each : made)
    regions.push_back(*each.region);
  return *MemoryMap::make(std::move(regions));
}

std::string write_to(const GuestMemory& memory, const std::vector<Made>& made, std::uint64_t page) {
  for (const Made& each : made)
    if (!memory.write_value(GuestAddress(each.region->start().value() + page * page_size), std::uint64_t{1}))
      return "write to " + each.name;
  return "";
}

/// How one answer differs from another, region by region.
std::string difference(const std::vector<Made>& made, const Survey& outside, const Survey& inside) {
  std::string said;
  for (std::size_t i = 0; i < made.size(); ++i) {
    const RegionSurvey& was = outside.regions[i];
    const RegionSurvey& is = inside.regions[i];
    if (was.evidence == is.evidence && was.touched_pages == is.touched_pages) continue;
    said += made[i].name + ": " + to_string(was.evidence) + " " + std::to_string(was.touched_pages) + ", in the jail " +
            to_string(is.evidence) + " " + std::to_string(is.touched_pages) +
            (is.error ? ", " + is.error->message() : "") + "\n";
  }
  if (said.empty() && (outside.zeroed().page_count() != inside.zeroed().page_count())) said = "the answers differ";
  return said;
}

class Jailed : public testing::TestWithParam<Jail> {
protected:
  void SetUp() override {
    if (const auto refused = why_not(GetParam(), folder.path()); !refused.empty())
      GTEST_SKIP() << "no such jail can be made: " << refused;
    if (auto taken = test::HugePagePool::take()) pool.emplace(std::move(*taken));
  }
  std::optional<test::HugePagePool> pool;
  EmptyFolder folder;
};

INSTANTIATE_TEST_SUITE_P(Ways, Jailed, testing::Values(Jail::without_privileges, Jail::without_proc, Jail::complete),
                         [](const auto& info) {
                           switch (info.param) {
                           case Jail::without_privileges:
                             return "without_privileges";
                           case Jail::without_proc:
                             return "without_proc";
                           case Jail::complete:
                             break;
                           }
                           return "complete";
                         });

TEST_P(Jailed, ProcessThatOpenedTheBooksBeforeAnswersAsOutside) {
  EXPECT_EQ(in_child([&] -> std::string {
              const std::vector<Made> made = all_kinds();
              GuestMemory memory(map_of(made));
              if (auto said = write_to(memory, made, 3); !said.empty()) return said;
              const Survey outside = memory.survey();
              const auto books = KernelBooks::open();
              if (!books) return books.error().message();
              if (auto said = go_into(GetParam(), folder.path()); !said.empty()) return said;
              if (auto said = difference(made, outside, memory.survey()); !said.empty()) return said;
              // And follows what happens there.
              if (auto said = write_to(memory, made, 1000); !said.empty()) return said;
              const Survey later = memory.survey();
              for (const Made& each : made)
                for (const std::uint64_t page : {std::uint64_t{3}, std::uint64_t{1000}})
                  if (!later.touched.contains(PageNumber(each.region->pages().first().value() + page)))
                    return each.name + ": a page with data is not touched";
              const auto discarded = memory.reset();
              if (!discarded) return "reset: " + discarded.error().message();
              return "";
            }),
            "");
}

// smaps can be opened by all who find it, and a file's holes are found by it and by the file: but whether an access is
// a signal instead of zeros, page tables alone tell.
TEST_P(Jailed, ProcessThatDidNotSaysWhatItMisses) {
  EXPECT_EQ(in_child([&] -> std::string {
              const std::vector<Made> made = all_kinds();
              GuestMemory memory(map_of(made));
              if (auto said = write_to(memory, made, 3); !said.empty()) return said;
              const Survey outside = memory.survey();
              if (auto said = go_into(GetParam(), folder.path()); !said.empty()) return said;
              const Survey inside = memory.survey();
              std::string said;
              for (std::size_t i = 0; i < made.size(); ++i) {
                const RegionSurvey& report = inside.regions[i];
                const bool is_known = report.evidence != Evidence::none;
                if (is_known && GetParam() != Jail::without_privileges) said += made[i].name + " is known\n";
                if (is_known && report.touched_pages != outside.regions[i].touched_pages)
                  said += made[i].name + " differs\n";
                const char* const missed = is_known ? "/proc/self/pagemap" : "/proc/self/";
                // Huge pages were looked for in more than one way.
                if (report.zeroed_pages != 0 || !report.error ||
                    (made[i].name != "hugetlb" && report.error->message().find(missed) == std::string::npos))
                  said += made[i].name + ": " + (report.error ? report.error->message() : "no error") + "\n";
                if (made[i].name == "anonymous" && is_known) said += "anonymous memory is known\n";
              }
              if (!inside.zeroed().empty()) said += "pages are reported\n";
              return said;
            }),
            "");
}

TEST_P(Jailed, ProcessMayAdoptMemoryIfItOpenedTheBooks) {
  EXPECT_EQ(in_child([&] -> std::string {
              const auto books = KernelBooks::open();
              if (!books) return books.error().message();
              if (auto said = go_into(GetParam(), folder.path()); !said.empty()) return said;
              const test::Descriptor file(memfd_create("guest", MFD_CLOEXEC));
              if (ftruncate(file.number(), bytes) != 0) return "ftruncate";
              void* const host = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.number(), 0);
              const auto region =
                  Region::adopt(GuestAddress(0),
                                {.host_address = host, .bytes = bytes, .backing = Backing::memfd, .fd = file.number()});
              if (!region) return region.error().message();
              GuestMemory memory(*MemoryMap::make({*region}));
              if (!memory.write_value(GuestAddress(0), std::uint64_t{1})) return "write";
              const Survey survey = memory.survey();
              if (survey.touched.contains(PageNumber(0)) && !survey.zeroed().empty()) return "";
              return survey.regions[0].error ? survey.regions[0].error->message() : "wrong answer";
            }),
            "");
}

// A forked child has the descriptors too, and they show the parent's memory.
TEST_P(Jailed, ChildDoesNotGoByTheBooksOfItsParent) {
  EXPECT_EQ(in_child([&] -> std::string {
              std::vector<Made> made;
              made.push_back({"anonymous", *Region::anonymous(GuestAddress(0), bytes)});
              madvise(made[0].region->host_address(), bytes, MADV_NOHUGEPAGE);
              GuestMemory memory(map_of(made));
              auto books = KernelBooks::open();
              if (!books) return books.error().message();
              return in_child([&] -> std::string {
                if (auto said = write_to(memory, made, 5); !said.empty()) return said;
                Survey survey = memory.survey();
                if (!survey.touched.contains(PageNumber(5)) || survey.touched.page_count() != 1)
                  return "a child with a /proc of its own does not look there";
                const auto opened = KernelBooks::open();
                if (!opened) return "a child cannot open books of its own: " + opened.error().message();
                // The parent's end without ending the child's.
                {
                  const KernelBooks parents = std::move(*books);
                }
                if (auto said = in_child([&] -> std::string {
                      if (auto refused = go_into(GetParam(), folder.path()); !refused.empty()) return refused;
                      if (auto refused = write_to(memory, made, 6); !refused.empty()) return refused;
                      const Survey blind = memory.survey();
                      if (!blind.zeroed().empty() || !blind.regions[0].error)
                        return "a jailed child finds something out";
                      return "";
                    });
                    !said.empty())
                  return said;
                if (auto said = go_into(GetParam(), folder.path()); !said.empty()) return said;
                survey = memory.survey();
                if (!survey.touched.contains(PageNumber(5)) || survey.touched.page_count() != 1)
                  return "a child's own books do not serve it";
                return "";
              });
            }),
            "");
}

// Where a call of userfaultfd(2) is the end of the process.
TEST(Jail, WithoutUserfaultfdIsServedByTheDevice) {
  const EmptyFolder folder;
  if (const auto refused = why_not(Jail::complete, folder.path()); !refused.empty())
    GTEST_SKIP() << "no jail can be made: " << refused;
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << "no asynchronous write protection (Linux 6.7)";
  if (access("/dev/userfaultfd", R_OK | W_OK) != 0) GTEST_SKIP() << "no /dev/userfaultfd (Linux 6.1)";
  EXPECT_EQ(in_child([&] -> std::string {
              const Region region = *Region::anonymous(GuestAddress(0), bytes);
              madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
              GuestMemory memory(*MemoryMap::make({region}));
              if (auto populated = region.populate(); !populated) return populated.error().message();
              const auto books = KernelBooks::open();
              if (!books) return books.error().message();
              if (auto said = go_into(Jail::complete, folder.path()); !said.empty()) return said;
              std::array<sock_filter, 4> program{{
                  BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                  BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
                  BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
                  BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
              }};
              const sock_fprog filter{.len = program.size(), .filter = program.data()};
              if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
                  prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0)
                return "seccomp";
              if (auto armed = memory.arm_write_watch(GuestAddress(0)); !armed) return armed.error().message();
              if (!memory.write_value(GuestAddress(7 * page_size), std::uint64_t{1})) return "write";
              const Survey survey = memory.survey();
              if (survey.touched.page_count() != 1 || !survey.touched.contains(PageNumber(7)))
                return "the watch is blind";
              return "";
            }),
            "");
}

/// From now on, UFFDIO_REGISTER is refused with that errno.
bool refuse_registrations(int error) {
  std::array<sock_filter, 6> program{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args) + sizeof(std::uint64_t)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(UFFDIO_REGISTER), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog filter{.len = program.size(), .filter = program.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

// A filter's errno is that of memory which nobody holds.
TEST(Jail, WhereRegistrationsAreRefusedKnowsWhoHoldsMemory) {
  if (!test::machine_facts().userfaultfd) GTEST_SKIP() << "this kernel, or this process, has no userfaultfd";
  for (const int error : {EPERM, EINVAL})
    for (const bool has_books : {true, false})
      EXPECT_EQ(in_child([&] -> std::string {
                  std::vector<Region> regions{*Region::anonymous(GuestAddress(0), bytes),
                                              *Region::memfd(GuestAddress(bytes), bytes)};
                  static_cast<void>(regions[0].set_huge_pages(HugePages::never));
                  const test::Descriptor file(memfd_create("adopted", MFD_CLOEXEC));
                  if (ftruncate(file.number(), bytes) != 0) return "ftruncate";
                  void* const own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.number(), 0);
                  const auto adopted = Region::adopt(
                      GuestAddress(2 * bytes),
                      {.host_address = own, .bytes = bytes, .backing = Backing::memfd, .fd = file.number()});
                  if (!adopted) return adopted.error().message();
                  regions.push_back(*adopted);
                  const GuestMemory memory(*MemoryMap::make(regions));
                  const test::Descriptor holder(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | 1)));
                  uffdio_api api{};
                  api.api = UFFD_API;
                  if (ioctl(holder.number(), UFFDIO_API, &api) != 0) return "UFFDIO_API";
                  std::optional<MemoryResult<KernelBooks>> books;
                  if (has_books) books.emplace(KernelBooks::open());
                  for (const Region& region : regions) {
                    uffdio_register request{};
                    request.range = {.start = reinterpret_cast<std::uintptr_t>(region.host_address()), .len = bytes};
                    request.mode = UFFDIO_REGISTER_MODE_MISSING;
                    if (ioctl(holder.number(), UFFDIO_REGISTER, &request) != 0) return "UFFDIO_REGISTER";
                  }
                  if (!refuse_registrations(error)) return "seccomp";
                  return memory.survey().zeroed().empty() ? "" : "pages that a handler has yet to fill are reported";
                }),
                "")
          << "errno " << error << (has_books ? ", with books" : "");
}

TEST(Jail, WithoutARoomForDescriptorsIsServedByThoseThatAreOpen) {
  EXPECT_EQ(in_child([&] -> std::string {
              std::vector<Made> made;
              made.push_back({"anonymous", *Region::anonymous(GuestAddress(0), bytes)});
              made.push_back({"memfd", *Region::memfd(GuestAddress(bytes), bytes)});
              GuestMemory memory(map_of(made));
              if (auto said = write_to(memory, made, 3); !said.empty()) return said;
              const Survey outside = memory.survey();
              rlimit room{};
              if (getrlimit(RLIMIT_NOFILE, &room) != 0) return "getrlimit";
              const rlimit none{.rlim_cur = 0, .rlim_max = room.rlim_max};
              {
                const auto books = KernelBooks::open();
                if (!books) return books.error().message();
                if (setrlimit(RLIMIT_NOFILE, &none) != 0) return "setrlimit";
                if (auto said = difference(made, outside, memory.survey()); !said.empty()) return said;
              }
              const Survey blind = memory.survey();
              // UBSan takes a pipe to look at objects of a type that it has yet to meet, as when the regions end.
              if (setrlimit(RLIMIT_NOFILE, &room) != 0) return "setrlimit";
              if (!blind.zeroed().empty()) return "pages are reported";
              if (!blind.regions[0].error || blind.regions[0].error->os_error != EMFILE) return "not told why";
              return "";
            }),
            "");
}

// Then other files may have their numbers, and say something else.
TEST(Jail, ThatClosesAllDescriptorsIsNoticed) {
  const EmptyFolder folder;
  if (const auto refused = why_not(Jail::complete, folder.path()); !refused.empty())
    GTEST_SKIP() << "no jail can be made: " << refused;
  EXPECT_EQ(in_child([&] -> std::string {
              const Region region = *Region::anonymous(GuestAddress(0), bytes);
              GuestMemory memory(*MemoryMap::make({region}));
              if (!memory.write_value(GuestAddress(3 * page_size), std::uint64_t{1})) return "write";
              auto books = KernelBooks::open();
              if (!books) return books.error().message();
              const int zeros = open("/dev/zero", O_RDONLY | O_CLOEXEC);
              int taken = -1;
              if (zeros < 0) return "open";
              // /dev/zero takes the place of the one that tells what is there.
              for (int number = 3; number < 1024; ++number) {
                std::error_code failed;
                const std::string path = "/proc/self/fd/" + std::to_string(number);
                const auto target = std::filesystem::read_symlink(path, failed);
                if (failed || !target.string().ends_with("/pagemap")) continue;
                if (dup2(zeros, number) != number) return "dup2";
                taken = number;
              }
              if (taken < 0) return "the books have no pagemap";
              if (auto said = go_into(Jail::complete, folder.path()); !said.empty()) return said;
              const Survey survey = memory.survey();
              if (!survey.zeroed().empty()) return "pages are reported";
              if (!survey.regions[0].error) return "no error";
              // It is not theirs to close any more.
              {
                const KernelBooks ended = std::move(*books);
              }
              char zero = 1;
              return read(taken, &zero, 1) == 1 && zero == 0 ? "" : "another's descriptor was closed";
            }),
            "");
}

// What the kernel shows of entries goes by who opened the file.
TEST(Jail, KnowsWriteProtectionOfAbsentPagesIfItWasPrivileged) {
  if (!test::machine_facts().entry_kinds) GTEST_SKIP() << "not privileged: the kinds of entries are not shown";
  if (!test::machine_facts().async_write_protect) GTEST_SKIP() << "no asynchronous write protection (Linux 6.7)";
  const EmptyFolder folder;
  if (const auto refused = why_not(Jail::without_privileges, folder.path()); !refused.empty())
    GTEST_SKIP() << "no jail can be made: " << refused;
  const auto touched = [&](bool with_books) {
    return in_child([&] -> std::string {
      constexpr std::uint64_t wp_unpopulated = 1 << 13;
      const Region region = *Region::anonymous(GuestAddress(0), bytes);
      madvise(region.host_address(), bytes, MADV_NOHUGEPAGE);
      const test::Descriptor uffd(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1)));
      uffdio_api api{};
      api.api = UFFD_API;
      api.features = wp_unpopulated | (1 << 15);
      uffdio_register request{};
      request.range = {.start = reinterpret_cast<std::uintptr_t>(region.host_address()), .len = bytes};
      request.mode = UFFDIO_REGISTER_MODE_WP;
      uffdio_writeprotect protect{.range = request.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
      if (ioctl(uffd.number(), UFFDIO_API, &api) != 0 || ioctl(uffd.number(), UFFDIO_REGISTER, &request) != 0 ||
          ioctl(uffd.number(), UFFDIO_WRITEPROTECT, &protect) != 0)
        return "userfaultfd";
      GuestMemory memory(*MemoryMap::make({region}));
      if (!memory.write_value(GuestAddress(7 * page_size), std::uint64_t{1})) return "write";
      std::optional<KernelBooks> books;
      if (with_books) books = std::move(*KernelBooks::open());
      if (auto said = go_into(Jail::without_privileges, folder.path()); !said.empty()) return said;
      // So that /proc/self can be opened, without privilege.
      if (prctl(PR_SET_DUMPABLE, 1) != 0) return "PR_SET_DUMPABLE";
      return std::to_string(memory.survey().touched.page_count());
    });
  };
  EXPECT_EQ(touched(true), "1");
  EXPECT_EQ(touched(false), std::to_string(bytes / page_size));
}

TEST(Books, AreOneOfAProcess) {
  auto books = KernelBooks::open();
  ASSERT_TRUE(books) << books.error().message();
  EXPECT_FALSE(books->missing(KernelBook::mappings));
  EXPECT_FALSE(books->missing(KernelBook::page_tables));
  const auto more = KernelBooks::open();
  ASSERT_FALSE(more);
  EXPECT_EQ(more.error().code, MemoryErrc::invalid_argument);
  std::optional<KernelBooks> moved(std::move(*books));
  EXPECT_TRUE(books->missing(KernelBook::mappings)); // NOLINT(bugprone-use-after-move): as documented
  EXPECT_FALSE(KernelBooks::open());
  *books = std::move(*moved);
  moved.reset();
  EXPECT_FALSE(KernelBooks::open());
  {
    const KernelBooks ended = std::move(*books);
  }
  EXPECT_TRUE(KernelBooks::open());
}

// One open file has one place that it is read at, and what was read before is known by its length alone.
TEST(Books, AreReadByManyThreadsWhileMappingsComeAndGo) {
  const auto books = KernelBooks::open();
  ASSERT_TRUE(books);
  constexpr std::uint64_t count = 8;
  std::vector<Region> regions;
  for (std::uint64_t i = 0; i < count; ++i)
    regions.push_back(*Region::anonymous(GuestAddress(i * 64 * page_size), 16 * page_size));
  GuestMemory memory(*MemoryMap::make(regions));
  for (std::uint64_t i = 0; i < count; ++i) {
    madvise(regions[i].host_address(), regions[i].bytes(), MADV_NOHUGEPAGE);
    ASSERT_TRUE(memory.write_value(regions[i].start(), std::uint64_t{1}));
  }
  std::atomic<bool> stop = false;
  constexpr std::uint64_t low = std::uint64_t{1} << 32; // below what is there, and so listed before it
  std::thread others([&] {
    while (!stop) {
      std::array<void*, 16> mapped{};
      for (std::size_t i = 0; i < mapped.size(); ++i)
        mapped[i] = mmap(reinterpret_cast<void*>(low + i * page_size), page_size, i % 2 == 0 ? PROT_READ : PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      for (void* page : mapped)
        if (page != MAP_FAILED) munmap(page, page_size);
    }
  });
  std::array<std::thread, 4> threads;
  std::array<unsigned, 4> wrong{};
  for (std::size_t i = 0; i < threads.size(); ++i)
    threads[i] = std::thread([&, i] {
      for (int round = 0; round < 30; ++round)
        wrong[i] += memory.survey().touched.page_count() == count ? 0 : 1;
    });
  for (std::thread& thread : threads)
    thread.join();
  stop = true;
  others.join();
  EXPECT_EQ(wrong, (std::array<unsigned, 4>{}));
}

} // namespace
