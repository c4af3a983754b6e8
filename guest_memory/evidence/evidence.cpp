module cppvmm.guest_memory:evidence.impl;
import :evidence;

namespace cppvmm {

const char* to_string(Evidence evidence) {
  switch (evidence) {
  case Evidence::none:
    return "none";
  case Evidence::page_tables_scan:
    return "page_tables_scan";
  case Evidence::page_tables_read:
    return "page_tables_read";
  case Evidence::huge_page_count:
    return "huge_page_count";
  case Evidence::page_cache:
    return "page_cache";
  case Evidence::page_cache_blocks:
    return "page_cache_blocks";
  case Evidence::page_cache_lookup:
    return "page_cache_lookup";
  case Evidence::file_holes:
    return "file_holes";
  case Evidence::file_content:
    return "file_content";
  }
  return "unknown";
}

} // namespace cppvmm
