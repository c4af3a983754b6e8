// cppvmm-machine-facts: what the tests know of this machine, a line a fact. Needs no file but /proc, /sys and a folder
// for temporary files.
#include "machine_facts.hpp"

#include <cstdio>
#include <initializer_list>
#include <string>
#include <utility>

using namespace cppvmm::test;

namespace {

void line(const char* what, const std::string& found) { std::printf("%-44s %s\n", what, found.c_str()); }

std::string yes_or_no(bool found) { return found ? "yes" : "no"; }

/// Those of them that are so, and after them those that are not.
std::string sorted(std::initializer_list<std::pair<const char*, bool>> all) {
  std::string has;
  std::string lacks;
  for (const auto& [name, found] : all)
    (found ? has : lacks) += std::string(" ") + name;
  std::string text = has.empty() ? "none" : has.substr(1);
  if (!lacks.empty()) text += "; not" + lacks;
  return text;
}

std::string words(ReadOfAbsent read) {
  switch (read) {
  case ReadOfAbsent::shared_zero_page:
    return "the page of zeros that all share";
  case ReadOfAbsent::own_page:
    return "a page of its own";
  case ReadOfAbsent::unknown:
    break;
  }
  return "not known";
}

std::string words(const std::string& policy) { return policy.empty() ? "none" : policy; }

std::string words(const HugePoolFacts& pool) {
  if (pool.pages < 0) return "none of that size";
  return std::to_string(pool.pages) + ", " + std::to_string(pool.free) +
         " free; its size can be set: " + yes_or_no(pool.is_writable);
}

std::string words(const FileFacts& files) {
  if (!files.can_be_made) return "cannot be made";
  return std::string(files.in_memory ? "in memory" : "on a disk") + ", holes told: " + yes_or_no(files.tell_holes) +
         ", a read makes data: " + yes_or_no(files.reads_make_data) + ", a byte makes " +
         std::to_string(files.data_bytes) + " of data, blocks of " + std::to_string(files.block_bytes) +
         ", named as in maps: " + yes_or_no(files.named_by_fstat) +
         ", pages known: " + yes_or_no(files.pages_are_known);
}

} // namespace

int main() {
  const MachineFacts& facts = machine_facts();
  line("kernel", facts.kernel);
  line("root", yes_or_no(facts.is_root));
  line("KVM", facts.kvm_missing.empty() ? "usable" : "none: " + facts.kvm_missing);
  line("KVM's own Hyper-V", yes_or_no(facts.kvm_hyperv));
  line("KVM forwards extended hypercalls", yes_or_no(facts.kvm_forwards));
  line("page tables", sorted({{"PAGEMAP_SCAN", facts.pagemap_scan},
                              {"map_files", facts.map_files},
                              {"kinds of entries", facts.entry_kinds}}));
  line("page cache", sorted({{"cachestat", facts.cachestat}, {"mincore", facts.mincore}}));
  line("a read of an absent page gives", words(facts.read_of_absent));
  line("  a survey tells it from a write", yes_or_no(facts.reads_told_apart));
  line("  where huge pages are asked for",
       words(facts.huge_read) + ", " + std::to_string(facts.huge_read_pages) + " pages present");
  line("  a survey tells that from a write", yes_or_no(facts.huge_reads_told_apart));
  line("transparent huge pages",
       words(facts.thp_policy) + ", given when asked for: " + yes_or_no(facts.gives_huge_pages));
  line("  pages that a store brings unasked", std::to_string(facts.pages_at_a_store));
  line("transparent huge pages of shared memory", words(facts.shmem_thp_policy));
  line("  pages that a store, a write brings unasked",
       std::to_string(facts.shmem_pages_at_a_store) + ", " + std::to_string(facts.shmem_pages_at_a_write));
  line("  pages that a store brings when asked for", std::to_string(facts.shmem_pages_asked));
  line("madvise", sorted({{"POPULATE_READ", facts.populate_read},
                          {"POPULATE_WRITE", facts.populate_write},
                          {"DONTNEED_LOCKED", facts.dontneed_locked},
                          {"DONTNEED-of-hugetlb", facts.hugetlb_dontneed},
                          {"PAGEOUT", facts.page_out},
                          {"COLLAPSE", facts.collapse},
                          {"MERGEABLE", facts.mergeable}}));
  line("membarrier", yes_or_no(facts.membarrier));
  line("KSM", facts.ksm < 0 ? "none" : facts.ksm == 1 ? "merges pages now" : "does not run");
  line("userfaultfd",
       sorted({{"faults", facts.userfaultfd}, {"asynchronous-write-protection", facts.async_write_protect}}));
  line("memory can be compacted", yes_or_no(facts.compaction));
  line("huge pages of 2 MiB in the pool", words(facts.huge_pool_2m));
  line("huge pages of 1 GiB in the pool", words(facts.huge_pool_1g));
  line("swap", std::string(facts.has_swap ? "in use" : "none") + ", zram: " + yes_or_no(facts.zram));
  line("temporary files", words(facts.files));
  return 0;
}
