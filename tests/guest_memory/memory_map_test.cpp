#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <gtest/gtest.h>
#include <optional>
#include <span>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>
import cppvmm.guest_memory;

using namespace cppvmm;

namespace {

constexpr std::uint64_t mib = 1 << 20;

/// RAM at 0, RAM that touches it at 1 MiB, a hole at 2 MiB, ROM at 3 MiB.
class Access : public testing::Test {
protected:
  Region low = *Region::anonymous(GuestAddress(0), mib);
  Region next = *Region::memfd(GuestAddress(mib), mib);
  Region rom = *Region::anonymous(GuestAddress(3 * mib), mib, RegionKind::rom);
  MemoryMap map = *MemoryMap::make({rom, next, low});

  static std::vector<std::byte> pattern(std::size_t bytes) {
    std::vector<std::byte> data(bytes);
    for (std::size_t i = 0; i < bytes; ++i)
      data[i] = static_cast<std::byte>(i * 7 + 1);
    return data;
  }
};

TEST_F(Access, CrossesRegionsThatTouch) {
  // Every alignment of start and length, over the boundary.
  for (std::size_t before = 0; before < 20; ++before) {
    for (std::size_t bytes = 0; bytes < 40; ++bytes) {
      const auto data = pattern(bytes);
      const GuestAddress at(mib - before);
      ASSERT_TRUE(map.write(at, data));
      std::vector<std::byte> back(bytes);
      ASSERT_TRUE(map.read(at, back));
      ASSERT_EQ(back, data) << before << " bytes before the boundary, " << bytes << " bytes";
    }
  }
}

TEST_F(Access, WritesNothingBesideItsRange) {
  const auto data = pattern(61);
  for (std::size_t offset = 0; offset < 16; ++offset) {
    std::array<std::byte, 100> zero{};
    ASSERT_TRUE(map.write(GuestAddress(0x1000), zero));
    ASSERT_TRUE(map.write(GuestAddress(0x1000 + offset), data));
    std::array<std::byte, 100> all{};
    ASSERT_TRUE(map.read(GuestAddress(0x1000), all));
    for (std::size_t i = 0; i < all.size(); ++i)
      ASSERT_EQ(all[i], i >= offset && i < offset + data.size() ? data[i - offset] : std::byte{}) << i;
  }
}

TEST_F(Access, SaysHowFarItCame) {
  const auto data = pattern(0x3000);
  const auto written = map.write(GuestAddress(2 * mib - 0x1000), data);
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().code, MemoryErrc::not_backed);
  EXPECT_EQ(written.error().completed, 0x1000U);
  EXPECT_EQ(written.error().address, 2 * mib);
  std::vector<std::byte> back(0x1000);
  ASSERT_TRUE(map.read(GuestAddress(2 * mib - 0x1000), back));
  EXPECT_TRUE(std::equal(back.begin(), back.end(), data.begin()));
}

TEST_F(Access, LeavesRomToTheHost) {
  EXPECT_EQ(map.write_value(GuestAddress(3 * mib), std::uint32_t{7}).error().code, MemoryErrc::read_only);
  EXPECT_EQ(*map.read_value<std::uint32_t>(GuestAddress(3 * mib)), 0U);
  EXPECT_EQ(map.check_write(GuestAddress(3 * mib), 1).error().code, MemoryErrc::read_only);
  ASSERT_TRUE(map.load(GuestAddress(3 * mib), std::as_bytes(std::span("firmware"))));
  EXPECT_EQ(*map.read_value<char>(GuestAddress(3 * mib)), 'f');
}

TEST_F(Access, RefusesWhatNoGuestHas) {
  std::array<std::byte, 16> data{};
  for (const std::uint64_t address :
       {2 * mib, guest_space_end - 8, guest_space_end, UINT64_MAX - 7, UINT64_MAX, std::uint64_t{1} << 63}) {
    EXPECT_FALSE(map.read(GuestAddress(address), data)) << std::hex << address;
    EXPECT_FALSE(map.write(GuestAddress(address), data)) << std::hex << address;
    EXPECT_FALSE(map.check_write(GuestAddress(address), 16)) << std::hex << address;
  }
  EXPECT_EQ(map.check_write(GuestAddress(0), UINT64_MAX).error().code, MemoryErrc::out_of_range);
  EXPECT_TRUE(map.check_write(GuestAddress(0), 2 * mib));
  EXPECT_FALSE(map.check_write(GuestAddress(0), 2 * mib + 1));
}

