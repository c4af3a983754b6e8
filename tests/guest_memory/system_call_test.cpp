#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <iostream>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <vector>

#include "support/each_system_call.hpp"

#include "support/surveyed_memory.hpp"

import cppvmm.guest_memory;

// Each system call of a call may fail, and the kernel may do less than it was asked for: nothing is left behind, and no
// page is reported that would not be reported otherwise.

using namespace cppvmm;
using test::MemoryKind;

namespace {

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

constexpr MemoryKind anonymous_huge{"anonymous_huge", Backing::anonymous, EvidenceSource::automatic, true};
constexpr MemoryKind kinds[] = {
    {"anonymous", Backing::anonymous},
    {"anonymous_legacy", Backing::anonymous, EvidenceSource::legacy},
    anonymous_huge,
    {"memfd", Backing::memfd},
    {"memfd_legacy", Backing::memfd, EvidenceSource::legacy},
    {"shared_anonymous", Backing::shared_anonymous},
    {"shared_anonymous_legacy", Backing::shared_anonymous, EvidenceSource::legacy},
    {"hugetlb", Backing::hugetlb},
    {"hugetlb_legacy", Backing::hugetlb, EvidenceSource::legacy},
    {"hugetlb_memfd", Backing::hugetlb_memfd},
    {"hugetlb_memfd_legacy", Backing::hugetlb_memfd, EvidenceSource::legacy},
    {"private_file", Backing::private_file},
    {"private_file_legacy", Backing::private_file, EvidenceSource::legacy},
    {"shared_file", Backing::shared_file},
    {"shared_file_legacy", Backing::shared_file, EvidenceSource::legacy},
    {"unknown", Backing::unknown},
};

/// What is known beside the evidence.
enum class Beside : std::uint8_t { nothing, content, watch, log, watch_and_content };

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
  case Beside::watch_and_content:
    return "with_write_watch_and_content_check";
  }
  return "?";
}

void PrintTo(Beside beside, std::ostream* out) { *out << name_of(beside); }

class SystemCalls : public test::SurveyedMemory {
protected:
  void SetUp() override {
    if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
    test::keep_heap();
    SurveyedMemory::SetUp();
  }

  [[nodiscard]] PageSet data() const {
    PageSet set(pages(5, 1));
    for (std::uint64_t page = count / 2; page < count && !is_huge(); page += 8)
      set.add(pages(page, 1));
    return set;
  }

  /// Every page of `survey` that counts as zeroed is among `at_most`, and the survey is one of all the RAM.
  static void expect_conservative(const Survey& survey, const PageSet& at_most) {
    PageSet more = survey.zeroed();
    more.remove(at_most);
    EXPECT_TRUE(more.empty()) << more.page_count() << " pages that a survey without failures does not report";
    PageSet rest = survey.ram;
    rest.remove(survey.touched);
    EXPECT_EQ(survey.zeroed(), rest);
  }

  [[nodiscard]] PageSet without_data() const {
    PageSet all(pages(0, count));
    all.remove(data());
    return all;
  }

  /// Of a log that has the pages with data.
  [[nodiscard]] WriteLog log() const {
    return {.collect = [data = data()](PageRange of, std::span<std::uint64_t> bitmap) -> MemoryResult<void> {
      for (std::uint64_t page = 0; page < of.count(); ++page)
        if (data.contains(PageNumber(of.first().value() + page))) bitmap[page / 64] |= std::uint64_t{1} << page % 64;
      return {};
    }};
  }

  static constexpr WriteWatchOptions promise{.written_through_this_mapping_only = true};
};

class SurveyCalls : public SystemCalls, public testing::WithParamInterface<std::tuple<MemoryKind, Beside>> {
protected:
  [[nodiscard]] MemoryKind kind() const override { return std::get<MemoryKind>(GetParam()); }
  [[nodiscard]] static Beside beside() { return std::get<Beside>(GetParam()); }
  [[nodiscard]] static bool has_watch() { return beside() == Beside::watch || beside() == Beside::watch_and_content; }
};

