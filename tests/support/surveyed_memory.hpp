// A little memory of each kind, with data in it that a survey must show. Include it after all other headers: it imports
// cppvmm.guest_memory.
#pragma once

#include <cstdint>
#include <fcntl.h>
#include <optional>
#include <ostream>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#include <gtest/gtest.h>

#include "descriptor.hpp"
#include "huge_pages.hpp"
#include "machine_facts.hpp"
#include "temporary_file.hpp"

import cppvmm.guest_memory;

namespace cppvmm::test {

struct MemoryKind {
  const char* name;
  Backing backing;
  EvidenceSource source = EvidenceSource::automatic;
  bool is_transparent_huge = false; ///< It asks for transparent huge pages; the others do without.
};

inline void PrintTo(const MemoryKind& kind, std::ostream* out) { *out << kind.name; }

/// 4 MiB of a kind at guest-physical 0, with data in page 5 and, unless in huge pages, in every eighth of the second
/// half. Skips, saying why, where this machine has no such memory.
class SurveyedMemory : public testing::Test {
protected:
  static constexpr std::uint64_t bytes = 4 << 20;
  static constexpr std::uint64_t count = bytes / page_size;

  [[nodiscard]] virtual MemoryKind kind() const = 0;

  void SetUp() override {
    if (kind().is_transparent_huge && !machine_facts().gives_huge_pages)
      GTEST_SKIP() << "the host gives no transparent huge pages";
    if (is_hugetlb()) {
      auto taken = HugePagePool::take();
      if (!taken) GTEST_SKIP() << taken.error();
      pool.emplace(std::move(*taken));
    }
    if (is_file()) {
      const auto made = temporary_file();
      ASSERT_TRUE(made) << made.error();
      file = Descriptor(*made);
      ASSERT_EQ(ftruncate(file.number(), bytes), 0);
      const FileFacts facts = file_facts(file.number());
      if (!facts.tell_the_truth()) GTEST_SKIP() << "files here do not tell the truth";
      if (backing() == Backing::shared_file && facts.in_memory) GTEST_SKIP() << "files here are of a memfd's kind";
    }
    auto made = make();
    ASSERT_TRUE(made) << made.error().message();
    region.emplace(*made);
    memory.replace(*MemoryMap::make({*region}));
    advise();
    store_data();
    // In small pages, khugepaged might collapse it at any time.
    if (kind().is_transparent_huge && huge_page_bytes(region->host_address()).value_or(0) == 0)
      GTEST_SKIP() << "the kernel gave no huge page";
  }
  void TearDown() override {
    memory.replace({});
    region.reset();
    if (own != nullptr) munmap(own, bytes);
  }

  MemoryResult<Region> make() {
    const GuestAddress start(0);
    switch (backing()) {
    case Backing::anonymous:
      return Region::anonymous(start, bytes);
    case Backing::memfd:
      return Region::memfd(start, bytes);
    case Backing::hugetlb:
      return Region::hugetlb(start, bytes, HugePageSize::two_mib);
    case Backing::hugetlb_memfd:
      return Region::hugetlb_memfd(start, bytes, HugePageSize::two_mib);
    case Backing::private_file:
      return Region::private_file(start, bytes, file.number(), 0);
    default:
      if (own == nullptr)
        own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (is_file() ? 0 : MAP_ANONYMOUS), file.number(),
                   0);
      EXPECT_NE(own, MAP_FAILED);
      return Region::adopt(start, {own, bytes, backing(), file.number(), 0});
    }
  }

  [[nodiscard]] Backing backing() const { return kind().backing; }
  [[nodiscard]] bool is_hugetlb() const { return backing() == Backing::hugetlb || backing() == Backing::hugetlb_memfd; }
  [[nodiscard]] bool is_huge() const { return is_hugetlb() || kind().is_transparent_huge; }
  [[nodiscard]] bool is_file() const { return backing() == Backing::private_file || backing() == Backing::shared_file; }
  void store(std::uint64_t page) const { static_cast<volatile char*>(region->host_address())[page * page_size] = 1; }
  void advise() const {
    madvise(region->host_address(), bytes, kind().is_transparent_huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  }
  void store_data() const {
    store(5);
    for (std::uint64_t page = count / 2; page < count && !is_huge(); page += 8)
      store(page);
  }
  [[nodiscard]] SurveyOptions options() const { return {.leave_out = {}, .source = kind().source}; }

  std::optional<HugePagePool> pool;
  Descriptor file;
  void* own = nullptr;
  std::optional<Region> region;
  GuestMemory memory;
};

} // namespace cppvmm::test
