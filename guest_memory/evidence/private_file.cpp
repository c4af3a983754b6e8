module;
#include <algorithm>
#include <cstdint>
#include <expected>
#include <functional>
#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:private_file.impl;
import :address;
import :error;
import :evidence;
import :file_data;
import :page_evidence;
import :proc_maps;

namespace cppvmm {

/// The parts of a private file mapping that are anonymous memory by now, in pages from its start: disjoint, ascending.
static MemoryResult<std::vector<Extent>> anonymous_parts(const FileMapping& memory) {
  const auto start = reinterpret_cast<std::uintptr_t>(memory.host);
  const std::uint64_t end = start + memory.bytes;
  std::vector<Extent> parts;
  // Mappings that change while they are listed can overlap, and the first and last can reach beyond the memory. A page
  // that is listed twice counts as what it was first, for it was that after the listing began.
  std::uint64_t listed = start;
  auto walked = for_each_listed_mapping(start, memory.bytes, [&](const ListedMapping& mapping) {
    const std::uint64_t from = std::max(listed, mapping.start);
    const std::uint64_t to = std::min(end, mapping.end);
    if (from < to && mapping.is_private && mapping.inode == 0)
      parts.push_back({(from - start) / page_size, (to - from) / page_size});
    listed = std::max(listed, mapping.end);
    return true;
  });
  if (!walked) return std::unexpected(walked.error());
  return parts;
}

static std::vector<Extent> intersection(const std::vector<Extent>& left, const std::vector<Extent>& right) {
  std::vector<Extent> both;
  for (auto l = left.begin(), r = right.begin(); l != left.end() && r != right.end();) {
    const std::uint64_t first = std::max(l->first, r->first);
    const std::uint64_t end = std::min(l->end(), r->end());
    if (first < end) both.push_back({first, end - first});
    if (l->end() < r->end())
      ++l;
    else
      ++r;
  }
  return both;
}

static ExtentList difference(const ExtentList& list, const std::vector<Extent>& without) {
  ExtentList rest;
  auto next = without.begin();
  for (const Extent extent : list) {
    std::uint64_t at = extent.first;
    while (next != without.end() && next->end() <= at)
      ++next;
    for (auto part = next; part != without.end() && part->first < extent.end(); ++part) {
      if (part->first > at) rest.add({at, part->first - at});
      at = std::max(at, part->end());
    }
    if (at < extent.end()) rest.add({at, extent.end() - at});
  }
  return rest;
}

// A page holds data if the file has some for it, unless the page is anonymous by now, or if it has a private copy or an
// anonymous page: of both, own page tables have an entry that is not the file's.
//
// Pages may be discarded, and so become anonymous, at any time during the survey. Where the file's data is left out,
// the page was anonymous before the page tables were looked at and after. If it was so all the time, an entry or none
// tells all. If it was not (someone mapped the file again, and discarded it once more), it was discarded during the
// survey. Where a page became anonymous meanwhile, the file's data counts although it is gone. What was written since
// then, to the anonymous page, has an entry, as a private copy had before.
RegionEvidence private_file_evidence(const FileMapping& mapping, EvidenceSource source) {
  const auto failed = [](const MemoryError& error) {
    RegionEvidence result;
    result.error = error;
    return result;
  };
  const auto before = anonymous_parts(mapping);
  if (!before) return failed(before.error());
  const bool was_read = mapping.data != nullptr;
  RegionEvidence file =
      was_read ? file_data_evidence(*mapping.data) : page_cache_evidence(mapping, FileChanges::never, source);
  if (file.kind == Evidence::none) return file;
  RegionEvidence copies = page_table_evidence(mapping.host, mapping.bytes, PageEntries::private_copies, source);
  if (copies.kind == Evidence::none) return copies;
  if (!before->empty()) {
    const auto after = anonymous_parts(mapping);
    if (!after) return failed(after.error());
    const std::vector<Extent> anonymous = intersection(*before, *after);
    for (ExtentList& list : file.touched)
      list = difference(list, anonymous);
  }
  file.kind = was_read ? Evidence::file_content : Evidence::file_holes;
  std::ranges::move(copies.touched, std::back_inserter(file.touched));
  return file;
}

} // namespace cppvmm
