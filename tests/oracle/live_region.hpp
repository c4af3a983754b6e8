// A region of a case as it lives: its memory, and what the model knows of each of its pages. Include it after all other
// headers: it imports cppvmm.guest_memory.
#pragma once

#include "case.hpp"

#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <string>
#include <vector>

import cppvmm.guest_memory;

namespace cppvmm::oracle {

/// Why a zero page may be missing from an answer. What is missing for no reason is a failure.
enum class Reason : std::uint8_t {
  none,
  written,         ///< Written: zeros, or data that was overwritten with zeros.
  read,            ///< Read where reading allocates, or where the kernel cannot tell a read from a write.
  populated,       ///< Populated, locked or collapsed into a huge page beforehand.
  huge_page,       ///< A neighbour in the same huge page (or block of the file) was touched.
  no_evidence,     ///< Nothing proves anything of the whole region.
  marked,          ///< Marked as touched by the embedder.
  left_out,        ///< Named in SurveyOptions::leave_out.
  output_page,     ///< Holds the answer.
  beyond_255,      ///< In a range that is smaller than the 255 largest.
  absent,          ///< Its content could not be read: swapped out, or of a disk's file and not mapped.
  protection_left, ///< A watched huge page of the pool was discarded by the embedder: its protection stays.
};
inline constexpr unsigned reason_kinds = 12;
[[nodiscard]] const char* to_string(Reason reason);

/// What a page is known to hold.
enum class Content : std::uint8_t { zero, data, any };

/// What decides about all of a region.
struct RegionFacts {
  bool allocated_unwritten = false; ///< By fallocate(2).
  bool given_up = false;            ///< Some of it, by MADV_FREE.
  bool collapsed = false;           ///< Some of it may be, into huge pages, by MADV_COLLAPSE.
  bool paged_out = false;
  bool replaced = false;     ///< Anonymous memory took the place of parts of a private file.
  bool library_huge = false; ///< Huge pages were asked for through the Region.
};

/// What, beside evidence, proves pages of a region zero.
enum class Proof : std::uint8_t {
  none,
  watch,
  log, ///< A complete one.
};

/// Who wrote, as bits.
inline constexpr std::uint8_t by_host_accessor = 1;
inline constexpr std::uint8_t by_vcpu = 2;
/// Not a writer: KVM maps a page that a guest reads writable if it can, and logs it then (Linux
/// arch/x86/kvm/mmu/spte.c, make_spte).
inline constexpr std::uint8_t read_by_vcpu = 4;

class LiveRegion {
public:
  /// One line for a person when the host has no such memory.
  [[nodiscard]] static std::expected<std::unique_ptr<LiveRegion>, std::string> make(const RegionSpec& spec,
                                                                                    std::uint64_t first_page);
  LiveRegion(const LiveRegion&) = delete;
  LiveRegion& operator=(const LiveRegion&) = delete;
  ~LiveRegion();

  [[nodiscard]] const RegionSpec& spec() const { return spec_; }
  [[nodiscard]] const Region& region() const { return *region_; }
  [[nodiscard]] std::uint64_t first_page() const { return first_page_; }
  [[nodiscard]] std::uint32_t pages() const { return spec_.pages; }
  [[nodiscard]] std::byte* host(std::uint64_t page) const;
  /// The file that another process can be given, or -1; and where page 0 is in it.
  [[nodiscard]] int file() const { return file_; }
  [[nodiscard]] std::uint64_t file_offset() const { return file_offset_; }
  [[nodiscard]] bool is_locked() const { return is_locked_; }

  /// Whether pages come and go in units of 2 MiB.
  [[nodiscard]] bool is_coarse() const;

  /// The model. A page that was written, by value.
  void wrote(std::uint32_t page, std::uint32_t count, Content content);
  void touched(std::uint32_t page, std::uint32_t count, Reason why);
  /// Discarded: what the file holds, or nothing.
  void discarded(std::uint32_t page, std::uint32_t count, bool by_library = false);
  /// By the library, which sees to it that a file's data does not come back. Of `may_be_cleared` pages some still have
  /// memory, with zeros in it.
  void discarded_by_library(std::uint32_t page, std::uint32_t count, bool may_be_cleared);
  /// MADV_FREE: whether the content is gone is not known.
  void freed(std::uint32_t page, std::uint32_t count);
  [[nodiscard]] Content content(std::uint32_t page) const { return contents_[page]; }
  void set_content(std::uint32_t page, Content content) { contents_[page] = content; }
  /// Why the page may be missing, all things considered but those that concern the answer.
  [[nodiscard]] Reason reason(std::uint32_t page, SurveyMode mode) const;
  /// Whether it has private anonymous memory where the embedder has mapped it, without guard pages. Of such mappings
  /// that are alike and lie side by side the kernel makes one.
  [[nodiscard]] bool may_be_merged() const;
  /// Whether a page of `neighbour` that is, or was, in use can have brought this one, in a huge page over the end of
  /// both.
  [[nodiscard]] bool may_come_with(std::uint32_t page, const LiveRegion& neighbour) const;
  RegionFacts facts;

  /// Pages whose content can be read without bringing anything in, as things are now.
  [[nodiscard]] std::vector<bool> readable() const;
  /// A watch or log begins. With a promised baseline all pages count as zero.
  void begin_proof(Proof proof, bool is_promised);
  /// By Region::set_huge_pages; for good, as there is no way back for what is there already.
  void wants_huge_pages() {
    spec_.thp = Thp::wanted;
    facts.library_huge = true;
  }
  void end_proof() { proof_ = Proof::none; }
  [[nodiscard]] Proof proof() const { return proof_; }
  /// Whether the watch or log has to know that the page is zero.
  [[nodiscard]] bool is_proven(std::uint32_t page) const {
    if (proof_ == Proof::log && (writers_[page] & read_by_vcpu) != 0) return false;
    return proof_ != Proof::none && proven_[page];
  }

  /// Who wrote which page since a log began.
  void forget_writers() { writers_.assign(writers_.size(), 0); }
  void written_by(std::uint32_t page, std::uint32_t count, std::uint8_t who);
  [[nodiscard]] std::uint8_t writers(std::uint32_t page) const { return writers_[page]; }

private:
  LiveRegion() = default;
  /// Whether its private anonymous memory comes in units of 2 MiB.
  [[nodiscard]] bool gets_huge_pages() const;
  [[nodiscard]] std::expected<void, std::string> open_snapshot(std::uint64_t slice);
  [[nodiscard]] std::expected<void, std::string> prepare();
  [[nodiscard]] std::uint32_t window() const;
  /// Where page 0 is in the first window that it is in.
  [[nodiscard]] std::uint32_t window_base() const;
  [[nodiscard]] bool reads_leave_no_trace(SurveyMode mode) const;
  void disprove(std::uint32_t page, std::uint32_t count);

  RegionSpec spec_;
  std::uint64_t first_page_ = 0;
  std::unique_ptr<Region> region_;
  void* own_ = nullptr; ///< To unmap.
  std::size_t own_bytes_ = 0;
  int own_fd_ = -1; ///< To close.
  int file_ = -1;
  std::uint64_t file_offset_ = 0;
  bool is_locked_ = false;
  std::vector<Content> file_contents_; ///< What the file of a private mapping holds.
  std::vector<Content> contents_;
  std::vector<Reason> reasons_;
  std::vector<bool> ever_touched_;
  Proof proof_ = Proof::none;
  std::vector<bool> proven_;
  std::vector<std::uint8_t> writers_;
};

} // namespace cppvmm::oracle
