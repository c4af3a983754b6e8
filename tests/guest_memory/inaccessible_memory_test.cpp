#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <tuple>
#include <unistd.h>
#include <utility>
#include <vector>

#include "support/descriptor.hpp"

import cppvmm.guest_memory;

// Adopted memory that its embedder, or the machine, has taken away: what a load or store would die of is an error.

using namespace cppvmm;

namespace {

// Newer than the headers of some distributions.
constexpr int advice_guard_install = 102; // include/uapi/asm-generic/mman-common.h, Linux 6.13
struct PoisonRequest {                    // struct uffdio_poison of include/uapi/linux/userfaultfd.h, Linux 6.6
  uffdio_range range;
  std::uint64_t mode;
  std::int64_t updated;
};
constexpr unsigned long poison_ioctl = _IOWR(0xAA, 0x08, PoisonRequest);
constexpr std::uint64_t feature_poison = 1 << 14;
constexpr unsigned seal_future_write = 0x0010; // F_SEAL_FUTURE_WRITE, Linux 5.1

constexpr std::uint64_t count = 16;
constexpr std::uint64_t bytes = count * page_size;
constexpr std::uint64_t gone = 8; // the first page that is
constexpr std::byte filled{0x11};

enum class Loss {
  protected_from_access,
  truncated_shared,
  truncated_private,
  poisoned_marker,
  memory_error,
  guard_page,
  unmapped,
};

std::string name_of(Loss loss) {
  switch (loss) {
  case Loss::protected_from_access:
    return "protected_from_access";
  case Loss::truncated_shared:
    return "truncated_shared";
  case Loss::truncated_private:
    return "truncated_private";
  case Loss::poisoned_marker:
    return "poisoned_marker";
  case Loss::memory_error:
    return "memory_error";
  case Loss::guard_page:
    return "guard_page";
  case Loss::unmapped:
    return "unmapped";
  }
  return "unknown";
}
void PrintTo(Loss loss, std::ostream* out) { *out << name_of(loss); }

using Case = std::tuple<Loss, bool>; // and whether a FaultGuard is there

class InaccessibleMemory : public testing::TestWithParam<Case> {
protected:
  void SetUp() override {
    const bool is_file = loss() == Loss::truncated_shared || loss() == Loss::truncated_private;
    if (is_file) {
      file = test::Descriptor(memfd_create("inaccessible", MFD_CLOEXEC));
      ASSERT_EQ(ftruncate(file.number(), bytes), 0);
    }
    const int flags = loss() == Loss::truncated_shared ? MAP_SHARED : MAP_PRIVATE | (is_file ? 0 : MAP_ANONYMOUS);
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file.number(), 0);
    ASSERT_NE(mapped, MAP_FAILED);
    own = static_cast<std::byte*>(mapped);
    madvise(own, bytes, MADV_NOHUGEPAGE);
    const Backing backing = loss() == Loss::truncated_shared    ? Backing::memfd
                            : loss() == Loss::truncated_private ? Backing::private_file
                                                                : Backing::anonymous;
    const auto region = Region::adopt(GuestAddress(0), {own, bytes, backing, file.number(), 0});
    ASSERT_TRUE(region) << region.error().message();
    memory.replace(*MemoryMap::make({*region}));
    std::fill_n(own, bytes, filled);
    if (std::get<bool>(GetParam())) {
      auto installed = FaultGuard::install();
      ASSERT_TRUE(installed) << installed.error().message();
      guard.emplace(std::move(*installed));
    }
    lose();
  }
  void TearDown() override {
    memory.replace({});
    if (own != nullptr) munmap(own, bytes);
  }

  [[nodiscard]] static Loss loss() { return std::get<Loss>(GetParam()); }
  [[nodiscard]] static int expected_error() {
    return loss() == Loss::poisoned_marker || loss() == Loss::memory_error ? EHWPOISON : EFAULT;
  }
  /// How many pages are lost from `gone` on.
  [[nodiscard]] static std::uint64_t lost_pages() { return loss() == Loss::memory_error ? 1 : count - gone; }