TEST(MemoryMap, RefusesOverlaps) {
  const Region first = *Region::anonymous(GuestAddress(0), 2 * mib);
  const Region inside = *Region::anonymous(GuestAddress(mib), 0x1000);
  const auto map = MemoryMap::make({inside, first});
  ASSERT_FALSE(map);
  EXPECT_EQ(map.error().code, MemoryErrc::overlap);
  EXPECT_EQ(map.error().address, mib);
  EXPECT_FALSE(MemoryMap::make({first, first}));
}

// A page known under two numbers could be left out under one and reported under the other.
TEST(MemoryMap, RefusesRamThatIsThereTwice) {
  void* host = mmap(nullptr, 2 * mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const auto adopt = [&](std::uint64_t start, std::uint64_t offset, RegionKind kind = RegionKind::ram) {
    return *Region::adopt(GuestAddress(start), {static_cast<char*>(host) + offset, mib, Backing::anonymous}, kind);
  };
  const auto refused = MemoryMap::make({adopt(0, 0), adopt(16 * mib, mib / 2)});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, MemoryErrc::overlap);
  EXPECT_EQ(refused.error().address, 16 * mib);
  EXPECT_TRUE(MemoryMap::make({adopt(0, 0), adopt(16 * mib, mib)}));
  // Firmware is often there twice.
  EXPECT_TRUE(MemoryMap::make({adopt(0, 0, RegionKind::rom), adopt(16 * mib, 0, RegionKind::rom)}));

  const int fd = memfd_create("twice", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, 2 * mib), 0);
  void* once = mmap(nullptr, 2 * mib, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  void* again = mmap(nullptr, 2 * mib, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const Region first = *Region::adopt(GuestAddress(0), {once, mib, Backing::memfd, fd, 0});
  const Region second = *Region::adopt(GuestAddress(4 * mib), {again, mib, Backing::memfd, fd, 0});
  const Region other_half =
      *Region::adopt(GuestAddress(4 * mib), {static_cast<char*>(again) + mib, mib, Backing::memfd, fd, mib});
  EXPECT_EQ(MemoryMap::make({first, second}).error().code, MemoryErrc::overlap);
  EXPECT_TRUE(MemoryMap::make({first, other_half}));
  munmap(host, 2 * mib);
  munmap(once, 2 * mib);
  munmap(again, 2 * mib);
  close(fd);
}

TEST(MemoryMap, IsChangedByMakingAnother) {
  const MemoryMap one = *MemoryMap::make({*Region::anonymous(GuestAddress(0), mib)});
  const MemoryMap two = *one.with(*Region::anonymous(GuestAddress(mib), mib));
  EXPECT_EQ(one.regions().size(), 1U);
  EXPECT_EQ(two.regions().size(), 2U);
  EXPECT_FALSE(two.without(GuestAddress(0x1000)));
  EXPECT_EQ(two.without(GuestAddress(0))->regions().front().start(), GuestAddress(mib));
}

TEST(Region, RefusesSizesAndAddressesThatCannotBe) {
  EXPECT_EQ(Region::anonymous(GuestAddress(0), 0).error().code, MemoryErrc::invalid_argument);
  EXPECT_EQ(Region::anonymous(GuestAddress(0), 100).error().code, MemoryErrc::invalid_argument);
  EXPECT_EQ(Region::memfd(GuestAddress(0x800), 0x1000).error().code, MemoryErrc::invalid_argument);
  EXPECT_EQ(Region::memfd(GuestAddress(guest_space_end - 0x1000), 0x2000).error().code, MemoryErrc::out_of_range);
  EXPECT_EQ(Region::anonymous(GuestAddress(UINT64_MAX & ~0xFFFULL), 0x1000).error().code, MemoryErrc::out_of_range);
  EXPECT_EQ(Region::hugetlb(GuestAddress(0), 0x1000, HugePageSize::two_mib).error().code, MemoryErrc::invalid_argument);
}

TEST(Region, SaysWhenTheHostHasTooFewHugePages) {
  // More than any pool: 64 TiB of huge pages.
  const auto region = Region::hugetlb(GuestAddress(0), std::uint64_t{1} << 46, HugePageSize::one_gib);
  ASSERT_FALSE(region);
  EXPECT_EQ(region.error().code, MemoryErrc::unavailable);
  EXPECT_NE(region.error().os_error, 0);
}

TEST(Region, IsAsLargeAsAGuestWants) {
  const auto region = Region::anonymous(GuestAddress(0), std::uint64_t{1} << 40);
  ASSERT_TRUE(region) << region.error().message();
  EXPECT_LT(*region->resident_bytes(), mib);
}

TEST(Region, CountsWhatTheHostHolds) {
  for (const auto& region : {*Region::anonymous(GuestAddress(0), 8 * mib), *Region::memfd(GuestAddress(0), 8 * mib)}) {
    EXPECT_EQ(*region.resident_bytes(), 0U);
    madvise(region.host_address(), 8 * mib, MADV_NOHUGEPAGE);
    const MemoryMap map = *MemoryMap::make({region});
    ASSERT_TRUE(map.write(GuestAddress(mib), std::vector<std::byte>(mib)));
    EXPECT_EQ(*region.resident_bytes(), mib);
  }
}

TEST(Region, KeepsAMemfdAtItsSize) {
  const Region region = *Region::memfd(GuestAddress(0), mib);
  EXPECT_NE(ftruncate(region.file_descriptor(), 0), 0);
}

TEST(Adopt, TakesTheMappingItWasToldOf) {
  void* host = mmap(nullptr, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(host, MAP_FAILED);
  {
    const auto region =
        Region::adopt(GuestAddress(0), {.host_address = host, .bytes = mib, .backing = Backing::anonymous});
    ASSERT_TRUE(region) << region.error().message();
    const MemoryMap map = *MemoryMap::make({*region});
    ASSERT_TRUE(map.write_value(GuestAddress(8), std::uint64_t{5}));
  }
  // Still the embedder's after the region is gone.
  EXPECT_EQ(static_cast<volatile std::uint64_t*>(host)[1], 5U);
  munmap(host, mib);
}

TEST(Adopt, RefusesMemoryOfAnotherNature) {
  const int fd = memfd_create("test", 0);
  const int other = memfd_create("other", 0);
  ASSERT_EQ(ftruncate(fd, mib), 0);
  ASSERT_EQ(ftruncate(other, mib), 0);
  const auto map = [](int flags, int file) { return mmap(nullptr, mib, PROT_READ | PROT_WRITE, flags, file, 0); };
  void* shared = map(MAP_SHARED, fd);
  void* private_file = map(MAP_PRIVATE, fd);
  void* anonymous = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
  const auto code = [](const MemoryResult<Region>& region) {
    return region ? std::optional<MemoryErrc>() : region.error().code;
  };
  const auto adopt = [](void* host, Backing nature, int file = -1, std::uint64_t offset = 0,
                        std::uint64_t bytes = mib) {
    return Region::adopt(GuestAddress(0), {host, bytes, nature, file, offset});
  };
  EXPECT_EQ(code(adopt(shared, Backing::memfd, fd)), std::nullopt);
  EXPECT_EQ(code(adopt(shared, Backing::memfd, other)), MemoryErrc::wrong_nature);
  EXPECT_EQ(code(adopt(shared, Backing::memfd, fd, 0x1000, mib - 0x1000)), MemoryErrc::wrong_nature);
  EXPECT_EQ(code(adopt(static_cast<char*>(shared) + 0x1000, Backing::memfd, fd, 0x1000, mib - 0x1000)), std::nullopt);
  EXPECT_EQ(code(adopt(shared, Backing::anonymous)), MemoryErrc::wrong_nature);
  EXPECT_EQ(code(adopt(private_file, Backing::anonymous)), MemoryErrc::wrong_nature);
  EXPECT_EQ(code(adopt(private_file, Backing::memfd, fd)), MemoryErrc::wrong_nature);
  EXPECT_EQ(code(adopt(anonymous, Backing::anonymous)), std::nullopt);
  EXPECT_EQ(code(adopt(shared, Backing::memfd)), MemoryErrc::invalid_argument);
  EXPECT_EQ(code(adopt(anonymous, Backing::anonymous, fd)), MemoryErrc::invalid_argument);
  EXPECT_EQ(code(adopt(nullptr, Backing::unknown)), MemoryErrc::invalid_argument);
  munmap(static_cast<char*>(anonymous) + mib / 2, 0x1000);
  EXPECT_EQ(code(adopt(anonymous, Backing::anonymous)), MemoryErrc::wrong_nature);
  munmap(shared, mib);
  munmap(private_file, mib);
  munmap(anonymous, mib);
  close(fd);
  close(other);
}

TEST(Adopt, RefusesRamThatCannotBeWritten) {
  void* host = mmap(nullptr, mib, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (const Backing backing : {Backing::anonymous, Backing::unknown}) {
    EXPECT_EQ(Region::adopt(GuestAddress(0), {host, mib, backing}).error().code, MemoryErrc::wrong_nature);
    EXPECT_TRUE(Region::adopt(GuestAddress(0), {host, mib, backing}, RegionKind::rom));
  }
  munmap(host, mib);
  EXPECT_FALSE(Region::adopt(GuestAddress(0), {host, mib, Backing::unknown}));
}

TEST(Adopt, CountsWhatTheHostHoldsOfAPartOfAMapping) {
  void* host = mmap(nullptr, 4 * mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(host, 4 * mib, MADV_NOHUGEPAGE);
  std::memset(host, 1, 2 * mib);
  const Region region = *Region::adopt(GuestAddress(0), {static_cast<char*>(host) + mib, 2 * mib, Backing::anonymous});
  EXPECT_EQ(*region.resident_bytes(), mib);
  EXPECT_EQ(region.huge_page_bytes().error().code, MemoryErrc::unavailable);
  munmap(host, 4 * mib);
}

TEST(GuestMemory, ReplacesTheMapWholeWhileOthersRead) {
  // Each map has the same number in both of its pages; a reader that saw two maps at once would see two numbers.
  const auto numbered = [](std::uint64_t number) {
    const MemoryMap map = *MemoryMap::make(
        {*Region::anonymous(GuestAddress(0), 0x1000), *Region::anonymous(GuestAddress(0x1000), 0x1000)});
    EXPECT_TRUE(map.write_value(GuestAddress(0), number));
    EXPECT_TRUE(map.write_value(GuestAddress(0x1000), number));
    return map;
  };
  GuestMemory memory(numbered(0));
  std::atomic<bool> stop = false;
  std::atomic<int> torn = 0;
  std::vector<std::thread> readers;
  for (int i = 0; i < 2; ++i)
    readers.emplace_back([&] {
      while (!stop) {
        const auto map = memory.snapshot();
        if (*map->read_value<std::uint64_t>(GuestAddress(0)) != *map->read_value<std::uint64_t>(GuestAddress(0x1000)))
          ++torn;
      }
    });
  for (std::uint64_t number = 1; number < 300; ++number)
    memory.replace(numbered(number));
  stop = true;
  for (auto& reader : readers)
    reader.join();
  EXPECT_EQ(torn, 0);
}

TEST(GuestMemory, LosesNoConcurrentChange) {
  GuestMemory memory;
  std::vector<std::thread> adders;
  for (std::uint64_t thread = 0; thread < 4; ++thread)
    adders.emplace_back([&memory, thread] {
      for (std::uint64_t i = 0; i < 25; ++i)
        EXPECT_TRUE(memory.add_region(*Region::anonymous(GuestAddress((thread * 25 + i) * 0x1000), 0x1000)));
    });
  for (auto& adder : adders)
    adder.join();
  EXPECT_EQ(memory.snapshot()->regions().size(), 100U);
  EXPECT_FALSE(memory.add_region(*Region::anonymous(GuestAddress(0x5000), 0x1000)));
  EXPECT_TRUE(memory.remove_region(GuestAddress(0x5000)));
  EXPECT_EQ(memory.remove_region(GuestAddress(0x5000)).error().code, MemoryErrc::not_backed);
}

} // namespace
