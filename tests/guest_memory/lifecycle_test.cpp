#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <gtest/gtest.h>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/huge_pages.hpp"
#include "support/locked_memory.hpp"
#include "support/machine_facts.hpp"
#include "support/swap.hpp"

import cppvmm.guest_memory;

// What becomes of memory that is discarded, reset, plugged, unplugged, restored, populated: the next survey is right.

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;

PageRange pages(std::uint64_t first, std::uint64_t count) { return *PageRange::make(PageNumber(first), count); }

PageSet without(PageSet set, const PageSet& removed) {
  set.remove(removed);
  return set;
}

std::byte* host(const Region& region, std::uint64_t page) {
  return static_cast<std::byte*>(region.host_address()) + (page - region.pages().first().value()) * page_size;
}

void store(const Region& region, std::uint64_t page, char value = 1) {
  *reinterpret_cast<volatile char*>(host(region, page)) = value;
}

void store_all(const Region& region, PageRange range) {
  for (std::uint64_t page = range.first().value(); page < range.end().value(); ++page)
    store(region, page);
}

/// The pages that do not read zero. Touches all of them.
PageSet data_in(const Region& region) {
  PageSet data;
  static constexpr std::array<std::byte, page_size> zeros{};
  for (std::uint64_t page = region.pages().first().value(); page < region.pages().end().value(); ++page)
    if (std::memcmp(host(region, page), zeros.data(), page_size) != 0) data.add(pages(page, 1));
  return data;
}

/// The set in a form that failures can show.
std::string text(const PageSet& set) {
  std::string line;
  for (const PageRange& range : set.ranges())
    line += std::to_string(range.first().value()) + "+" + std::to_string(range.count()) + " ";
  return line;
}

/// A file without a name, of `bytes`, all of it a hole; in the current folder, or where holes are told. -1: nowhere.
int sparse_file(std::uint64_t bytes) {
  for (std::string name : {"lifecycle-XXXXXX", "/tmp/lifecycle-XXXXXX"}) {
    const int fd = mkstemp(name.data());
    if (fd < 0) continue;
    unlink(name.c_str());
    if (ftruncate(fd, static_cast<off_t>(bytes)) == 0 && lseek(fd, 0, SEEK_DATA) < 0 && errno == ENXIO) return fd;
    close(fd);
  }
  return -1;
}

/// Where the host gives any: a store then brings its page alone, whatever the policy is.
void keep_huge_pages_off(const Region& region) {
  const auto set = region.set_huge_pages(HugePages::never);
  ASSERT_TRUE(set || set.error().code == MemoryErrc::unavailable) << set.error().message();
}

/// How many mappings of this process lie within the region.
std::uint64_t mappings_in(const Region& region) {
  const auto start = reinterpret_cast<std::uintptr_t>(region.host_address());
  std::ifstream maps("/proc/self/maps");
  std::uint64_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    const std::uint64_t at = std::strtoull(line.c_str(), nullptr, 16);
    if (at >= start && at < start + region.bytes()) ++count;
  }
  return count;
}

struct Kind {
  const char* name;
  Backing backing;
  bool is_adopted;
};

constexpr Kind kinds[] = {
    {"anonymous", Backing::anonymous, false},
    {"memfd", Backing::memfd, false},
    {"hugetlb", Backing::hugetlb, false},
    {"hugetlb_memfd", Backing::hugetlb_memfd, false},
    {"private_file", Backing::private_file, false},
    {"adopted_anonymous", Backing::anonymous, true},
    {"adopted_memfd", Backing::memfd, true},
    {"adopted_shared_anonymous", Backing::shared_anonymous, true},
    {"adopted_hugetlb", Backing::hugetlb, true},
    {"adopted_hugetlb_memfd", Backing::hugetlb_memfd, true},
    {"adopted_private_file", Backing::private_file, true},
    {"adopted_shared_file", Backing::shared_file, true},
};

void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }

/// A region of 8 MiB, of each kind that can be discarded, at page 0x1000. A snapshot file has data in pages 0x1005 and
/// 0x1700.
class LifecycleOf : public testing::TestWithParam<Kind> {
protected:
  static constexpr std::uint64_t first = 0x1000;
  static constexpr std::uint64_t count = 2048;
  static constexpr std::uint64_t bytes = count * page_size;