  void lose() {
    std::byte* const from = own + gone * page_size;
    const std::size_t length = lost_pages() * page_size;
    switch (loss()) {
    case Loss::protected_from_access:
      ASSERT_EQ(mprotect(from, length, PROT_NONE), 0);
      break;
    case Loss::truncated_shared:
    case Loss::truncated_private:
      ASSERT_EQ(ftruncate(file.number(), gone * page_size), 0);
      break;
    case Loss::poisoned_marker:
      ASSERT_NO_FATAL_FAILURE(poison(from, length));
      break;
    case Loss::memory_error: {
      const char* const lab = std::getenv("CPPVMM_LAB");
      if (lab == nullptr || *lab == 0) GTEST_SKIP() << "only the lab's machines may lose memory";
      struct sigaction ignoring{};
      struct sigaction before{};
      ignoring.sa_handler = [](int) {}; // the kernel lets nobody ignore it
      ASSERT_EQ(sigaction(SIGBUS, &ignoring, &before), 0);
      const int error = madvise(from, length, MADV_HWPOISON) == 0 ? 0 : errno;
      ASSERT_EQ(sigaction(SIGBUS, &before, nullptr), 0);
      if (error != 0) GTEST_SKIP() << "no page of this memory can be lost: errno " << error;
      break;
    }
    case Loss::guard_page:
      if (madvise(from, length, advice_guard_install) != 0) GTEST_SKIP() << "MADV_GUARD_INSTALL: errno " << errno;
      break;
    case Loss::unmapped:
      ASSERT_EQ(munmap(from, length), 0);
      break;
    }
  }
  void poison(std::byte* from, std::size_t length) {
    test::Descriptor uffd(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
    if (!uffd.is_open())
      uffd = test::Descriptor(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1)));
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = feature_poison;
    if (!uffd.is_open() || ioctl(uffd.number(), UFFDIO_API, &api) != 0)
      GTEST_SKIP() << "no userfaultfd with UFFDIO_POISON: errno " << errno;
    uffdio_register request{};
    request.range = {.start = reinterpret_cast<std::uintptr_t>(from), .len = length};
    request.mode = UFFDIO_REGISTER_MODE_MISSING;
    ASSERT_EQ(ioctl(uffd.number(), UFFDIO_REGISTER, &request), 0);
    ASSERT_EQ(madvise(from, length, MADV_DONTNEED), 0);
    PoisonRequest poisoned{.range = request.range, .mode = 0, .updated = 0};
    ASSERT_EQ(ioctl(uffd.number(), poison_ioctl, &poisoned), 0) << "errno " << errno;
    // The marks stay. Nobody would fill what a discard leaves missing.
    uffd = test::Descriptor();
  }

  /// The error of an access that had `completed` bytes before it came to where the memory is gone.
  template <class T>
  void expect_error(const MemoryResult<T>& result, std::uint64_t completed, std::uint64_t page = gone) const {
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, MemoryErrc::inaccessible) << result.error().message();
    EXPECT_EQ(result.error().os_error, expected_error()) << result.error().message();
    EXPECT_EQ(result.error().address, page * page_size) << result.error().message();
    EXPECT_EQ(result.error().completed, completed) << result.error().message();
  }

  test::Descriptor file;
  std::byte* own = nullptr;
  GuestMemory memory;
  std::optional<FaultGuard> guard;
};

INSTANTIATE_TEST_SUITE_P(Losses, InaccessibleMemory,
                         testing::Combine(testing::Values(Loss::protected_from_access, Loss::truncated_shared,
                                                          Loss::truncated_private, Loss::poisoned_marker,
                                                          Loss::memory_error, Loss::guard_page, Loss::unmapped),
                                          testing::Bool()),
                         [](const auto& info) {
                           return name_of(std::get<Loss>(info.param)) +
                                  (std::get<bool>(info.param) ? "_guarded" : "_by_kernel");
                         });