INSTANTIATE_TEST_SUITE_P(Kinds, SurveyCalls,
                         testing::Combine(testing::ValuesIn(kinds),
                                          testing::Values(Beside::nothing, Beside::content, Beside::watch, Beside::log,
                                                          Beside::watch_and_content)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" + name_of(std::get<1>(info.param));
                         });

TEST_P(SurveyCalls, EachMayFail) {
  if (backing() == Backing::unknown) GTEST_SKIP() << "the kernel is not asked about it";
  if (has_watch() && !memory.arm_write_watch(GuestAddress(0), promise))
    GTEST_SKIP() << "this memory, or kernel, has no write watch";
  if (beside() == Beside::log) {
    ASSERT_TRUE(memory.begin_write_log(log(), {.complete = true}));
  }
  SurveyOptions asked = options();
  if (beside() == Beside::content || beside() == Beside::watch_and_content) asked.content_check.emplace();

  const Survey clean = memory.survey(asked);
  PageSet unsound = clean.zeroed();
  unsound.intersect(data());
  ASSERT_TRUE(unsound.empty());
  Survey survey;
  const std::size_t faults = test::fail_each_system_call(
      {.work = [&] { survey = memory.survey(asked); }, .check = [&] { expect_conservative(survey, clean.zeroed()); }});
  RecordProperty("faults", static_cast<int>(faults));
  EXPECT_GT(faults, 0U);
  EXPECT_EQ(memory.survey(asked).touched, clean.touched);
}

/// How often a survey of so many regions reads a file.
std::size_t reads_of_a_survey(std::uint64_t regions) {
  std::vector<Region> made;
  for (std::uint64_t i = 0; i < regions; ++i)
    made.push_back(*Region::anonymous(GuestAddress(i * 2 * page_size), page_size));
  const GuestMemory memory(*MemoryMap::make(std::move(made)));
  const auto calls = test::record_system_calls([&] { static_cast<void>(memory.survey()); });
  return static_cast<std::size_t>(std::ranges::count(calls, SYS_pread64, &test::SystemCall::number));
}

// Where the mappings of the process are read, then for all regions at once: of twice as many there are twice as many.
TEST(SurveyOfManyRegions, ReadsTheMappingsInProportion) {
  const std::size_t reads = reads_of_a_survey(256);
  EXPECT_GT(reads, 0U);
  EXPECT_LT(reads_of_a_survey(512), reads * 5 / 2);
}

class HugeSurveyCalls : public SystemCalls {
protected:
  [[nodiscard]] MemoryKind kind() const override { return anonymous_huge; }
};

// Memory that may have transparent huge pages is looked at twice, with a wait between.
TEST_F(HugeSurveyCalls, ARefusedWaitLeavesNoEvidence) {
  Survey survey;
  const std::function<void()> work = [&] { survey = memory.survey(); };
  work();
  const std::vector<test::SystemCall> calls = test::record_system_calls(work);
  ASSERT_NE(survey.regions[0].evidence, Evidence::none);
  EXPECT_EQ(survey.zeroed(), PageSet(pages(count / 2, count / 2)));
  const auto wait = std::ranges::find(calls, SYS_membarrier, &test::SystemCall::number);
  ASSERT_NE(wait, calls.end());
  std::size_t which = 0;
  const auto check = [&] {
    const auto& faults = test::faults_of(*wait)->faults;
    if (which == faults.size()) return; // the end of them
    EXPECT_EQ(survey.regions[0].evidence, Evidence::none);
    EXPECT_TRUE(survey.zeroed().empty());
    ASSERT_TRUE(survey.regions[0].error);
    EXPECT_EQ(survey.regions[0].error->code, MemoryErrc::os);
    EXPECT_EQ(survey.regions[0].error->os_error, faults[which].error);
  };
  // How often the mappings are read before it depends on how many there are.
  while (test::fail_system_call({.work = work, .check = check}, 0, which, SYS_membarrier))
    ++which;
  EXPECT_GT(which, 0U);
}

class OtherCalls : public SystemCalls, public testing::WithParamInterface<MemoryKind> {
protected:
  [[nodiscard]] MemoryKind kind() const override { return GetParam(); }

