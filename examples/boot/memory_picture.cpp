#include "memory_picture.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <string_view>
#include <utility>

namespace cppvmm::boot {
namespace {

constexpr unsigned page_shift = 12;
constexpr std::size_t ram_classes = 8;
constexpr std::size_t not_ram = ram_classes; ///< The index of what is no RAM, after those of the PageClasses.
constexpr std::size_t classes = ram_classes + 1;
constexpr auto several = static_cast<std::size_t>(PageClass::several);
constexpr auto left_out = static_cast<std::size_t>(PageClass::left_out);
constexpr auto returned = static_cast<std::size_t>(PageClass::returned);
constexpr auto zeroed = static_cast<std::size_t>(PageClass::zeroed);

struct Look {
  const char* word;
  const char* css;         ///< Its class in the SVG.
  const char* meaning;     ///< In the SVG's legend.
  const char* brief;       ///< The same in a terminal's: at most 20 characters, so that it fits into 80 columns.
  std::string_view letter; ///< In a terminal without colours.
  unsigned ansi;           ///< Its colour of 256 in a terminal.
};

// The letters of touched kinds are in lower case where most of the cell is not touched.
constexpr std::array<Look, classes> looks = {{
    {"host", "host", "written by the VMM or a process that serves it", "the VMM wrote there", "H", 75},
    {"guest", "guest", "written by a vCPU", "a vCPU wrote there", "G", 208},
    {"device", "device", "written by a device, by DMA", "a device wrote there", "D", 225},
    {"several", "several", "written by more than one of these", "several wrote there", "S", 220},
    {"unknown", "unknown", "may hold data, its writer is not known", "may hold data", "U", 248},
    {"left out", "left", "about to be written, as the answer itself", "about to be written", "L", 252},
    {"returned", "back", "given back by the guest, and known to be zero", "the guest gave back", "R", 43},
    {"zeroed", "zero", "known to be zero", "known to be zero", "░", 23},
    {"not RAM", "hole", "addresses without memory, between RAM", "no memory there", "·", 244},
}};
// Several, left out, returned and not RAM are shown only where there are any.
constexpr std::array<std::size_t, classes> legend_order = {zeroed, returned, 0, 1, 2, 3, 4, 5, not_ram};

bool always_in_legend(std::size_t kind) {
  return kind != several && kind != left_out && kind != returned && kind != not_ram;
}

using Counts = std::array<std::uint64_t, classes>; ///< Pages, by PageClass and not_ram.

// ---------------------------------------------------------------------------------------------------------- figures

std::string grouped(std::uint64_t number) {
  std::string text = std::to_string(number);
  for (std::size_t at = text.size(); at > 3;)
    text.insert(at -= 3, ",");
  return text;
}

std::string counted(std::uint64_t number, const char* one, const char* many) {
  return grouped(number) + " " + (number == 1 ? one : many);
}

std::string decimals(double value, int digits) {
  char text[48];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

constexpr std::array<const char*, 5> units = {"KiB", "MiB", "GiB", "TiB", "PiB"};

/// "63.8 MiB": for reading, rounded.
std::string size_text(std::uint64_t pages) {
  std::size_t unit = 0;
  double value = static_cast<double>(pages) * 4;
  // What would be rounded to 1024 is 1 of the next unit.
  while (value >= 1023.5 && unit + 1 < units.size()) {
    value /= 1024;
    ++unit;
  }
  std::string text = decimals(value, value < 10 ? 2 : value < 1000 ? 1 : 0);
  if (text.find('.') != std::string::npos) {
    text.erase(text.find_last_not_of('0') + 1);
    if (text.ends_with('.')) text.pop_back();
  }
  return text + " " + units[unit];
}

std::string hex(std::uint64_t value) {
  char digits[24];
  std::snprintf(digits, sizeof digits, "0x%llx", static_cast<unsigned long long>(value));
  return digits;
}

/// "1.25 GiB", "4160 MiB": an address, exactly, in the largest unit that has it with two decimals; "0x1000400000" when
/// that takes more than five digits.
std::string address_text(std::uint64_t page) {
  if (page == 0) return "0";
  std::size_t unit = units.size() - 1;
  std::uint64_t quarters = 0;
  for (;; --unit) {
    // A page is 16 quarters of a KiB.
    quarters = (page * 16) >> (10 * unit);
    if (unit == 0 || (quarters >= 4 && quarters << (10 * unit) == page * 16)) break;
  }
  if (quarters / 4 > 99'999) return hex(page << page_shift);
  constexpr std::array<const char*, 4> fractions = {"", ".25", ".5", ".75"};
  return std::to_string(quarters / 4) + fractions[quarters % 4] + " " + units[unit];
}

/// Never "0 %" for something, nor "100 %" for less than all.
std::string percent_text(std::uint64_t part, std::uint64_t whole) {
  if (part == 0 || whole == 0) return "0 %";
  if (part == whole) return "100 %";
  const double percent = 100 * static_cast<double>(part) / static_cast<double>(whole);
  if (percent < 0.01) return "< 0.01 %";
  if (percent > 99.99) return "> 99.99 %";
  return decimals(percent, 2) + " %";
}

Counts totals(const Picture& picture) {
  Counts counts{};
  std::uint64_t end = 0;
  for (const auto& range : picture.ranges) {
    counts[static_cast<std::size_t>(range.what)] += range.count;
    counts[not_ram] += range.first - end;
    end = range.first + range.count;
  }
  return counts;
}

std::uint64_t ram_pages(const Counts& counts) {
  std::uint64_t pages = 0;
  for (std::size_t kind = 0; kind < ram_classes; ++kind)
    pages += counts[kind];
  return pages;
}

std::uint64_t touched_pages(const Counts& counts) {
  return ram_pages(counts) - counts[zeroed] - counts[returned] - counts[left_out];
}

std::string title_of(const Picture& picture, std::uint64_t ram) {
  return "Guest memory: " + size_text(ram) + (picture.backing.empty() ? "" : ", " + picture.backing);
}

/// What stands above the picture, in pieces that fit on a line.
std::vector<std::string> figures_of(const Picture& picture, const Counts& counts) {
  const std::uint64_t ram = ram_pages(counts);
  std::vector<std::string> pieces;
  pieces.push_back("reported as zeroed: " + grouped(picture.reported_pages) + " of " + grouped(ram) + " pages (" +
                   percent_text(picture.reported_pages, ram) + ") in " +
                   counted(picture.reported_ranges, "range", "ranges"));
  pieces.push_back("touched: " + counted(touched_pages(counts), "page", "pages"));
  std::string evidence;
  for (const auto& word : picture.evidence)
    evidence += (evidence.empty() ? "" : ", ") + word;
  if (!evidence.empty()) pieces.push_back("evidence: " + evidence);
  pieces.push_back(picture.survey_us < 10'000 ? "survey: " + decimals(picture.survey_us, 0) + " µs"
                                              : "survey: " + decimals(picture.survey_us / 1000, 1) + " ms");
  if (picture.audit)
    pieces.push_back("audit: " + grouped(picture.audit->unsound_pages) + " unsound, " +
                     counted(picture.audit->missed_zero_pages, "zero page", "zero pages") + " missed");
  return pieces;
}

/// The characters of UTF-8 text that has no combining ones.
std::size_t width_of(std::string_view text) {
  return static_cast<std::size_t>(
      std::ranges::count_if(text, [](char unit) { return (static_cast<unsigned char>(unit) & 0xC0) != 0x80; }));
}

/// The pieces with dots between them, in lines of at most `width` characters where the pieces allow it.
std::vector<std::string> lines_of(const std::vector<std::string>& pieces, std::size_t width) {
  std::vector<std::string> lines;
  for (const auto& piece : pieces)
    if (!lines.empty() && width_of(lines.back()) + width_of(piece) + 3 <= width)
      lines.back() += " · " + piece;
    else
      lines.push_back(piece);
  return lines;
}

// ------------------------------------------------------------------------------------------------------------- grid

// With RAM. A power of two bytes of RAM takes one more row than 16 for the hole below 4 GiB.
constexpr std::size_t most_rows = 17;
constexpr std::size_t most_breaks = 6; // where rows are left out

struct Row {
  std::uint64_t first = 0; ///< Its first page.
  std::uint64_t count = 0; ///< Its pages; of a break, those left out.
  bool is_break = false;
  std::vector<Counts> cells; ///< Of a break none.
};

/// Memory in cells of equal size. Cells and rows are powers of two pages, each at a multiple of its size.
struct Grid {
  std::uint64_t cell_pages = 1;
  std::size_t columns = 1;
  std::vector<Row> rows;

  [[nodiscard]] std::uint64_t row_pages() const { return cell_pages * columns; }
};

/// Calls `ram(first row, number of rows)` and `hole(first row, number of rows)` for the rows of `row_pages` pages, by
/// number and ascending, up to the last that has RAM.
template <class Ram, class Hole>
void for_rows(const std::vector<PictureRange>& ranges, std::uint64_t row_pages, Ram ram, Hole hole) {
  std::uint64_t next = 0;
  for (const auto& range : ranges) {
    const std::uint64_t end = (range.first + range.count - 1) / row_pages + 1;
    if (end <= next) continue;
    const std::uint64_t begin = std::max(next, range.first / row_pages);
    if (begin > next) hole(next, begin - next);
    ram(begin, end - begin);
    next = end;
  }
}

bool fits(const std::vector<PictureRange>& ranges, std::uint64_t row_pages) {
  std::uint64_t rows = 0;
  std::uint64_t breaks = 0;
  for_rows(
      ranges, row_pages, [&](std::uint64_t, std::uint64_t count) { rows += count; },
      [&](std::uint64_t, std::uint64_t) { ++breaks; });
  return rows <= most_rows && breaks <= most_breaks;
}

Grid make_grid(const std::vector<PictureRange>& ranges, std::size_t columns) {
  Grid grid;
  grid.columns = columns;
  if (ranges.empty()) return grid;
  // Ends at the latest when all of the guest-physical space is one row.
  while (!fits(ranges, grid.row_pages()))
    grid.cell_pages *= 2;

  const std::uint64_t row_pages = grid.row_pages();
  for_rows(
      ranges, row_pages,
      [&](std::uint64_t row, std::uint64_t count) {
        for (std::uint64_t number = row; number < row + count; ++number)
          grid.rows.push_back({.first = number * row_pages, .count = row_pages, .cells = std::vector<Counts>(columns)});
      },
      [&](std::uint64_t row, std::uint64_t count) {
        grid.rows.push_back({.first = row * row_pages, .count = count * row_pages, .is_break = true, .cells = {}});
      });

  std::size_t row = 0;
  const auto add = [&](std::uint64_t first, std::uint64_t end, std::size_t kind) {
    while (first < end) {
      while (grid.rows[row].first + grid.rows[row].count <= first)
        ++row;
      Row& in = grid.rows[row];
      std::uint64_t until = std::min(end, in.first + in.count);
      if (!in.is_break) {
        const std::uint64_t cell = (first - in.first) / grid.cell_pages;
        until = std::min(until, in.first + (cell + 1) * grid.cell_pages);
        in.cells[cell][kind] += until - first;
      }
      first = until;
    }
  };
  std::uint64_t end = 0;
  for (const auto& range : ranges) {
    add(end, range.first, not_ram);
    end = range.first + range.count;
    add(range.first, end, static_cast<std::size_t>(range.what));
  }
  return grid;
}

/// "one cell is 32 KiB (8 pages)".
std::string cell_note(const char* name, const Grid& grid) {
  return std::string("one ") + name + " is " + size_text(grid.cell_pages) + " (" +
         counted(grid.cell_pages, "page", "pages") + ")";
}

/// What stands before a row. In hexadecimal all of them, if one is.
std::string label_of(const Grid& grid, const Row& row) {
  const bool plain = std::ranges::none_of(
      grid.rows, [](const Row& any) { return !any.is_break && address_text(any.first).starts_with("0x"); });
  return plain ? address_text(row.first) : hex(row.first << page_shift);
}

std::size_t label_width(const Grid& grid) {
  std::size_t width = 0;
  for (const Row& row : grid.rows)
    if (!row.is_break) width = std::max(width, width_of(label_of(grid, row)));
  return width;
}

std::uint64_t total(const Counts& counts) {
  std::uint64_t pages = 0;
  for (const std::uint64_t count : counts)
    pages += count;
  return pages;
}

using Heights = std::array<unsigned, classes>;

/// Divides `height` by share among the kinds that a cell has, each at least `minimum` high if that can be; all zero
/// beyond the end of memory.
Heights divide(const Counts& cell, unsigned height, unsigned minimum) {
  Heights heights{};
  const std::uint64_t pages = total(cell);
  if (pages == 0) return heights;
  const auto kinds = static_cast<unsigned>(std::ranges::count_if(cell, [](std::uint64_t count) { return count != 0; }));
  const unsigned least = std::min(minimum, height / kinds);
  unsigned used = 0;
  for (std::size_t kind = 0; kind < classes; ++kind) {
    if (cell[kind] == 0) continue;
    heights[kind] = std::max(least, static_cast<unsigned>(cell[kind] * height / pages));
    used += heights[kind];
  }
  for (; used < height; ++used)
    ++heights[static_cast<std::size_t>(std::ranges::max_element(cell) - cell.begin())];
  for (; used > height; --used)
    --*std::ranges::max_element(heights);
  return heights;
}

// -------------------------------------------------------------------------------------------------------------- SVG

// Pixels.
constexpr unsigned margin = 24;
constexpr unsigned cell_width = 7;
constexpr unsigned cell_height = 24;
constexpr unsigned least_height = 6; // what is lower is hard to see
constexpr unsigned row_pitch = 28;
constexpr unsigned break_pitch = 26;
constexpr unsigned line_pitch = 20;
constexpr std::size_t svg_columns = 128;
constexpr unsigned strip_width = cell_width * svg_columns;
constexpr std::size_t tick_every = svg_columns / 8;
// More than a sans-serif letter or digit takes on average, so that nothing is clipped.
constexpr double letter_width = 0.62;
constexpr std::size_t most_runs = 1000;

constexpr std::string_view style = R"(<style>
  text { font-family: system-ui, sans-serif; font-size: 13px; fill: #1f2328; font-variant-numeric: tabular-nums; }
  .title { font-size: 18px; font-weight: 600; }
  .small { font-size: 11px; }
  .muted { fill: #59636e; }
  .end { text-anchor: end; }
  .middle { text-anchor: middle; }
  .paper { fill: #ffffff; }
  .cells, .strip, .tick, .break { shape-rendering: crispEdges; }
  .strip { fill: none; stroke: #59636e; }
  .tick { fill: none; stroke: #818b98; }
  .break { fill: none; stroke: #818b98; stroke-dasharray: 2 4; }
  .run { fill: none; pointer-events: all; }
  .run:hover { stroke: #1f2328; stroke-width: 2; }
  .zero { fill: #b5dfd6; }
  .host { fill: #0067b0; }
  .guest { fill: #c2500a; }
  .device { fill: #4c1160; }
  .several { fill: url(#several); }
  .unknown { fill: #646d78; }
  .left { fill: url(#left); }
  .back { fill: #4f9d8c; }
  .hole { fill: url(#hole); }
  .on-zero { fill: none; stroke: #1f2328; stroke-width: 1.2; }
  .on-hole { fill: none; stroke: #b3bac2; stroke-width: 1.2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .muted { fill: #9198a1; }
    .paper { fill: #0d1117; }
    .strip { stroke: #9198a1; }
    .tick, .break { stroke: #656c76; }
    .run:hover { stroke: #e6edf3; }
    .zero { fill: #17504a; }
    .host { fill: #58a6ff; }
    .guest { fill: #ff9440; }
    .device { fill: #ffd3f5; }
    .unknown { fill: #939ca6; }
    .back { fill: #3f9c8f; }
    .on-zero { stroke: #e6edf3; }
    .on-hole { stroke: #3d444d; }
  }
</style>
<defs>
<pattern id="several" width="4" height="4" patternUnits="userSpaceOnUse"><rect class="guest" width="4" height="4"/><path class="on-zero" d="M-1 1L1 -1M-1 5L5 -1M3 5L5 3"/></pattern>
<pattern id="left" width="4" height="4" patternUnits="userSpaceOnUse"><rect class="zero" width="4" height="4"/><path class="on-zero" d="M-1 3L1 5M-1 -1L5 5M3 -1L5 1"/></pattern>
<pattern id="hole" width="6" height="6" patternUnits="userSpaceOnUse"><path class="on-hole" d="M-1 1L1 -1M-1 7L7 -1M5 7L7 5"/></pattern>
</defs>
)";

/// Text for XML, in an attribute too; what XML cannot hold is dropped.
std::string escaped(std::string_view text) {
  std::string result;
  for (const char letter : text) {
    switch (letter) {
    case '&':
      result += "&amp;";
      break;
    case '<':
      result += "&lt;";
      break;
    case '>':
      result += "&gt;";
      break;
    case '"':
      result += "&quot;";
      break;
    default:
      if (static_cast<unsigned char>(letter) >= 0x20) result += letter;
    }
  }
  return result;
}

std::string attribute(const char* name, std::uint64_t value) {
  return std::string(" ") + name + "=\"" + std::to_string(value) + "\"";
}

std::string text_at(std::uint64_t x, std::uint64_t y, const char* css, std::string_view text) {
  return "<text" + (*css == '\0' ? std::string() : std::string(" class=\"") + css + "\"") + attribute("x", x) +
         attribute("y", y) + ">" + escaped(text) + "</text>\n";
}

std::string rectangle(const char* css, std::uint64_t x, std::uint64_t y, std::uint64_t width, std::uint64_t height,
                      const std::string& title = {}) {
  return std::string("<rect class=\"") + css + "\"" + attribute("x", x) + attribute("y", y) +
         attribute("width", width) + attribute("height", height) +
         (title.empty() ? "/>\n" : "><title>" + escaped(title) + "</title></rect>\n");
}

/// "0x0 to 0x3fffff, 4 MiB: 1,000 pages zeroed, 24 pages unknown".
std::string describe(std::uint64_t first, std::uint64_t pages, const Counts& counts) {
  std::string text =
      hex(first << page_shift) + " to " + hex(((first + pages) << page_shift) - 1) + ", " + size_text(pages) + ":";
  for (const std::size_t kind : legend_order)
    if (counts[kind] != 0)
      text += (text.ends_with(':') ? " " : ", ") + counted(counts[kind], "page ", "pages ") + looks[kind].word;
  return text;
}

/// Neighbouring cells of a row.
struct Run {
  std::size_t first = 0;
  std::size_t count = 0;
  Counts pages{};
};

/// The runs of cells that look the same, or of `step` cells when that is not 0; without the cells beyond the end.
std::vector<Run> runs_of(const Row& row, const std::vector<Heights>& heights, std::size_t step) {
  std::vector<Run> runs;
  for (std::size_t cell = 0; cell < row.cells.size(); ++cell) {
    if (total(row.cells[cell]) == 0) break; // there is none before the end: what is not RAM has pages too
    if (runs.empty() || (step != 0 ? cell % step == 0 : heights[cell] != heights[cell - 1]))
      runs.push_back({.first = cell});
    ++runs.back().count;
    for (std::size_t kind = 0; kind < classes; ++kind)
      runs.back().pages[kind] += row.cells[cell][kind];
  }
  return runs;
}

/// The cells of a row, as one path for each kind of page.
std::string svg_cells(const std::vector<Heights>& heights, std::uint64_t left, std::uint64_t top) {
  std::string text;
  for (std::size_t kind = 0; kind < classes; ++kind) {
    std::string path;
    const auto bottom = [&](std::size_t cell) {
      unsigned from_bottom = 0;
      for (std::size_t below = 0; below < kind; ++below)
        from_bottom += heights[cell][below];
      return cell_height - from_bottom;
    };
    for (std::size_t cell = 0; cell < heights.size();) {
      const std::size_t first = cell++;
      const unsigned height = heights[first][kind];
      if (height == 0) continue;
      while (cell < heights.size() && heights[cell][kind] == height && bottom(cell) == bottom(first))
        ++cell;
      const std::string width = std::to_string((cell - first) * cell_width);
      path.append("M").append(std::to_string(left + first * cell_width)).append(" ");
      path.append(std::to_string(top + bottom(first) - height)).append("h").append(width).append("v");
      path.append(std::to_string(height)).append("h-").append(width).append("z");
    }
    if (path.empty()) continue;
    text.append("<path class=\"").append(looks[kind].css).append("\" d=\"").append(path).append("\"/>\n");
  }
  return text;
}

std::string break_text(const Row& row) {
  return address_text(row.first) + " to " + address_text(row.first + row.count) + ": " + size_text(row.count) +
         " without RAM";
}

std::string svg_rows(const Grid& grid, std::uint64_t left, std::uint64_t& y) {
  std::vector<std::vector<Heights>> heights;
  std::size_t runs = 0;
  for (const Row& row : grid.rows) {
    auto& of_row = heights.emplace_back();
    for (const Counts& cell : row.cells)
      of_row.push_back(divide(cell, cell_height, least_height));
    runs += runs_of(row, of_row, 0).size();
  }
  const std::size_t step = runs <= most_runs ? 0 : tick_every;

  std::string text;
  for (std::size_t tick = 0; tick < svg_columns; tick += tick_every) {
    const std::uint64_t x = left + tick * cell_width;
    text += text_at(x, y - 10, "small muted", "+" + address_text(tick * grid.cell_pages));
    text += "<path class=\"tick\" d=\"M" + std::to_string(x) + ".5 " + std::to_string(y - 6) + "v6\"/>\n";
  }
  for (std::size_t number = 0; number < grid.rows.size(); ++number) {
    const Row& row = grid.rows[number];
    if (row.is_break) {
      const std::uint64_t middle = y + (row_pitch - 4) / 2 - 2;
      const std::string note = break_text(row);
      const auto half = static_cast<std::uint64_t>(static_cast<double>(width_of(note)) * 11 * letter_width / 2) + 12;
      const std::uint64_t centre = left + strip_width / 2;
      text += "<path class=\"break\" d=\"M" + std::to_string(left) + " " + std::to_string(middle) + "H" +
              std::to_string(centre - half) + "M" + std::to_string(centre + half) + " " + std::to_string(middle) + "H" +
              std::to_string(left + strip_width) + "\"/>\n";
      text += text_at(centre, middle + 4, "small muted middle", note);
      y += break_pitch;
      continue;
    }
    text += text_at(left - 10, y + cell_height / 2 + 4, "small muted end", label_of(grid, row));
    text += "<g class=\"cells\">\n" + svg_cells(heights[number], left, y) + "</g>\n";
    const auto drawn = runs_of(row, heights[number], step);
    text += rectangle("strip", left, y, (drawn.back().first + drawn.back().count) * cell_width, cell_height);
    for (const Run& run : drawn)
      text += rectangle("run", left + run.first * cell_width, y, run.count * cell_width, cell_height,
                        describe(row.first + run.first * grid.cell_pages, run.count * grid.cell_pages, run.pages));
    y += row_pitch;
  }
  return text;
}

std::string svg_legend(const Counts& counts, std::uint64_t left, std::uint64_t& y) {
  const std::uint64_t ram = ram_pages(counts);
  const std::uint64_t pages_end = left + 210;
  const std::uint64_t size_end = pages_end + 100;
  const std::uint64_t percent_end = size_end + 90;
  const std::uint64_t meaning = percent_end + 28;
  std::string text = text_at(pages_end, y, "small muted end", "pages of 4 KiB") +
                     text_at(size_end, y, "small muted end", "size") +
                     text_at(percent_end, y, "small muted end", "of RAM");
  for (const std::size_t kind : legend_order) {
    if (counts[kind] == 0 && !always_in_legend(kind)) continue;
    y += line_pitch;
    const char* strength = counts[kind] == 0 ? "muted" : "";
    const char* strength_end = counts[kind] == 0 ? "muted end" : "end";
    text += std::string("<g data-kind=\"") + looks[kind].word + "\"" + attribute("data-pages", counts[kind]) + ">\n" +
            rectangle(looks[kind].css, left, y - 11, 14, 14) + rectangle("strip", left, y - 11, 14, 14) +
            text_at(left + 24, y, strength, looks[kind].word);
    if (kind != not_ram)
      text += text_at(pages_end, y, strength_end, grouped(counts[kind])) +
              text_at(percent_end, y, strength_end, percent_text(counts[kind], ram));
    text += text_at(size_end, y, strength_end, counts[kind] == 0 ? "0" : size_text(counts[kind])) +
            text_at(meaning, y, "muted", looks[kind].meaning) + "</g>\n";
  }
  return text;
}

// --------------------------------------------------------------------------------------------------------- terminal

struct Ink {
  bool colour;

  [[nodiscard]] std::string in(unsigned front, std::string_view text) const {
    return colour ? "\033[38;5;" + std::to_string(front) + "m" + std::string(text) + "\033[0m" : std::string(text);
  }
  [[nodiscard]] std::string in(unsigned front, unsigned back, std::string_view text) const {
    return "\033[38;5;" + std::to_string(front) + ";48;5;" + std::to_string(back) + "m" + std::string(text) + "\033[0m";
  }
};

/// What one character shows of a cell.
struct Glyph {
  std::size_t kind = not_ram; ///< The touched kind with the most pages, else returned, else zeroed, else not_ram.
  unsigned eighths = 0; ///< How much of the cell's RAM is touched or left out, else given back: 0 and 8 only for none
                        ///< and all.
  bool beyond = false;  ///< Beyond the end of memory.
  friend bool operator==(const Glyph&, const Glyph&) = default;
};

Glyph glyph_of(const Counts& cell) {
  if (total(cell) == 0) return {.beyond = true};
  const std::uint64_t ram = ram_pages(cell);
  if (ram == 0) return {};
  const std::uint64_t used = ram - cell[zeroed] - cell[returned];
  const std::uint64_t marked = used != 0 ? used : cell[returned];
  if (marked == 0) return {.kind = zeroed};
  const auto* most = used != 0 ? std::ranges::max_element(cell.begin(), cell.begin() + returned) : &cell[returned];
  // A lone eighth is easily overlooked.
  const auto eighths = marked == ram ? 8U : std::clamp(static_cast<unsigned>(marked * 8 / ram), 2U, 7U);
  return {.kind = static_cast<std::size_t>(most - cell.begin()), .eighths = eighths};
}

constexpr std::string_view shade = "▒"; // what is left out looks like zeroed, and different
constexpr std::array<std::string_view, 9> levels = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};

std::string draw(const Glyph& glyph, std::size_t count, Ink ink) {
  if (glyph.beyond) return {};
  const Look& look = looks[glyph.kind];
  std::string one(look.letter);
  if (glyph.kind != zeroed && glyph.kind != not_ram) {
    if (ink.colour)
      one = glyph.kind == left_out ? shade : levels[glyph.eighths];
    else if (glyph.eighths < 4)
      one.front() = static_cast<char>(one.front() - 'A' + 'a');
  } else if (ink.colour && glyph.kind == zeroed) {
    one = levels[0];
  }
  std::string all;
  for (std::size_t time = 0; time < count; ++time)
    all += one;
  return ink.colour && glyph.kind != not_ram ? ink.in(look.ansi, looks[zeroed].ansi, all) : ink.in(look.ansi, all);
}

std::string padded_left(const std::string& text, std::size_t width) {
  const std::size_t have = width_of(text);
  return have >= width ? text : std::string(width - have, ' ') + text;
}

std::string padded_right(const std::string& text, std::size_t width) {
  const std::size_t have = width_of(text);
  return have >= width ? text : text + std::string(width - have, ' ');
}

std::string terminal_ticks(const Grid& grid) {
  std::string line;
  std::size_t column = 0;
  // As many as there is room for: a label, and two columns until the next.
  std::size_t every = grid.columns;
  const auto longest = [&](std::size_t step) {
    std::size_t most = 0;
    for (std::size_t tick = 0; tick < grid.columns; tick += step)
      most = std::max(most, width_of(address_text(tick * grid.cell_pages)) + 1);
    return most;
  };
  while (every > 8 && longest(every / 2) + 2 <= every / 2)
    every /= 2;
  for (; column < grid.columns; column += every)
    line += padded_right("+" + address_text(column * grid.cell_pages), every);
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

std::string terminal_legend(const Counts& counts, unsigned columns, Ink ink) {
  const std::uint64_t ram = ram_pages(counts);
  std::size_t widest = 0;
  for (const std::size_t kind : legend_order)
    if (kind != not_ram) widest = std::max(widest, grouped(counts[kind]).size());
  std::string text;
  for (const std::size_t kind : legend_order) {
    if (counts[kind] == 0 && !always_in_legend(kind)) continue;
    const Look& look = looks[kind];

    const std::string swatch = draw({.kind = kind, .eighths = 8}, 2, ink);
    std::string line = padded_right(look.word, 8) + "  " +
                       padded_left(kind == not_ram ? "" : grouped(counts[kind]), widest) +
                       (kind == not_ram     ? "      "
                        : counts[kind] == 1 ? " page "
                                            : " pages") +
                       "  " + padded_left(counts[kind] == 0 ? "0" : size_text(counts[kind]), 10) + "  " +
                       padded_left(kind == not_ram ? "" : percent_text(counts[kind], ram), 9);
    if (line.size() + 28 <= columns) line += std::string("  ") + look.brief;
    line.erase(line.find_last_not_of(' ') + 1);
    text.append("  ").append(swatch).append("  ").append(line).append("\n");
  }
  return text;
}

} // namespace

const char* to_string(PageClass what) { return looks[static_cast<std::size_t>(what)].word; }

std::string to_svg(const Picture& picture) {
  const Counts counts = totals(picture);
  const Grid grid = make_grid(picture.ranges, svg_columns);
  const std::size_t label = label_width(grid);
  const std::uint64_t left = margin + static_cast<std::uint64_t>(static_cast<double>(label) * 11 * letter_width) + 10;
  const std::uint64_t width = left + strip_width + margin;

  const std::string title = title_of(picture, ram_pages(counts));
  const auto lines =
      lines_of(figures_of(picture, counts),
               static_cast<std::size_t>(static_cast<double>(width - left - margin) / (13 * letter_width)));
  std::uint64_t y = margin + 16;
  std::string body = text_at(left, y, "title", title);
  y += 4;
  for (const auto& line : lines)
    body += text_at(left, y += line_pitch, "muted", line);
  std::string summary;
  for (const auto& line : lines)
    summary += (summary.empty() ? "" : "; ") + line;
  if (grid.rows.empty()) {
    y += margin;
  } else {
    y += 42;
    body += svg_rows(grid, left, y);
    y += 16;
    body += text_at(left, y, "muted",
                    cell_note("cell", grid) + ", a row " + size_text(grid.row_pages()) +
                        (grid.cell_pages == 1 ? "" : " · small parts of a cell are drawn larger than they are"));
    y += 32;
    body += svg_legend(counts, left, y);
  }
  y += margin;

  const std::string size = std::to_string(width) + "\" height=\"" + std::to_string(y);
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + std::to_string(width) + " " + std::to_string(y) +
         "\" width=\"" + size + "\" role=\"img\" aria-labelledby=\"title desc\">\n<title id=\"title\">" +
         escaped(title) + "</title>\n<desc id=\"desc\">" + escaped(summary) + "</desc>\n" + std::string(style) +
         "<rect class=\"paper\" width=\"" + size + "\"/>\n" + body + "</svg>\n";
}

std::string to_terminal(const Picture& picture, unsigned columns, bool colour) {
  columns = std::max(columns, 60U);
  const Ink ink{colour};
  const Counts counts = totals(picture);
  std::string text = title_of(picture, ram_pages(counts)) + "\n";
  for (const auto& line : lines_of(figures_of(picture, counts), columns))
    text += line + "\n";
  if (picture.ranges.empty()) return text;

  // The most cells that leave room for the addresses before them.
  std::size_t cells = 128;
  Grid grid;
  std::size_t label = 0;
  for (;; cells /= 2) {
    grid = make_grid(picture.ranges, cells);
    label = label_width(grid);
    if (label + 2 + cells <= columns || cells == 8) break;
  }
  text += "\n" + std::string(label + 2, ' ') + terminal_ticks(grid) + "\n";
  for (const Row& row : grid.rows) {
    if (row.is_break) {
      text += std::string(label + 2, ' ') + ink.in(looks[not_ram].ansi, "┄┄ " + break_text(row) + " ┄┄") + "\n";
      continue;
    }
    text += padded_left(label_of(grid, row), label) + "  ";
    Glyph last = glyph_of(row.cells.front());
    std::size_t count = 0;
    for (const Counts& cell : row.cells) {
      const Glyph glyph = glyph_of(cell);
      if (glyph != last) {
        text += draw(last, count, ink);
        last = glyph;
        count = 0;
      }
      ++count;
    }
    text += draw(last, count, ink) + "\n";
  }
  std::vector<std::string> notes = {cell_note("character", grid)};
  if (grid.cell_pages != 1 && !colour) notes.emplace_back("lower case: less than half of it");
  text += "\n";
  for (const auto& line : lines_of(notes, columns))
    text += line + "\n";
  return text + terminal_legend(counts, columns, ink);
}

} // namespace cppvmm::boot