  void SetUp() override {
    const test::MachineFacts& machine = test::machine_facts();
    if (backing() == Backing::hugetlb && !machine.hugetlb_dontneed)
      GTEST_SKIP() << "this kernel discards no huge pages of private memory";
    if (is_hugetlb()) {
      auto taken = test::HugePagePool::take();
      if (!taken) GTEST_SKIP() << taken.error();
      pool.emplace(std::move(*taken));
    }
    if (backing() == Backing::private_file || backing() == Backing::shared_file) {
      file = sparse_file(bytes);
      if (file < 0) GTEST_SKIP() << "no file system here tells holes";
      files = test::file_facts(file);
      ASSERT_TRUE(files.can_be_made);
      if (!files.tell_the_truth()) GTEST_SKIP() << "nothing can be proven of files here";
      if (backing() == Backing::shared_file && files.in_memory) GTEST_SKIP() << "files here are of a memfd's kind";
    }
    if (backing() == Backing::private_file)
      for (const std::uint64_t page : {5U, 0x700U})
        ASSERT_EQ(pwrite(file, "snapshot", 8, static_cast<off_t>(page * page_size)), 8);
    auto made = GetParam().is_adopted ? make_adopted() : make_own();
    ASSERT_TRUE(made) << made.error().message();
    region.emplace(*made);
    // A huge page is touched at once, where the host gives any.
    if (!is_hugetlb() && backing() != Backing::shared_file) keep_huge_pages_off(*region);
    memory.replace(*MemoryMap::make({*region}));
    has_evidence = !(backing() == Backing::shared_anonymous && !machine.map_files) &&
                   !(backing() == Backing::shared_file && !machine.cachestat);
    const RegionSurvey report = memory.survey().regions[0];
    ASSERT_EQ(report.evidence != Evidence::none, has_evidence) << (report.error ? report.error->message() : "");
  }

  void TearDown() override {
    memory.replace({});
    region.reset();
    if (own != nullptr) munmap(own, bytes);
    if (file >= 0) close(file);
  }

  MemoryResult<Region> make_own() {
    const GuestAddress start(first * page_size);
    switch (backing()) {
    case Backing::anonymous:
      return Region::anonymous(start, bytes);
    case Backing::memfd:
      return Region::memfd(start, bytes);
    case Backing::hugetlb:
      return Region::hugetlb(start, bytes, HugePageSize::two_mib);
    case Backing::hugetlb_memfd:
      return Region::hugetlb_memfd(start, bytes, HugePageSize::two_mib);
    default:
      return Region::private_file(start, bytes, file, 0);
    }
  }

  MemoryResult<Region> make_adopted() {
    int flags = MAP_SHARED;
    switch (backing()) {
    case Backing::anonymous:
      flags = MAP_PRIVATE | MAP_ANONYMOUS;
      break;
    case Backing::shared_anonymous:
      flags = MAP_SHARED | MAP_ANONYMOUS;
      break;
    case Backing::hugetlb:
      flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;
      break;
    case Backing::private_file:
      flags = MAP_PRIVATE;
      break;
    case Backing::memfd:
      file = memfd_create("adopted", MFD_CLOEXEC);
      break;
    case Backing::hugetlb_memfd:
      file = memfd_create("adopted", MFD_CLOEXEC | MFD_HUGETLB);
      break;
    default:
      break;
    }
    if (file >= 0) EXPECT_EQ(ftruncate(file, bytes), 0);
    own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file, 0);
    EXPECT_NE(own, MAP_FAILED);
    return Region::adopt(GuestAddress(first * page_size), {own, bytes, backing(), file, 0});
  }

  [[nodiscard]] static Backing backing() { return GetParam().backing; }
  [[nodiscard]] static bool is_hugetlb() {
    return backing() == Backing::hugetlb || backing() == Backing::hugetlb_memfd;
  }
  [[nodiscard]] static PageSet all() { return pages(first, count); }
  [[nodiscard]] PageSet snapshot_data() const {
    PageSet data;
    if (backing() != Backing::private_file) return data;
    data.add(pages(first + 0x5, 1));
    data.add(pages(first + 0x700, 1));
    return data;
  }

  void expect_zeroed(const PageSet& zeroed) const {
    const Survey survey = memory.survey();
    if (has_evidence)
      EXPECT_EQ(text(survey.zeroed()), text(zeroed))
          << (survey.regions[0].error ? survey.regions[0].error->message() : to_string(survey.regions[0].evidence));
    else
      EXPECT_TRUE(survey.zeroed().empty());
  }

  std::optional<test::HugePagePool> pool;
  int file = -1;
  test::FileFacts files;
  void* own = nullptr;
  std::optional<Region> region;
  GuestMemory memory;
  bool has_evidence = true;
};