TEST_P(InaccessibleMemory, IsAnErrorToRead) {
  // Every alignment, of a few bytes and of several pages; the bytes before are there.
  for (const std::uint64_t before : {0U, 1U, 2U, 3U, 4U, 7U, 8U, 9U, 100U, 1000U, 4095U, 4096U, 4097U, 20000U}) {
    for (const std::uint64_t after : {1U, 8U, 700U, 5000U}) {
      std::vector<std::byte> into(before + after);
      expect_error(memory.read(GuestAddress(gone * page_size - before), into), before);
      EXPECT_TRUE(std::ranges::all_of(std::span(into).first(before), [](std::byte byte) { return byte == filled; }));
      EXPECT_TRUE(
          std::ranges::all_of(std::span(into).subspan(before), [](std::byte byte) { return byte == std::byte{}; }));
    }
  }
  EXPECT_EQ(memory.read_value<std::uint64_t>(GuestAddress(0)), 0x1111'1111'1111'1111U);
}

TEST_P(InaccessibleMemory, IsAnErrorToWrite) {
  for (const std::uint64_t before : {0U, 1U, 4U, 9U, 1000U, 4097U, 20000U}) {
    const std::vector<std::byte> data(before + 5000, std::byte(before % 251 + 1));
    const GuestAddress at(gone * page_size - before);
    expect_error(memory.write(at, data), before);
    EXPECT_TRUE(std::equal(own + gone * page_size - before, own + gone * page_size, data.begin()));
    expect_error(memory.load(at, data), before);
  }
}

TEST_P(InaccessibleMemory, IsAnErrorToReadAValue) {
  expect_error(memory.read_value<std::uint8_t>(GuestAddress(gone * page_size)), 0);
  expect_error(memory.read_value<std::uint64_t>(GuestAddress(gone * page_size)), 0);
  expect_error(memory.read_value<std::uint64_t>(GuestAddress(gone * page_size - 4)), 4);
}

TEST_P(InaccessibleMemory, IsAnErrorToWriteAValue) {
  expect_error(memory.write_value(GuestAddress(gone * page_size), std::uint8_t{1}), 0);
  expect_error(memory.write_value(GuestAddress(gone * page_size), std::uint64_t{1}), 0);
  expect_error(memory.write_value(GuestAddress(gone * page_size - 4), std::uint64_t{0x2222'2222'2222'2222}), 4);
  EXPECT_EQ(memory.read_value<std::uint32_t>(GuestAddress(gone * page_size - 4)), 0x2222'2222U);
}

TEST_P(InaccessibleMemory, IsKnownBeforeAWrite) {
  const auto map = memory.snapshot();
  expect_error(map->check_write(GuestAddress(gone * page_size), 1), 0);
  expect_error(map->check_write(GuestAddress(gone * page_size - 5000), 5001), 5000);
  EXPECT_TRUE(map->check_write(GuestAddress(0), gone * page_size));
  EXPECT_TRUE(std::all_of(own, own + gone * page_size, [](std::byte byte) { return byte == filled; }));
}

TEST_P(InaccessibleMemory, IsNotDiedOfInASurvey) {
  SurveyOptions options;
  options.content_check.emplace();
  const Survey survey = memory.survey(options);
  for (std::uint64_t page = 0; page < gone; ++page)
    EXPECT_FALSE(survey.zeroed().contains(PageNumber(page))) << page;
}

TEST_P(InaccessibleMemory, IsNotDiedOfInADiscard) {
  // Whatever becomes of it, what is there afterwards is zero or an error.
  if (const auto done = memory.reset(); !done) {
    EXPECT_GE(done.error().address, 0U);
    EXPECT_LT(done.error().address, bytes) << done.error().message();
  }
  for (std::uint64_t page = 0; page < count; ++page)
    if (const auto word = memory.read_value<std::uint64_t>(GuestAddress(page * page_size)))
      EXPECT_TRUE(*word == 0 || page >= gone) << page;
}

// Memory that can only be cleared: its file is sealed.
class InaccessibleSealedMemory : public testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Guard, InaccessibleSealedMemory, testing::Bool(),
                         [](const auto& info) { return info.param ? "guarded" : "by_kernel"; });

TEST_P(InaccessibleSealedMemory, IsAnErrorToClear) {
  const test::Descriptor file(memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(file.number(), bytes), 0);
  void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.number(), 0);
  ASSERT_NE(mapped, MAP_FAILED);
  auto* const own = static_cast<std::byte*>(mapped);
  ASSERT_EQ(fcntl(file.number(), F_ADD_SEALS, seal_future_write), 0);
  {
    const GuestMemory memory(
        *MemoryMap::make({*Region::adopt(GuestAddress(0), {own, bytes, Backing::memfd, file.number(), 0})}));
    std::fill_n(own, bytes, filled);
    ASSERT_EQ(mprotect(own + gone * page_size, page_size, PROT_NONE), 0);
    std::optional<FaultGuard> guard;
    if (GetParam()) guard.emplace(*FaultGuard::install());
    const auto done = memory.snapshot()->discard(PageSet(*PageRange::make(PageNumber(0), count)));
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code, MemoryErrc::inaccessible) << done.error().message();
    EXPECT_EQ(done.error().os_error, EFAULT);
    EXPECT_EQ(done.error().address, gone * page_size);
    EXPECT_EQ(memory.read_value<std::uint64_t>(GuestAddress(0)), 0U);
  }
  munmap(own, bytes);
}

// The pages are taken away after they were found present, and before they are read.
class InaccessibleContent : public testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Guard, InaccessibleContent, testing::Bool(),
                         [](const auto& info) { return info.param ? "guarded" : "by_kernel"; });

TEST_P(InaccessibleContent, IsNotDiedOf) {
  constexpr std::uint64_t size = 16 << 20;
  void* const own = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(own, MAP_FAILED);
  madvise(own, size, MADV_NOHUGEPAGE);
  std::memset(own, 0, size);
  {
    std::optional<FaultGuard> guard;
    if (GetParam()) guard.emplace(*FaultGuard::install());
    const GuestMemory memory(
        *MemoryMap::make({*Region::adopt(GuestAddress(0), {own, size, Backing::anonymous, -1, 0})}));
    SurveyOptions options;
    options.content_check.emplace();
    EXPECT_EQ(memory.survey(options).zeroed().page_count(), size / page_size);
    options.content_check->parallel_tasks = 1;
    options.content_check->executor = [&](const std::function<void()>&) {
      EXPECT_EQ(mprotect(static_cast<std::byte*>(own) + size / 2, page_size, PROT_NONE), 0);
    };
    const Survey survey = memory.survey(options);
    EXPECT_FALSE(survey.zeroed().contains(PageNumber(size / 2 / page_size)));
    ASSERT_TRUE(survey.regions.front().content);
    const auto& error = survey.regions.front().content->error;
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code, MemoryErrc::inaccessible) << error->message();
    EXPECT_EQ(error->address, size / 2) << error->message();
    EXPECT_GE(survey.regions.front().content->absent_pages, 1U);
  }
  munmap(own, size);
}

