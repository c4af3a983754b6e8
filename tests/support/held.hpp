// What a process can use up: it is compared before and after what must leave nothing behind.
#pragma once

#include <cstddef>
#include <dirent.h>
#include <fstream>
#include <malloc.h>
#include <ostream>
#include <string>

namespace cppvmm::test {

/// A sanitizer's allocator maps more as it goes along, and keeps what is freed for a while: there, mappings tell
/// nothing of what is left behind.
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
inline constexpr bool counts_mappings = false;
#else
inline constexpr bool counts_mappings = true;
#endif

struct Held {
  std::size_t descriptors = 0;
  std::size_t mappings = 0; ///< 0 where they are not counted.
  std::size_t threads = 0;
  friend bool operator==(const Held&, const Held&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Held& held) {
    return out << held.descriptors << " descriptors, " << held.mappings << " mappings, " << held.threads << " threads";
  }
};

/// Entries of a folder; 0 where it cannot be read.
inline std::size_t entries_of(const char* path) {
  std::size_t entries = 0;
  DIR* const folder = opendir(path);
  while (folder != nullptr && readdir(folder) != nullptr)
    ++entries;
  if (folder != nullptr) closedir(folder);
  return entries;
}

inline Held held_now() {
  Held held{.descriptors = entries_of("/proc/self/fd"), .threads = entries_of("/proc/self/task")};
  std::ifstream maps("/proc/self/maps");
  for (std::string line; counts_mappings && std::getline(maps, line);)
    ++held.mappings;
  return held;
}

/// Bytes that malloc has given out and not got back.
inline std::size_t heap_now() {
  const struct mallinfo2 heap = mallinfo2();
  return heap.uordblks + heap.hblkhd;
}

} // namespace cppvmm::test
