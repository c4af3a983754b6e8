module;
#include <cstddef>
#include <cstdint>
#include <memory>
export module cppvmm.guest_memory:region;
import :address;
import :error;

namespace cppvmm {

/// What holds a region's bytes on the host.
export enum class Backing : std::uint8_t {
  anonymous, ///< A private anonymous mapping.
  memfd,     ///< A shared mapping of a memfd of its own: another process can be given the descriptor (vhost-user).
  hugetlb,   ///< A private anonymous mapping of hugetlb pages.
  adopted,   ///< The embedder's own mapping.
};

/// What the guest may do with a region.
export enum class RegionKind : std::uint8_t {
  ram,
  rom, ///< The guest reads it; guest-side writes are refused. Never reported as zeroed.
};

export enum class HugePageSize : std::uint64_t {
  two_mib = std::uint64_t{2} << 20,
  one_gib = std::uint64_t{1} << 30,
};

/// What an embedder states about memory that it mapped itself. The statement decides which evidence counts, so that a
/// wrong one could make a page with data pass for zeroed: it is compared with /proc/self/maps at adoption and again by
/// every survey, and memory that does not fit it counts as touched.
export enum class AdoptedNature : std::uint8_t {
  unknown,           ///< Nothing is promised: every page counts as touched.
  private_anonymous, ///< MAP_PRIVATE | MAP_ANONYMOUS (not hugetlb), nothing else mapped over it.
  shared_memory,     ///< MAP_SHARED of a memfd or tmpfs file (not hugetlb), whose descriptor is given.
};

export struct AdoptedMemory {
  void* host_address = nullptr; ///< Page-aligned; stays mapped as it is while any copy of the Region lives.
  std::uint64_t bytes = 0;      ///< A multiple of 4 KiB.
  AdoptedNature nature = AdoptedNature::unknown;
  int fd = -1;                 ///< For shared_memory: the file; it is opened anew, the embedder keeps this one.
  std::uint64_t fd_offset = 0; ///< For shared_memory: where in the file the region starts; a multiple of 4 KiB.
};

/// A range of guest-physical addresses and the host memory behind it. A cheap handle: copies share the memory, which
/// is unmapped with the last of them. Immutable, and so safe to use from any thread.
///
/// Memory of every region reads zero when it is made (adopted memory as it was). Making one fails with
/// invalid_argument (no bytes; address or size not a multiple of 4 KiB, for hugetlb size not of the huge page),
/// out_of_range, unavailable (this host has no such pages to give) or os.
///
/// Memory that a userfaultfd handler fills on demand must not be handed out as anonymous or memfd: its missing pages
/// look like untouched ones. Adopt it as AdoptedNature::unknown.
export class Region {
public:
  [[nodiscard]] static MemoryResult<Region> anonymous(GuestAddress start, std::uint64_t bytes,
                                                      RegionKind kind = RegionKind::ram);
  /// The memfd is sealed against shrinking and growing, so that no access can meet its end.
  [[nodiscard]] static MemoryResult<Region> memfd(GuestAddress start, std::uint64_t bytes,
                                                  RegionKind kind = RegionKind::ram);
  /// Huge pages are reserved from the host's pool here; `unavailable` when it has too few.
  [[nodiscard]] static MemoryResult<Region> hugetlb(GuestAddress start, std::uint64_t bytes, HugePageSize page,
                                                    RegionKind kind = RegionKind::ram);
  /// Hands over the embedder's mapping; wrong_nature when /proc/self/maps shows another kind than stated.
  [[nodiscard]] static MemoryResult<Region> adopt(GuestAddress start, const AdoptedMemory& memory,
                                                  RegionKind kind = RegionKind::ram);

  [[nodiscard]] PageRange pages() const;
  [[nodiscard]] GuestAddress start() const { return pages().start_address(); }
  [[nodiscard]] std::uint64_t bytes() const { return pages().bytes(); }
  [[nodiscard]] RegionKind kind() const;
  [[nodiscard]] Backing backing() const;
  [[nodiscard]] AdoptedNature nature() const; ///< Of adopted memory; unknown for the rest.
  /// Where the region starts in this process. For KVM memory slots and the like; guest and other processes may write
  /// behind it at any time, so never make a C++ reference into it: read and write through MemoryMap.
  [[nodiscard]] void* host_address() const;
  /// The file behind it, or -1; owned by the region. To be shared with other processes, not to be read, written or
  /// resized here.
  [[nodiscard]] int file_descriptor() const;
  [[nodiscard]] std::uint64_t file_offset() const;

  /// Host memory that the region holds now, in bytes: allocated blocks of the memfd, else the resident set in
  /// /proc/self/smaps. Walks page tables: for reports, not for hot paths.
  [[nodiscard]] MemoryResult<std::uint64_t> resident_bytes() const;
  /// The part of the resident set that is in transparent huge pages (AnonHugePages and ShmemPmdMapped in smaps).
  [[nodiscard]] MemoryResult<std::uint64_t> huge_page_bytes() const;

  /// Whether both are handles to the same memory at the same address.
  friend bool operator==(const Region& left, const Region& right) { return left.mapping_ == right.mapping_; }

private:
  struct Mapping;
  explicit Region(std::shared_ptr<const Mapping> mapping);
  std::shared_ptr<const Mapping> mapping_;
};

} // namespace cppvmm
