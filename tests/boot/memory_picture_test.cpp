#include "examples/boot/memory_picture.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <gtest/gtest.h>
#include <map>
#include <random>
#include <regex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace cppvmm::boot;

constexpr std::uint64_t mib = 256; // in pages
constexpr std::uint64_t gib = 1024 * mib;
constexpr std::uint64_t tib = 1024 * gib;

using Span = std::pair<std::uint64_t, std::uint64_t>; // first page, page count

/// RAM that is zeroed but for `others`, which are ascending, disjoint and inside it.
Picture picture_of(const std::vector<Span>& ram, const std::vector<PictureRange>& others = {}) {
  Picture picture;
  picture.backing = "anonymous";
  picture.evidence = {"page_tables_scan"};
  auto other = others.begin();
  const auto add = [&](std::uint64_t first, std::uint64_t end, PageClass what) {
    if (first == end) return;
    picture.ranges.push_back({first, end - first, what});
    if (what == PageClass::zeroed) picture.reported_pages += end - first;
  };
  for (const auto& [first, count] : ram) {
    std::uint64_t at = first;
    for (; other != others.end() && other->first < first + count; ++other) {
      add(at, other->first, PageClass::zeroed);
      add(other->first, at = other->first + other->count, other->what);
    }
    add(at, first + count, PageClass::zeroed);
  }
  picture.reported_ranges = picture.ranges.size();
  return picture;
}

/// RAM as a PC has it: what does not fit below 3 GiB starts at 4 GiB.
std::vector<Span> pc(std::uint64_t pages) {
  if (pages <= 3 * gib) return {{0, pages}};
  return {{0, 3 * gib}, {4 * gib, pages - 3 * gib}};
}

/// Touched pages scattered over the first 64 GiB of a PC, in about 200,000 ranges, of each kind.
Picture scattered() {
  std::mt19937_64 random(1);
  std::vector<PictureRange> touched;
  for (std::uint64_t page = 0; page < 60 * gib;) {
    // Of changing density, so that cells differ.
    const std::uint64_t density = 1 + page / 8192 * 7919 % 13;
    page += 1 + random() % (110 * 5 / density);
    const std::uint64_t count = 1 + random() % (3 * density);
    const bool in_hole = page + count > 3 * gib && page < 4 * gib;
    if (!in_hole) touched.push_back({page, count, static_cast<PageClass>(random() % 7)});
    page += count;
  }
  return picture_of(pc(64 * gib), touched);
}

/// Every cell differs from the one before it.
Picture ragged() {
  std::vector<PictureRange> touched;
  for (std::uint64_t cell = 0; cell < 2048; ++cell)
    touched.push_back({cell * 8192, 1000 + cell * 1009 % 7000, PageClass::unknown});
  return picture_of({{0, 64 * gib}}, touched);
}

std::map<std::string, Picture> pictures() {
  return {
      {"one page", picture_of({{0, 1}})},
      {"4 MiB", picture_of(pc(4 * mib), {{0, 3, PageClass::unknown}, {9, 1, PageClass::left_out}})},
      {"64 MiB", picture_of(pc(64 * mib), {{16, 40, PageClass::host}, {5000, 1, PageClass::device}})},
      {"3 GiB and a little", picture_of(pc(3 * gib + 8 * mib), {{4 * gib, 1, PageClass::guest}})},
      {"returned", picture_of(pc(64 * mib), {{16, 40, PageClass::host}, {512, 8192, PageClass::returned}})},
      {"1 TiB", picture_of(pc(tib), {{tib - 1, 1, PageClass::guest}})},
      {"8 TiB", picture_of(pc(8 * tib))},
      {"all touched", picture_of({{0, 16 * mib}}, {{0, 16 * mib, PageClass::unknown}})},
      {"holes", picture_of({{0, 160}, {256, 128 * mib}, {tib, gib}, {std::uint64_t{1} << 39, 77}})},
      {"nothing at 0", picture_of({{64 * mib, 64 * mib}})},
      {"many holes",
       [] {
         std::vector<Span> ram;
         for (std::uint64_t bank = 0; bank < 100; ++bank)
           ram.emplace_back(bank * 10 * gib, 3 * mib);
         return picture_of(ram);
       }()},
      {"scattered", scattered()},
      {"ragged", ragged()},
      {"no whole pixels", picture_of({{0, gib}}, {{0, 43, PageClass::host}, {200, 11, PageClass::guest}})},
  };
}

