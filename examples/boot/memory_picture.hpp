// A picture of guest-physical memory at the moment of an answer: which pages are known to be zero, who wrote the
// others, and where there is no RAM. As SVG, and as lines for a terminal.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace cppvmm::boot {

/// What is known of a page of RAM. The order is that in a cell, from its bottom upwards.
enum class PageClass : std::uint8_t {
  host,     ///< Written by the VMM or a process that serves it.
  guest,    ///< Written by a vCPU.
  device,   ///< Written by a device's DMA.
  several,  ///< Written by more than one of these.
  unknown,  ///< May hold data; who wrote it is not known.
  left_out, ///< Neither touched nor counted as zeroed: about to be written, as the page of the answer is.
  returned, ///< Given back by the guest, and known to be zero.
  zeroed,   ///< Known to be zero otherwise.
};

/// The word for it in the legends, e.g. "left out".
[[nodiscard]] const char* to_string(PageClass what);

/// `count` (at least 1) guest pages of 4 KiB from page number `first` on.
struct PictureRange {
  std::uint64_t first = 0;
  std::uint64_t count = 0;
  PageClass what = PageClass::unknown;
  friend bool operator==(const PictureRange&, const PictureRange&) = default;
};

struct Picture {
  /// Disjoint and ascending, at addresses below 2^52; what lies between them is not RAM.
  std::vector<PictureRange> ranges;
  std::string backing;               ///< As on the command line.
  std::vector<std::string> evidence; ///< The words of all regions, each once.
  std::uint64_t reported_pages = 0;  ///< RAM pages in the answer.
  std::uint64_t reported_ranges = 0;
  double survey_us = 0;
  struct Audit {
    std::uint64_t unsound_pages = 0;
    std::uint64_t missed_zero_pages = 0;
  };
  std::optional<Audit> audit;
};

/// An SVG document of a few thousand elements at most, however many ranges there are. Memory is wrapped into rows that
/// start at multiples of their size; rows without RAM are left out, with a line that says so. It follows the reader's
/// preference for light or dark.
[[nodiscard]] std::string to_svg(const Picture& picture);

/// Lines of at most `columns` characters (of at least 60) in UTF-8, for a terminal with (`colour`) or without 256
/// colours; about 16 rows of memory and a legend.
[[nodiscard]] std::string to_terminal(const Picture& picture, unsigned columns, bool colour);

} // namespace cppvmm::boot