  /// The region anew, as a discard may change it.
  void make_anew() {
    if (is_file()) {
      ASSERT_EQ(ftruncate(file.number(), 0), 0);
      ASSERT_EQ(ftruncate(file.number(), bytes), 0);
      ASSERT_EQ(pwrite(file.number(), "data", 4, 6 * page_size), 4);
    }
    auto made = make();
    ASSERT_TRUE(made) << made.error().message();
    region.emplace(*made);
    memory.replace(*MemoryMap::make({*region}));
    advise();
    store_data();
  }

  void drop() {
    memory.replace({});
    region.reset();
  }

  [[nodiscard]] char at(std::uint64_t page) const {
    return static_cast<const volatile char*>(region->host_address())[page * page_size];
  }

  /// What was not discarded is as it was, and of the others only what is zero is reported, whatever the call said.
  void expect_discarded(bool done, const PageSet& discarded) {
    const PageSet zeroed = memory.survey(options()).zeroed();
    for (const std::uint64_t page : {std::uint64_t{5}, count / 2, count - 8}) {
      if (is_huge() && page != 5) continue;
      const bool is_discarded = discarded.contains(PageNumber(page));
      if (zeroed.contains(PageNumber(page)) || (done && is_discarded)) {
        EXPECT_EQ(at(page), 0) << page;
      }
      if (!is_discarded) {
        EXPECT_EQ(at(page), 1) << page;
      }
    }
  }

  /// A second region of the same part of its file is refused.
  void expect_known_file(const Region& one) const {
    if (backing() != Backing::memfd && backing() != Backing::hugetlb_memfd && backing() != Backing::shared_file) return;
    // Of an adopted one, the region's descriptor may not be written to.
    const int fd = backing() == Backing::shared_file ? file.number() : one.file_descriptor();
    void* const again = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    ASSERT_NE(again, MAP_FAILED);
    const auto other = Region::adopt(
        GuestAddress(bytes), {.host_address = again, .bytes = bytes, .backing = backing(), .fd = fd, .fd_offset = 0});
    EXPECT_TRUE(other) << other.error().message();
    if (other) {
      EXPECT_FALSE(MemoryMap::make({one, *other})) << "two regions of the same memory";
    }
    munmap(again, bytes);
  }

  void discard_each(const PageSet& discarded, const std::function<MemoryResult<Discarded>()>& call) {
    drop();
    std::optional<MemoryResult<Discarded>> result;
    const auto check = [&] {
      expect_discarded(result->has_value(), discarded);
      result.reset();
    };
    const std::size_t faults = test::fail_each_system_call({.prepare = [this] { make_anew(); },
                                                            .work = [&] { result.emplace(call()); },
                                                            .check = check,
                                                            .finish = [this] { drop(); }});
    RecordProperty("faults", static_cast<int>(faults));
  }
};