std::vector<std::string> lines_of(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> lines;
  for (std::string line; std::getline(stream, line);)
    lines.push_back(line);
  return lines;
}

/// The characters of UTF-8 text.
std::size_t width_of(const std::string& text) {
  return static_cast<std::size_t>(std::ranges::count_if(text, [](char unit) { return (unit & 0xC0) != 0x80; }));
}

std::size_t occurrences(const std::string& text, const std::string& what) {
  std::size_t count = 0;
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1))
    ++count;
  return count;
}

/// The matches of `pattern`, each with its groups.
std::vector<std::vector<std::string>> all_matches(const std::string& text, const std::string& pattern) {
  const std::regex regex(pattern);
  std::vector<std::vector<std::string>> result;
  for (auto match = std::sregex_iterator(text.begin(), text.end(), regex); match != std::sregex_iterator(); ++match)
    result.emplace_back(match->begin(), match->end());
  return result;
}

std::uint64_t number_in(std::string text) {
  std::erase(text, ',');
  return std::stoull(text);
}

/// Pages by kind, as the SVG's legend has them.
std::map<std::string, std::uint64_t> legend_of(const std::string& svg) {
  std::map<std::string, std::uint64_t> pages;
  for (const auto& row : all_matches(svg, "<g data-kind=\"([^\"]*)\" data-pages=\"([0-9]+)\">"))
    pages[row[1]] = number_in(row[2]);
  return pages;
}

/// Pages by kind, as the titles of the runs have them.
std::map<std::string, std::uint64_t> runs_of(const std::string& svg) {
  std::map<std::string, std::uint64_t> pages;
  for (const auto& run : all_matches(svg, "<rect class=\"run\"[^>]*><title>[^:]*:([^<]*)</title>"))
    for (const auto& part : all_matches(run[1], "([0-9,]+) pages? ([a-zA-Z ]+)"))
      pages[part[2]] += number_in(part[1]);
  return pages;
}

/// Pages by kind, as the terminal's legend has them.
std::map<std::string, std::uint64_t> terminal_legend_of(const std::string& text) {
  std::map<std::string, std::uint64_t> pages;
  for (const auto& line : lines_of(text)) {
    std::smatch match;
    if (std::regex_search(line, match, std::regex("^  \\S+  ([a-z ]+?) +([0-9,]+) page")))
      pages[match[1]] = number_in(match[2]);
  }
  return pages;
}

struct Box {
  double left, right, top, bottom;
  std::string text;
};

/// Where the texts of the SVG are at most: 0.6 of the font's size is more than a letter or digit takes on average.
std::vector<Box> texts_of(const std::string& svg) {
  std::vector<Box> boxes;
  for (const auto& text :
       all_matches(svg, "<text(?: class=\"([^\"]*)\")? x=\"([0-9]+)\" y=\"([0-9]+)\">([^<]*)</text>")) {
    const auto is = [&](const char* css) { return text[1].find(css) != std::string::npos; };
    const double size = is("title") ? 18 : is("small") ? 11 : 13;
    const double x = std::stod(text[2]);
    const double y = std::stod(text[3]);
    const double width =
        static_cast<double>(width_of(std::regex_replace(text[4], std::regex("&[a-z]+;"), "x"))) * size * 0.6;
    const double left = is("end") ? x - width : is("middle") ? x - width / 2 : x;
    boxes.push_back({left, left + width, y - 0.8 * size, y + 0.2 * size, text[4]});
  }
  return boxes;
}

TEST(MemoryPicture, FiguresAreThoseOfTheRanges) {
  const Picture picture = picture_of({{0, 1000}, {2000, 500}}, {{0, 7, PageClass::host},
                                                                {10, 20, PageClass::guest},
                                                                {100, 1, PageClass::device},
                                                                {101, 2, PageClass::several},
                                                                {2000, 300, PageClass::unknown},
                                                                {2400, 4, PageClass::left_out},
                                                                {2404, 66, PageClass::returned}});
  const std::map<std::string, std::uint64_t> ram = {{"zeroed", 1100}, {"host", 7},     {"guest", 20},
                                                    {"device", 1},    {"several", 2},  {"unknown", 300},
                                                    {"left out", 4},  {"returned", 66}};
  auto with_hole = ram;
  with_hole["not RAM"] = 1000;
  EXPECT_EQ(legend_of(to_svg(picture)), with_hole);
  EXPECT_EQ(terminal_legend_of(to_terminal(picture, 80, false)), ram);
  EXPECT_NE(to_svg(picture).find("touched: 330 pages"), std::string::npos) << "not what is left out or returned";
  EXPECT_NE(to_terminal(picture, 80, false).find("touched: 330 pages"), std::string::npos);
}