// A buffer of ours on either side of a boundary between regions, one adopted, one not.
TEST(AdoptedMemory, IsCrossedToAndFrom) {
  void* const own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(own, MAP_FAILED);
  {
    const MemoryMap map =
        *MemoryMap::make({*Region::anonymous(GuestAddress(0), bytes),
                          *Region::adopt(GuestAddress(bytes), {own, bytes, Backing::anonymous, -1, 0})});
    std::vector<std::byte> data(3 * page_size + 11);
    for (std::size_t i = 0; i < data.size(); ++i)
      data[i] = static_cast<std::byte>(i * 7 + 1);
    const GuestAddress at(bytes - page_size - 3);
    ASSERT_TRUE(map.write(at, data));
    std::vector<std::byte> back(data.size());
    ASSERT_TRUE(map.read(at, back));
    EXPECT_EQ(back, data);
    ASSERT_EQ(mprotect(own, bytes, PROT_NONE), 0);
    const auto read = map.read(at, back);
    ASSERT_FALSE(read);
    EXPECT_EQ(read.error().completed, page_size + 3);
    EXPECT_EQ(read.error().address, bytes);
  }
  munmap(own, bytes);
}

// Firmware that is mapped without permission to write it.
TEST(AdoptedMemory, ThatIsReadOnlyIsAnErrorToLoad) {
  void* const own = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(own, MAP_FAILED);
  for (const bool guarded : {false, true}) {
    std::optional<FaultGuard> guard;
    if (guarded) guard.emplace(*FaultGuard::install());
    const MemoryMap map =
        *MemoryMap::make({*Region::adopt(GuestAddress(0), {own, bytes, Backing::anonymous, -1, 0}, RegionKind::rom)});
    const auto loaded = map.load(GuestAddress(page_size), std::as_bytes(std::span("firmware")));
    ASSERT_FALSE(loaded);
    EXPECT_EQ(loaded.error().code, MemoryErrc::inaccessible);
    EXPECT_EQ(loaded.error().address, page_size);
    EXPECT_EQ(map.read_value<char>(GuestAddress(page_size)), 0);
  }
  munmap(own, bytes);
}

} // namespace