INSTANTIATE_TEST_SUITE_P(Backings, LifecycleOf, testing::ValuesIn(kinds),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(LifecycleOf, DiscardedPagesReadZeroAndAreReported) {
  store_all(*region, pages(first, count));
  expect_zeroed({});
  const PageRange discarded = pages(first + 512, 1024);
  const auto done = region->discard(discarded);
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(*done, (Discarded{.freed_pages = 1024}));
  expect_zeroed(discarded);
  EXPECT_EQ(text(data_in(*region)), text(without(all(), discarded)));
  // They are as any other memory from then on.
  ASSERT_TRUE(region->discard(discarded));
  store(*region, first + 700);
  const PageSet touched = is_hugetlb() ? pages(first + 512, 512) : pages(first + 700, 1);
  expect_zeroed(without(discarded, touched));
  EXPECT_EQ(text(data_in(*region)), text([&] {
              PageSet data = without(all(), discarded);
              data.add(pages(first + 700, 1));
              return data;
            }()));
}

TEST_P(LifecycleOf, PartsOfHugePagesAreDiscarded) {
  store_all(*region, pages(first, count));
  const PageRange discarded = pages(first + 100, 1300);
  const auto done = region->discard(discarded);
  ASSERT_TRUE(done) << done.error().message();
  const Discarded parts{.freed_pages = 512, .cleared_pages = 788};
  EXPECT_EQ(*done, is_hugetlb() ? parts : Discarded{.freed_pages = 1300});
  expect_zeroed(is_hugetlb() ? pages(first + 512, 512) : discarded);
  EXPECT_EQ(text(data_in(*region)), text(without(all(), discarded)));
  // Within one huge page.
  const PageRange few = pages(first + 10, 20);
  ASSERT_TRUE(region->discard(few));
  PageSet expected = without(all(), discarded);
  expected.remove(few);
  EXPECT_EQ(text(data_in(*region)), text(expected));
}

TEST_P(LifecycleOf, WhatCannotBeFreedIsKeptWhenThatIsAskedFor) {
  store_all(*region, pages(first, count));
  memory.mark_touched(pages(first + 600, 1), Toucher::device);
  const PageRange discarded = pages(first + 100, 1300);
  const auto done = memory.discard(discarded, DiscardMode::free_only);
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(*done, is_hugetlb() ? (Discarded{.freed_pages = 512, .kept_pages = 788}) : Discarded{.freed_pages = 1300});
  const PageRange freed = is_hugetlb() ? pages(first + 512, 512) : discarded;
  // Marks stay where pages were kept.
  expect_zeroed(is_hugetlb() ? without(freed, pages(first + 600, 1)) : PageSet(freed));
  EXPECT_EQ(text(data_in(*region)), text(without(all(), freed)));
}

TEST_P(LifecycleOf, AdviceLeavesWhatPagesHold) {
  const PageRange written = pages(first, 600);
  store_all(*region, written);
  PageSet data = snapshot_data();
  data.add(written);
  const PageSet untouched = without(all(), is_hugetlb() ? pages(first, 1024) : data);
  expect_zeroed(untouched);
  for (const PageUse use : {PageUse::cold, PageUse::page_out, PageUse::will_need}) {
    const auto done = region->advise(pages(first, count), use);
    if (!done) {
      EXPECT_EQ(done.error().code, MemoryErrc::unavailable) << done.error().message();
    }
    expect_zeroed(untouched);
  }
  EXPECT_EQ(text(data_in(*region)), text(data));
  EXPECT_EQ(region->advise(pages(first - 1, 2), PageUse::cold).error().code, MemoryErrc::not_backed);
  const auto beyond = memory.snapshot()->advise(pages(first + count - 1, 2), PageUse::cold);
  EXPECT_EQ(beyond.error().code, MemoryErrc::not_backed);
}

TEST(PageAdvice, IsTakenByTheKernel) {
  const auto swap = test::SwapSpace::take();
  if (!swap) GTEST_SKIP() << swap.error();
  const Region region = *Region::anonymous(GuestAddress(0), 64 * page_size);
  ASSERT_TRUE(region.set_huge_pages(HugePages::never));
  const auto advise = [&](PageRange range, PageUse use) {
    const auto done = region.advise(range, use);
    EXPECT_TRUE(done) << done.error().message();
  };
  const auto count_of = [](const std::vector<bool>& each) { return std::ranges::count(each, true); };
  const auto swapped = [&] { return count_of(test::swapped_pages(region.host_address(), region.bytes())); };
  const auto in_memory = [&] { return count_of(test::cached_pages(region.host_address(), region.bytes())); };
  store_all(region, pages(0, 32));
  advise(pages(0, 32), PageUse::cold);
  EXPECT_EQ(swapped(), 0);
  // The kernel may leave some of them, and take them another time.
  for (int tries = 0; tries < 100 && swapped() != 16; ++tries)
    advise(pages(0, 16), PageUse::page_out);
  EXPECT_EQ(swapped(), 16);
  EXPECT_EQ(in_memory(), 16);
  advise(region.pages(), PageUse::will_need);
  for (int tries = 0; tries < 1'000'000 && in_memory() != 32; ++tries)
    std::this_thread::yield(); // it is not waited for
  EXPECT_EQ(in_memory(), 32) << "and none of those that nobody touched";
  advise(region.pages(), PageUse::populate);
  EXPECT_EQ(swapped(), 0);
  EXPECT_EQ(in_memory(), 64);
  EXPECT_EQ(text(data_in(region)), text(PageSet(pages(0, 32))));
}

TEST_P(LifecycleOf, NoMemoryIsAllocatedToDiscardIt) {
  const auto before = region->resident_bytes();
  ASSERT_TRUE(before) << before.error().message();
  for (const PageRange& part : {pages(first + 1, 100), pages(first + 600, 1000), pages(first, count - 1)}) {
    const auto done = region->discard(part);
    ASSERT_TRUE(done) << done.error().message();
    EXPECT_EQ(*done, (Discarded{.freed_pages = part.count()}));
  }
  EXPECT_EQ(*region->resident_bytes(), *before);
  expect_zeroed(all());
}

TEST_P(LifecycleOf, LockedMemoryIsDiscardedToo) {
  store_all(*region, pages(first, count));
  if (!test::lock_memory(region->host_address(), bytes)) GTEST_SKIP() << "mlock2: errno " << errno;
  const PageRange discarded = pages(first + 512, 512);
  const auto done = region->discard(discarded);
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(done->freed_pages + done->cleared_pages, 512U);
  // Only of shared anonymous memory there is nothing to punch a hole through.
  if (backing() == Backing::shared_anonymous)
    EXPECT_EQ(done->cleared_pages, 512U);
  else if (backing() != Backing::anonymous || test::machine_facts().dontneed_locked)
    EXPECT_EQ(done->freed_pages, 512U);
  expect_zeroed(done->freed_pages == 512 ? PageSet(discarded) : PageSet());
  EXPECT_EQ(text(data_in(*region)), text(without(all(), discarded)));
}

TEST_P(LifecycleOf, RangesOutsideAreRefused) {
  store_all(*region, pages(first, count));
  for (const PageRange& range : {pages(first - 1, 2), pages(first + count - 1, 2), pages(0, 1)})
    EXPECT_EQ(region->discard(range).error().code, MemoryErrc::not_backed);
  EXPECT_EQ(*region->discard(PageRange()), Discarded{});
  EXPECT_EQ(text(data_in(*region)), text(all()));
}

TEST_P(LifecycleOf, AResetKeepsWhatItIsToldTo) {
  store_all(*region, pages(first, count));
  memory.mark_touched(pages(first + 4, 1), Toucher::device);
  memory.mark_touched(pages(first + 600, 1), Toucher::device);
  PageSet keep(pages(first + 512, 512));
  keep.add(pages(first + 2047, 500));
  const auto done = memory.reset(keep);
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(done->freed_pages + done->cleared_pages, count - 513);
  EXPECT_EQ(text(memory.marks().pages()), text(PageSet(pages(first + 600, 1))));
  PageSet kept(pages(first + 512, 512));
  kept.add(pages(first + 2047, 1));
  PageSet touched = kept;
  if (is_hugetlb()) touched.add(pages(first + 1536, 512));
  expect_zeroed(without(all(), touched));
  EXPECT_EQ(text(data_in(*region)), text(kept));
  ASSERT_TRUE(memory.reset());
  EXPECT_TRUE(memory.marks().empty());
  expect_zeroed(all());
  EXPECT_TRUE(data_in(*region).empty());
}

TEST_P(LifecycleOf, WhatTheEmbedderDiscardsItselfComesOutRight) {
  store_all(*region, pages(first, count));
  void* const at = host(*region, first + 512);
  PageSet data = without(all(), pages(first + 512, 1024));
  PageSet zeros_of_file;
  switch (backing()) {
  case Backing::memfd:
  case Backing::hugetlb_memfd:
  case Backing::shared_file:
  case Backing::shared_anonymous:
    ASSERT_EQ(madvise(at, 1024 * page_size, MADV_REMOVE), 0) << errno;
    break;
  case Backing::private_file:
    // What the file has comes back: page 0x700 of it.
    ASSERT_EQ(madvise(host(*region, first + 1536), 512 * page_size, MADV_DONTNEED), 0);
    ASSERT_NE(mmap(at, 1024 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
              MAP_FAILED);
    data.remove(pages(first + 1536, 512));
    data.add(pages(first + 0x700, 1));
    if (files.reads_make_data) zeros_of_file.add(pages(first + 1536, 512));
    break;
  default:
    ASSERT_EQ(madvise(at, 1024 * page_size, MADV_DONTNEED), 0);
    break;
  }
  expect_zeroed(without(without(all(), data), zeros_of_file));
  EXPECT_EQ(text(data_in(*region)), text(data));
}

TEST_P(LifecycleOf, PopulatedMemoryIsAllThere) {
  if (!test::machine_facts().populate_write) GTEST_SKIP() << "this kernel has no MADV_POPULATE_WRITE";
  store(*region, first + 9);
  const auto done = region->populate();
  ASSERT_TRUE(done) << done.error().message();
  EXPECT_EQ(*region->resident_bytes(), bytes);
  expect_zeroed({});
  PageSet data = snapshot_data();
  data.add(pages(first + 9, 1));
  EXPECT_EQ(text(data_in(*region)), text(data));
  ASSERT_TRUE(region->discard(pages(first, count)));
  expect_zeroed(all());
}

TEST_P(LifecycleOf, APluggedRegionShowsInTheNextSurveyAndAnUnpluggedOneDoesNot) {
  store(*region, first);
  const auto before = memory.survey();
  const GuestAddress far(std::uint64_t{1} << 32);
  const Region plugged = *Region::memfd(far, mib);
  keep_huge_pages_off(plugged);
  ASSERT_TRUE(memory.add_region(plugged));
  ASSERT_TRUE(memory.write_value(far, std::uint64_t{1}));
  Survey survey = memory.survey();
  PageSet zeroed = before.zeroed();
  zeroed.add(pages((1 << 20) + 1, 255));
  EXPECT_EQ(text(survey.zeroed()), text(zeroed));
  ASSERT_TRUE(memory.remove_region(region->start()));
  EXPECT_EQ(text(memory.survey().zeroed()), text(PageSet(pages((1 << 20) + 1, 255))));
  ASSERT_TRUE(memory.remove_region(far));
  EXPECT_TRUE(memory.survey().ram.empty());
  // It comes back as it was.
  ASSERT_TRUE(memory.add_region(*region));
  EXPECT_EQ(text(memory.survey().zeroed()), text(before.zeroed()));
}

// Whichever comes first: a region that is gone is in nobody's hands, and can be watched anew when it comes back.
TEST(Lifecycle, AWatchOrLogThatBeginsWhileItsRegionIsRemovedDoesNotKeepIt) {
  GuestMemory memory;
  for (int i = 0; i < 300; ++i) {
    std::optional<Region> region(*Region::anonymous(GuestAddress(0), mib));
    keep_huge_pages_off(*region);
    const auto* const host = static_cast<const std::byte*>(region->host_address());
    ASSERT_TRUE(memory.add_region(*region));
    {
      const std::jthread other([&memory, i] {
        if (i % 2 == 0)
          static_cast<void>(memory.arm_write_watch(GuestAddress(0)).has_value());
        else
          static_cast<void>(
              memory
                  .begin_write_log(
                      {.collect = [](PageRange, std::span<std::uint64_t>) -> MemoryResult<void> { return {}; },
                       .by = Toucher::guest})
                  .has_value());
      });
      if (i % 4 > 1) std::this_thread::yield();
      ASSERT_TRUE(memory.remove_region(GuestAddress(0)));
    }
    region.reset();
    unsigned char resident = 0;
    EXPECT_NE(mincore(const_cast<std::byte*>(host), page_size, &resident), 0) << "mapped still";
    EXPECT_EQ(errno, ENOMEM);
    memory.end_write_log();
  }
}

TEST(Lifecycle, ADiscardCrossesRegionsAndTakesMarksBack) {
  const Region low = *Region::anonymous(GuestAddress(0), mib);
  const Region high = *Region::memfd(GuestAddress(mib), mib);
  GuestMemory memory(*MemoryMap::make({high, low}));
  store_all(low, low.pages());
  store_all(high, high.pages());
  memory.mark_touched(pages(199, 2), Toucher::device);
  memory.mark_touched(pages(310, 1), Toucher::host);
  EXPECT_EQ(*memory.discard(pages(200, 100)), (Discarded{.freed_pages = 100}));
  EXPECT_EQ(text(memory.survey().zeroed()), text(PageSet(pages(200, 100))));
  PageSet marked(pages(199, 1));
  marked.add(pages(310, 1));
  EXPECT_EQ(text(memory.marks().pages()), text(marked));
  EXPECT_EQ(text(data_in(low)), text(PageSet(pages(0, 200))));
  EXPECT_EQ(text(data_in(high)), text(PageSet(pages(300, 212))));
}

TEST(Lifecycle, WhatIsNoRamIsRefusedBeforeAnythingIsDone) {
  const Region ram = *Region::anonymous(GuestAddress(0), mib);
  const Region rom = *Region::anonymous(GuestAddress(mib), mib, RegionKind::rom);
  void* const own = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const Region unknown = *Region::adopt(GuestAddress(2 * mib), {own, mib, Backing::unknown});
  GuestMemory memory(*MemoryMap::make({ram, rom}));
  for (const Region& region : {ram, rom, unknown})
    store_all(region, region.pages());
  memory.mark_touched(pages(255, 1), Toucher::device);

  const auto refused = memory.discard(pages(200, 100));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, MemoryErrc::read_only);
  EXPECT_EQ(refused.error().address, mib);
  EXPECT_EQ(rom.discard(pages(256, 1)).error().code, MemoryErrc::read_only);
  EXPECT_EQ(unknown.discard(pages(512, 1)).error().code, MemoryErrc::unavailable);
  PageSet set(pages(0, 10));
  set.add(pages(5000, 1));
  EXPECT_EQ(memory.discard(set).error().code, MemoryErrc::not_backed);
  EXPECT_EQ(text(memory.marks().pages()), text(PageSet(pages(255, 1))));
  EXPECT_EQ(text(data_in(ram)), text(PageSet(ram.pages())));

  // A reset minds neither ROM nor pages to keep that are no RAM, but memory that it cannot discard.
  ASSERT_TRUE(memory.add_region(unknown));
  EXPECT_EQ(memory.reset().error().code, MemoryErrc::unavailable);
  EXPECT_EQ(text(data_in(ram)), text(PageSet(ram.pages())));
  EXPECT_EQ(*memory.reset(pages(512, 10'000)), (Discarded{.freed_pages = 256}));
  EXPECT_EQ(text(memory.survey().zeroed()), text(PageSet(ram.pages())));
  EXPECT_TRUE(data_in(ram).empty());
  EXPECT_EQ(text(data_in(rom)), text(PageSet(rom.pages())));
  EXPECT_EQ(text(data_in(unknown)), text(PageSet(unknown.pages())));
  memory.replace({});
  munmap(own, mib);
}

TEST(Lifecycle, PagesThatAnotherMappingWroteAreClearedWhereNoHoleCanBeMade) {
  const int fd = memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(ftruncate(fd, mib), 0);
  void* const own = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  void* const other = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  madvise(own, mib, MADV_NOHUGEPAGE);
  madvise(other, mib, MADV_NOHUGEPAGE);
  constexpr int seal_future_write = 0x10; // F_SEAL_FUTURE_WRITE (Linux 5.1): no holes either
  ASSERT_EQ(fcntl(fd, F_ADD_SEALS, seal_future_write), 0);
  const Region region = *Region::adopt(GuestAddress(0), {own, mib, Backing::memfd, fd, 0});
  GuestMemory memory(*MemoryMap::make({region}));
  for (const std::uint64_t page : {0U, 17U, 200U})
    static_cast<volatile char*>(other)[page * page_size] = 1;
  store(region, 50);
  EXPECT_EQ(*memory.discard(pages(10, 200)), (Discarded{.freed_pages = 197, .cleared_pages = 3}));
  PageSet touched(pages(0, 1));
  for (const std::uint64_t page : {17U, 50U, 200U})
    touched.add(pages(page, 1));
  EXPECT_EQ(text(memory.survey().touched), text(touched));
  EXPECT_EQ(text(data_in(region)), text(PageSet(pages(0, 1))));
  memory.replace({});
  munmap(own, mib);
  munmap(other, mib);
  close(fd);
}

/// A snapshot of 12 MiB with data in every fourth page.
class RestoredSnapshot : public testing::Test {
protected:
  static constexpr std::uint64_t count = 3072;

  void SetUp() override {
    file = sparse_file(count * page_size);
    if (file < 0) GTEST_SKIP() << "no file system here tells holes";
    files = test::file_facts(file);
    ASSERT_TRUE(files.can_be_made);
    if (!files.tell_the_truth()) GTEST_SKIP() << "nothing can be proven of files here";
    if (files.data_bytes > page_size) GTEST_SKIP() << "this file system's blocks are larger than a page";
    for (std::uint64_t page = 0; page < count; page += 4) {
      ASSERT_EQ(pwrite(file, "snapshot", 8, static_cast<off_t>(page * page_size)), 8);
      data.add(pages(page, 1));
    }
    const auto survey = GuestMemory(*MemoryMap::make({restore()})).survey();
    ASSERT_EQ(text(survey.touched), text(data));
  }
  void TearDown() override { close(file); }

  [[nodiscard]] Region restore() const { return *Region::private_file(GuestAddress(0), count * page_size, file, 0); }

  int file = -1;
  test::FileFacts files;
  PageSet data;
};

TEST_F(RestoredSnapshot, InAFreshMapIsAsItWasTaken) {
  GuestMemory memory(*MemoryMap::make({restore()}));
  ASSERT_TRUE(memory.discard(pages(0, 1000)));
  const std::uint64_t written = files.reads_make_data ? 2000 : 2001;
  ASSERT_TRUE(memory.write_value(GuestAddress(written * page_size), std::uint64_t{1}));
  PageSet touched = without(data, pages(0, 1000));
  touched.add(pages(written, 1));
  EXPECT_EQ(text(memory.survey().touched), text(touched));
  memory.replace(*MemoryMap::make({restore()}));
  EXPECT_EQ(text(memory.survey().touched), text(data));
  EXPECT_EQ(text(data_in(memory.snapshot()->regions()[0])), text(data));
}

TEST_F(RestoredSnapshot, ScatteredDiscardsDoNotUseUpTheMappingsOfTheProcess) {
  const Region region = restore();
  GuestMemory memory(*MemoryMap::make({region}));
  Discarded sum;
  PageSet discarded;
  for (std::uint64_t page = 0; page < count; page += 2) {
    const auto done = memory.discard(pages(page, 1));
    ASSERT_TRUE(done) << done.error().message();
    sum.freed_pages += done->freed_pages;
    sum.cleared_pages += done->cleared_pages;
    discarded.add(pages(page, 1));
  }
  // Past the limit, every second of them had data in the file, and only those are written.
  EXPECT_EQ(sum, (Discarded{.freed_pages = 1024 + 256, .cleared_pages = 256}));
  EXPECT_LE(mappings_in(region), 2049U);
  PageSet touched;
  for (std::uint64_t page = 2048; page < count; page += 4)
    touched.add(pages(page, 1));
  EXPECT_EQ(text(memory.survey().touched), text(touched));
  EXPECT_TRUE(data_in(region).empty());
  // Pages between them, some discarded already, and some file pages.
  store_all(region, region.pages());
  ASSERT_TRUE(memory.discard(pages(1001, 1500)));
  EXPECT_EQ(text(data_in(region)), text(without(region.pages(), pages(1001, 1500))));
  // And all at once: a single mapping again.
  ASSERT_TRUE(memory.reset());
  EXPECT_EQ(mappings_in(region), 1U);
  EXPECT_EQ(text(memory.survey().zeroed()), text(PageSet(region.pages())));
  EXPECT_TRUE(data_in(region).empty());
}

TEST_F(RestoredSnapshot, IsAdoptedWithPartsDiscarded) {
  // It lies within anonymous memory of someone else, with which its ends are joined when they are discarded.
  constexpr std::uint64_t bytes = count * page_size;
  void* const space =
      mmap(nullptr, 3 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(space, MAP_FAILED);
  static_cast<void>(madvise(space, 3 * bytes, MADV_NOHUGEPAGE)); // refused where there are none
  auto* const own = static_cast<char*>(space) + bytes;
  ASSERT_NE(mmap(own, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0), MAP_FAILED);
  const Region region = *Region::adopt(GuestAddress(0), {own, bytes, Backing::private_file, file, 0});
  keep_huge_pages_off(region);
  GuestMemory memory(*MemoryMap::make({region}));
  PageSet touched = data;
  for (const PageRange& part : {pages(0, 100), pages(count - 500, 500), pages(200, 100)}) {
    ASSERT_TRUE(memory.discard(part));
    touched.remove(part);
  }
  store(region, 250);
  touched.add(pages(250, 1));
  EXPECT_EQ(mappings_in(region), 4U); // and one that starts below, and goes on into it
  EXPECT_EQ(text(memory.survey().touched), text(touched));
  EXPECT_EQ(text(memory.survey({.leave_out = {}, .source = EvidenceSource::legacy}).touched), text(touched));
  EXPECT_EQ(text(data_in(region)), text(touched));
  memory.replace({});
  munmap(space, 3 * bytes);
}

TEST_F(RestoredSnapshot, IsDiscardedAndWrittenDuringSurveys) {
  const Region region = restore();
  GuestMemory memory(*MemoryMap::make({region}));
  // Odd while the page is zero, or may be.
  std::vector<std::atomic<std::uint32_t>> versions(count);
  for (std::uint64_t page = 0; page < count; ++page) {
    if (page % 4 != 0) store(region, page);
    versions[page] = 0;
  }
  std::atomic<bool> stop = false;
  std::atomic<std::uint64_t> rounds = 0;
  std::thread discarding([&] {
    std::mt19937 random(7);
    while (!stop) {
      const std::uint64_t length = 1 + random() % 40;
      const std::uint64_t at = random() % (count - length);
      for (std::uint64_t page = at; page < at + length; ++page)
        ++versions[page];
      EXPECT_TRUE(memory.discard(pages(at, length)));
      for (std::uint64_t page = at; page < at + length; ++page) {
        store(region, page);
        ++versions[page];
      }
      ++rounds;
    }
  });
  std::uint64_t checked = 0;
  PageSet unsound;
  std::vector<std::uint32_t> before(count);
  for (int survey = 0; unsound.empty() && (survey < 200 || rounds < 500); ++survey) {
    for (std::uint64_t page = 0; page < count; ++page)
      before[page] = versions[page];
    const PageSet zeroed = memory.survey().zeroed();
    for (std::uint64_t page = 0; page < count; ++page)
      if (before[page] % 2 == 0 && versions[page] == before[page]) {
        ++checked;
        if (zeroed.contains(PageNumber(page))) unsound.add(pages(page, 1));
      }
  }
  stop = true;
  discarding.join();
  EXPECT_TRUE(unsound.empty()) << unsound.page_count() << " pages from " << unsound.ranges()[0].first().value();
  EXPECT_GT(checked, 0U);
}

TEST(Lifecycle, HugePagesAreKeptOffOrAskedFor) {
  const Region region = *Region::anonymous(GuestAddress(0), 8 * mib);
  GuestMemory memory(*MemoryMap::make({region}));
  if (!test::machine_facts().gives_huge_pages) GTEST_SKIP() << "the host gives no transparent huge pages";
  if (!test::machine_facts().membarrier) GTEST_SKIP() << "membarrier is refused: huge pages have no evidence";
  ASSERT_TRUE(memory.snapshot()->set_huge_pages(HugePages::preferred));
  ASSERT_TRUE(memory.snapshot()->set_huge_pages(HugePages::never));
  store(region, 700);
  EXPECT_EQ(text(memory.survey().touched), text(PageSet(pages(700, 1))));
  // khugepaged may now collapse what is there, at any time.
  ASSERT_TRUE(memory.reset());
  ASSERT_TRUE(region.set_huge_pages(HugePages::preferred));
  store(region, 1100);
  EXPECT_EQ(text(memory.survey().touched), text(pages(1024, 512)));
  // Parts of huge pages can be discarded.
  ASSERT_TRUE(region.set_huge_pages(HugePages::never));
  ASSERT_TRUE(memory.discard(pages(1000, 50)));
  EXPECT_EQ(text(memory.survey().touched), text(pages(1050, 486)));
}

TEST_F(RestoredSnapshot, HasHugePagesWhereItIsDiscardedAsItsOwnerWants) {
  if (!test::machine_facts().gives_huge_pages) GTEST_SKIP() << "the host gives no transparent huge pages";
  const Region region = restore();
  const GuestMemory memory(*MemoryMap::make({region}));
  for (const auto use : {HugePages::preferred, HugePages::never}) {
    const auto set = region.set_huge_pages(use);
    ASSERT_TRUE(set) << set.error().message();
    ASSERT_TRUE(region.discard(pages(512, 1024)));
    store(region, 1100);
    EXPECT_EQ(*region.huge_page_bytes(), use == HugePages::preferred ? 2 * mib : 0);
    ASSERT_TRUE(region.discard(region.pages()));
  }
}

TEST(Lifecycle, HugePagesAreNotForEveryKind) {
  void* const own = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const Region unknown = *Region::adopt(GuestAddress(0), {own, mib, Backing::unknown});
  EXPECT_EQ(unknown.set_huge_pages(HugePages::never).error().code, MemoryErrc::unavailable);
  // Of a map, such regions are left as they are.
  const auto set = MemoryMap::make({unknown})->set_huge_pages(HugePages::never);
  EXPECT_TRUE(set);
  munmap(own, mib);
}

} // namespace