TEST(MemoryPicture, NoPageIsLostInTheCells) {
  for (const auto& [name, picture] : pictures()) {
    const std::string svg = to_svg(picture);
    auto legend = legend_of(svg);
    auto runs = runs_of(svg);
    // Rows without RAM are no cells.
    legend.erase("not RAM");
    runs.erase("not RAM");
    std::erase_if(legend, [](const auto& entry) { return entry.second == 0; });
    EXPECT_EQ(runs, legend) << name;
  }
}

TEST(MemoryPicture, ColoursFillTheStrip) {
  for (const auto& [name, picture] : pictures()) {
    const std::string svg = to_svg(picture);
    std::uint64_t strip = 0;
    std::uint64_t cells = 0;
    for (const auto& row :
         all_matches(svg, "<rect class=\"strip\" x=\"[0-9]+\" y=\"[0-9]+\" width=\"([0-9]+)\" height=\"24\""))
      strip += 24 * number_in(row[1]);
    for (const auto& part : all_matches(svg, "M[0-9]+ [0-9]+h([0-9]+)v([0-9]+)h-\\1z"))
      cells += number_in(part[1]) * number_in(part[2]);
    EXPECT_GT(strip, 0U) << name;
    EXPECT_EQ(cells, strip) << name;
  }
}

TEST(MemoryPicture, OneTouchedPageInATebibyteIsSeen) {
  for (const std::uint64_t page : {std::uint64_t{0}, std::uint64_t{12345678}, tib - 1}) {
    const Picture picture = picture_of({{0, tib}}, {{page, 1, PageClass::guest}});
    const auto marks = all_matches(to_svg(picture), "<path class=\"guest\" d=\"M[0-9]+ [0-9]+h([0-9]+)v([0-9]+)h");
    ASSERT_EQ(marks.size(), 1U) << page;
    EXPECT_GE(number_in(marks[0][1]), 6U) << page;
    EXPECT_GE(number_in(marks[0][2]), 6U) << page;
    for (const unsigned columns : {60U, 80U, 200U}) {
      const auto lines = lines_of(to_terminal(picture, columns, false));
      EXPECT_EQ(
          std::ranges::count_if(
              lines, [](const auto& line) { return line.find("g░") != std::string::npos || line.ends_with("░g"); }),
          1)
          << page;
    }
    EXPECT_NE(to_terminal(picture, 80, true).find("\033[38;5;208;48;5;23m▂"), std::string::npos) << page;
  }
}

TEST(MemoryPicture, OneZeroedPageAmongTouchedOnesIsSeenToo) {
  const Picture picture = picture_of({{0, tib}}, {{0, tib - 1, PageClass::unknown}});
  EXPECT_EQ(occurrences(to_svg(picture), "<path class=\"zero\""), 1U);
  EXPECT_NE(to_terminal(picture, 80, true).find("▇"), std::string::npos);
}

TEST(MemoryPicture, ReturnedPagesHideNoOthers) {
  const Picture picture = picture_of(
      {{0, 64 * mib}}, {{16, 13, PageClass::returned}, {29, 1, PageClass::guest}, {32, 16, PageClass::returned}});
  EXPECT_NE(to_terminal(picture, 80, false).find("     0  ░gR░"), std::string::npos) << to_terminal(picture, 80, false);
  EXPECT_NE(to_terminal(picture, 80, true).find("\033[38;5;208;48;5;23m▂\033[0m\033[38;5;43;48;5;23m█"),
            std::string::npos);
  EXPECT_EQ(occurrences(to_svg(picture), "<path class=\"guest\""), 1U);
  EXPECT_EQ(occurrences(to_svg(picture), "<path class=\"back\""), 1U);
}