INSTANTIATE_TEST_SUITE_P(Kinds, OtherCalls, testing::ValuesIn(kinds),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(OtherCalls, EachOfADiscardMayFail) {
  if (backing() == Backing::unknown) GTEST_SKIP() << "it is not discarded";
  const PageSet half(pages(0, count / 2));
  discard_each(half, [&] { return memory.discard(half); });
}

TEST_P(OtherCalls, EachOfADiscardOfAPartMayFail) {
  if (backing() == Backing::unknown) GTEST_SKIP() << "it is not discarded";
  const PageSet part(pages(3, 9));
  discard_each(part, [&] { return memory.discard(part); });
}

TEST_P(OtherCalls, EachOfAResetMayFail) {
  if (backing() == Backing::unknown) GTEST_SKIP() << "it is not discarded";
  const PageSet keep(pages(count / 2, 1));
  PageSet discarded(pages(0, count));
  discarded.remove(keep);
  discard_each(discarded, [&] { return memory.reset(keep); });
}

TEST_P(OtherCalls, EachOfAWatchThatBeginsAndEndsMayFail) {
  if (!memory.arm_write_watch(GuestAddress(0), promise)) GTEST_SKIP() << "this memory, or kernel, has no write watch";
  memory.disarm_write_watch(GuestAddress(0));
  std::optional<Survey> survey;
  test::fail_each_system_call({.work =
                                   [&] {
                                     static_cast<void>(memory.arm_write_watch(GuestAddress(0), promise));
                                     survey.emplace(memory.survey(options()));
                                     memory.disarm_write_watch(GuestAddress(0));
                                   },
                               .check =
                                   [&] {
                                     expect_conservative(*survey, without_data());
                                     survey.reset();
                                   }});
  EXPECT_TRUE(memory.arm_write_watch(GuestAddress(0), promise));
}

TEST_P(OtherCalls, EachOfALogThatBeginsAndEndsMayFail) {
  std::optional<Survey> survey;
  test::fail_each_system_call({.work =
                                   [&] {
                                     static_cast<void>(memory.begin_write_log(log(), {.complete = true}));
                                     survey.emplace(memory.survey(options()));
                                     memory.end_write_log();
                                   },
                               .check =
                                   [&] {
                                     expect_conservative(*survey, without_data());
                                     survey.reset();
                                   }});
  EXPECT_TRUE(memory.begin_write_log(log()));
}

TEST_P(OtherCalls, EachOfARegionThatIsMadeMayFail) {
  drop();
  std::optional<MemoryResult<Region>> made;
  test::fail_each_system_call({.work = [&] { made.emplace(make()); },
                               .check =
                                   [&] {
                                     if (made->has_value()) expect_known_file(**made);
                                   },
                               .finish = [&] { made.reset(); }});
}

class AccessCalls : public testing::Test {
protected:
  static constexpr std::uint64_t bytes = 8 * page_size;

  void SetUp() override {
    if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
    test::keep_heap();
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(mapped, MAP_FAILED);
    own = static_cast<std::byte*>(mapped);
    memory.replace(*MemoryMap::make({*Region::adopt(GuestAddress(0), {own, bytes, Backing::anonymous, -1, 0})}));
  }
  void TearDown() override {
    memory.replace({});
    if (own != nullptr) munmap(own, bytes);
  }

  /// How much of `size` bytes from `at` on was accessed.
  static std::uint64_t done(const MemoryResult<void>& result, std::uint64_t at, std::uint64_t size) {
    if (result) return size;
    EXPECT_LT(result.error().completed, size);
    EXPECT_EQ(result.error().address, at + result.error().completed);
    EXPECT_NE(result.error().os_error, 0);
    return std::min(result.error().completed, size);
  }
  /// What was copied is right, and of the rest no byte is another than before, when it was 0, or than it was to be.
  static void expect_copied(std::span<const std::byte> copy, std::span<const std::byte> of, std::uint64_t done) {
    EXPECT_TRUE(std::ranges::equal(copy.first(done), of.first(done)));
    for (std::uint64_t i = done; i < copy.size(); ++i)
      ASSERT_TRUE(copy[i] == of[i] || copy[i] == std::byte{}) << i;
  }

  void fail_each_of_accesses(std::uint64_t at, std::uint64_t size) {
    const std::span guest(own + at, size);
    std::vector<std::byte> data(size);
    for (std::size_t i = 0; i < size; ++i)
      data[i] = static_cast<std::byte>(i % 251 + 1);
    std::vector<std::byte> into(size);
    MemoryResult<void> result;
    {
      const testing::ScopedTrace trace(__FILE__, __LINE__, "write");
      const std::size_t faults =
          test::fail_each_system_call({.prepare = [&] { std::ranges::fill(guest, std::byte{}); },
                                       .work = [&] { result = memory.write(GuestAddress(at), data); },
                                       .check = [&] { expect_copied(guest, data, done(result, at, size)); }});
      EXPECT_GT(faults, 0U);
    }
    std::ranges::copy(data, guest.begin());
    {
      const testing::ScopedTrace trace(__FILE__, __LINE__, "read");
      const std::size_t faults =
          test::fail_each_system_call({.prepare = [&] { std::ranges::fill(into, std::byte{}); },
                                       .work = [&] { result = memory.read(GuestAddress(at), into); },
                                       .check = [&] { expect_copied(into, data, done(result, at, size)); }});
      EXPECT_GT(faults, 0U);
    }
    {
      const testing::ScopedTrace trace(__FILE__, __LINE__, "check_write");
      const auto map = memory.snapshot();
      const std::size_t faults =
          test::fail_each_system_call({.work = [&] { result = map->check_write(GuestAddress(at), size); },
                                       .check = [&] { done(result, at, size); }});
      EXPECT_GT(faults, 0U);
    }
    EXPECT_TRUE(std::ranges::equal(guest, data));
  }

  /// Whether accesses are made, and by a pipe.
  void expect_a_pipe(std::uint64_t at, std::uint64_t size) const {
    std::vector<std::byte> data(size, std::byte{0x5A});
    std::vector<std::byte> into(size);
    MemoryResult<void> result;
    const auto has_pipe = [](const std::vector<test::SystemCall>& calls) {
      return std::ranges::find(calls, SYS_pipe2, &test::SystemCall::number) != calls.end();
    };
    EXPECT_TRUE(has_pipe(test::record_system_calls([&] { result = memory.write(GuestAddress(at), data); })));
    EXPECT_TRUE(result) << result.error().message();
    EXPECT_TRUE(std::ranges::equal(std::span(own + at, size), data));
    EXPECT_TRUE(has_pipe(test::record_system_calls([&] { result = memory.read(GuestAddress(at), into); })));
    EXPECT_TRUE(result) << result.error().message();
    EXPECT_EQ(into, data);
  }

  std::byte* own = nullptr;
  GuestMemory memory;
};

/// Has process_vm_readv and process_vm_writev of this thread fail from now on.
bool refuse_process_vm(int error) {
  std::array<sock_filter, 5> program{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 1, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_writev, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<unsigned>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog filter{.len = program.size(), .filter = program.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

TEST_F(AccessCalls, EachOfAnAccessToAdoptedMemoryMayFail) {
  constexpr std::uint64_t at = page_size - 5;
  fail_each_of_accesses(at, 3 * page_size + 11);
  fail_each_of_accesses(page_size + 3, 100); // what is refused once is made by a pipe
  for (const int error : {EPERM, ENOSYS}) {
    bool is_refused = false;
    std::thread([&] {
      is_refused = refuse_process_vm(error);
      if (!is_refused) return;
      const testing::ScopedTrace trace(__FILE__, __LINE__, "by a pipe");
      expect_a_pipe(at, 3 * page_size + 11);
      fail_each_of_accesses(at, 3 * page_size + 11);
    }).join();
    if (!is_refused) GTEST_SKIP() << "no filter of system calls: the pipe is not failed";
  }
}

// Up to Linux 6.4, a read that goes beyond a page table may show entries of other pages than it was asked for.
TEST(PageTables, AreReadOneAtATime) {
  if (const std::string missing = test::system_calls_missing(); !missing.empty()) GTEST_SKIP() << missing;
  constexpr std::uint64_t bytes_of_table = 512 * sizeof(std::uint64_t);
  const Region region = *Region::anonymous(GuestAddress(0), 64 << 20);
  const GuestMemory memory(*MemoryMap::make({region}));
  ASSERT_TRUE(memory.write_value(GuestAddress(5 * page_size), std::uint64_t{1}));
  SurveyOptions options{.leave_out = {}, .source = EvidenceSource::legacy};
  options.content_check.emplace();
  const auto calls = test::record_system_calls([&] { static_cast<void>(memory.survey(options)); });
  const std::uint64_t first = reinterpret_cast<std::uintptr_t>(region.host_address()) / page_size * 8;
  const std::uint64_t end = first + region.bytes() / page_size * 8;
  int reads = 0;
  for (const test::SystemCall& call : calls) {
    if (call.number != SYS_pread64) continue;
    const std::uint64_t bytes = call.arguments[2];
    const std::uint64_t at = call.arguments[3];
    if (at < first || at >= end || bytes == 0) continue;
    ++reads;
    EXPECT_EQ(at / bytes_of_table, (at + bytes - 1) / bytes_of_table) << bytes << " bytes at " << at;
  }
  EXPECT_GE(reads, 32) << "one for each 2 MiB";
}

} // namespace