TEST(MemoryPicture, TellsOfReturnedPagesWhereThereAreAny) {
  const Picture none = picture_of({{0, 16}});
  EXPECT_EQ(to_svg(none).find("data-kind=\"returned\""), std::string::npos);
  EXPECT_EQ(to_terminal(none, 80, false).find("returned"), std::string::npos);
  EXPECT_NE(to_terminal(picture_of({{0, 16}}, {{4, 4, PageClass::returned}}), 80, false).find("the guest gave back"),
            std::string::npos);
}

TEST(MemoryPicture, IsOfBoundedSizeHoweverManyRangesThereAre) {
  ASSERT_GT(scattered().ranges.size(), 380'000U) << "200,000 touched ones, and what is between them";
  for (const Picture& picture : {scattered(), ragged()}) {
    const std::string svg = to_svg(picture);
    EXPECT_LT(all_matches(svg, "<[a-z]").size(), 3000U);
    EXPECT_LT(svg.size(), 500'000U);
    EXPECT_LT(lines_of(to_terminal(picture, 80, true)).size(), 40U);
  }
}

TEST(MemoryPicture, TextsDoNotOverlapAndAreNotClipped) {
  for (auto [name, picture] : pictures()) {
    picture.evidence = {"page_tables_scan", "page_cache_blocks", "page_cache_lookup", "file_holes", "none"};
    picture.survey_us = 123456;
    picture.audit = Picture::Audit{.unsound_pages = 123456789, .missed_zero_pages = 123456789};
    const std::string svg = to_svg(picture);
    const auto size = all_matches(svg, "viewBox=\"0 0 ([0-9]+) ([0-9]+)\"");
    ASSERT_EQ(size.size(), 1U);
    const double width = std::stod(size[0][1]);
    const double height = std::stod(size[0][2]);
    const auto texts = texts_of(svg);
    EXPECT_EQ(texts.size(), occurrences(svg, "<text")) << name;
    EXPECT_LT(height, 1000) << name;
    for (std::size_t one = 0; one < texts.size(); ++one) {
      const Box& box = texts[one];
      EXPECT_TRUE(box.left >= 0 && box.right <= width && box.top >= 0 && box.bottom <= height)
          << name << ": " << box.text;
      for (std::size_t two = one + 1; two < texts.size(); ++two) {
        const Box& other = texts[two];
        EXPECT_FALSE(box.left < other.right && other.left < box.right && box.top < other.bottom &&
                     other.top < box.bottom)
            << name << ": " << box.text << " and " << other.text;
      }
    }
  }
}

TEST(MemoryPicture, RowsWithoutRamAreOneBreak) {
  const Picture picture = picture_of(pc(4 * gib));
  const std::string svg = to_svg(picture);
  EXPECT_NE(svg.find(">3 GiB to 4 GiB: 1 GiB without RAM<"), std::string::npos);
  EXPECT_EQ(occurrences(svg, "<path class=\"break\""), 1U);
  EXPECT_EQ(occurrences(svg, "<g class=\"cells\">"), 16U) << "256 MiB each";
  for (const char* label : {">0<", ">256 MiB<", ">1 GiB<", ">2.75 GiB<", ">4 GiB<", ">4.75 GiB<", ">+32 MiB<"})
    EXPECT_NE(svg.find(label), std::string::npos) << label;
  EXPECT_EQ(svg.find(">3.25 GiB<"), std::string::npos);

  const auto lines = lines_of(to_terminal(picture, 80, false));
  EXPECT_EQ(
      std::ranges::count_if(lines, [](const auto& line) { return line.find("without RAM") != std::string::npos; }), 1);
  EXPECT_EQ(std::ranges::count_if(lines, [](const auto& line) { return line.ends_with("░░"); }), 16);
}

TEST(MemoryPicture, ASmallHoleIsDrawnWhereItIs) {
  // 512 MiB a cell: two of them, and nothing left out.
  const std::string svg = to_svg(picture_of(pc(tib)));
  EXPECT_EQ(occurrences(svg, "<path class=\"break\""), 0U);
  EXPECT_EQ(all_matches(svg, "<path class=\"hole\" d=\"M[0-9]+ [0-9]+h14v24h-14z\"/>").size(), 1U);
  EXPECT_NE(svg.find("<title>0xc0000000 to 0xffffffff, 1 GiB: 262,144 pages not RAM</title>"), std::string::npos);
}

TEST(MemoryPicture, TextIsEscaped) {
  Picture picture = picture_of({{0, 16}});
  picture.backing = "<b> & \"c\"\n";
  picture.evidence = {"</text><script>"};
  const std::string svg = to_svg(picture);
  EXPECT_EQ(svg.find("<b>"), std::string::npos);
  EXPECT_EQ(svg.find("<script>"), std::string::npos);
  EXPECT_NE(svg.find(", &lt;b&gt; &amp; &quot;c&quot;</title>"), std::string::npos);
}

TEST(MemoryPicture, ElementsAreClosedInOrder) {
  for (const auto& [name, picture] : pictures()) {
    std::vector<std::string> open;
    for (const auto& tag :
         all_matches(to_svg(picture), "<(/?)([a-z]+)(?: [a-zA-Z-]+=\"[^\"<&]*\"|:[a-z]+=\"[^\"]*\")*(/?)>")) {
      if (tag[1].empty() && tag[3].empty()) open.push_back(tag[2]);
      if (tag[1].empty()) continue;
      ASSERT_FALSE(open.empty()) << name << ": " << tag[0];
      EXPECT_EQ(open.back(), tag[2]) << name;
      open.pop_back();
    }
    EXPECT_TRUE(open.empty()) << name;
  }
}

TEST(MemoryPicture, PercentagesNeverRoundToNothingOrAll) {
  const std::string text = to_terminal(picture_of({{0, tib}}, {{5, 1, PageClass::device}}), 80, false);
  EXPECT_NE(text.find("< 0.01 %"), std::string::npos);
  EXPECT_NE(text.find("> 99.99 %"), std::string::npos);
  EXPECT_EQ(text.find("100 %"), std::string::npos);
}

TEST(MemoryPicture, FitsIntoTheTerminal) {
  for (const auto& [name, picture] : pictures())
    for (const unsigned columns : {60U, 80U, 81U, 132U, 300U})
      for (const auto& line : lines_of(to_terminal(picture, columns, false)))
        // The figures above are pieces that are not broken.
        if (line.find("reported as") == std::string::npos) EXPECT_LE(width_of(line), columns) << name << ": " << line;
}

TEST(MemoryPicture, ColoursOnlyAddColours) {
  for (const auto& [name, picture] : pictures()) {
    const std::string plain = to_terminal(picture, 80, false);
    const std::string coloured = to_terminal(picture, 80, true);
    EXPECT_EQ(plain.find('\033'), std::string::npos) << name;
    EXPECT_EQ(lines_of(plain).size(), lines_of(coloured).size()) << name;
    for (const auto& line : lines_of(coloured)) {
      EXPECT_EQ(all_matches(line, "\033\\[38;5;").size(), occurrences(line, "\033[0m"))
          << name << ": a line ends plain";
    }
    const auto bare = lines_of(std::regex_replace(coloured, std::regex("\033\\[[0-9;]*m"), ""));
    const auto lines = lines_of(plain);
    for (std::size_t line = 0; line < bare.size(); ++line)
      if (!lines[line].starts_with("one character")) EXPECT_EQ(width_of(bare[line]), width_of(lines[line])) << name;
  }
}

TEST(MemoryPicture, WithoutColoursEachKindHasALetter) {
  const std::array<std::pair<PageClass, const char*>, 7> letters = {{{PageClass::host, "Hh"},
                                                                     {PageClass::guest, "Gg"},
                                                                     {PageClass::device, "Dd"},
                                                                     {PageClass::several, "Ss"},
                                                                     {PageClass::unknown, "Uu"},
                                                                     {PageClass::left_out, "Ll"},
                                                                     {PageClass::returned, "Rr"}}};
  for (const auto& [what, letter] : letters) {
    // 64 MiB in 1024 cells of 16 pages.
    const std::string text =
        to_terminal(picture_of({{0, 64 * mib}}, {{16, 16, what}, {64, 8, what}, {96, 1, what}}), 80, false);
    const std::string row = std::string("     0  ░") + letter[0] + "░░" + letter[0] + "░" + letter[1] + "░";
    EXPECT_NE(text.find(row), std::string::npos) << text;
    EXPECT_NE(text.find(std::string("  ") + letter[0] + letter[0] + "  " + to_string(what)), std::string::npos) << text;
  }
}

TEST(MemoryPicture, OfNoMemoryIsNoCrash) {
  EXPECT_NE(to_svg({}).find("</svg>"), std::string::npos);
  EXPECT_NE(to_terminal({}, 0, true).find("0 of 0 pages"), std::string::npos);
}

} // namespace
