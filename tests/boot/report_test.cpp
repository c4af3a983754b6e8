#include "examples/boot/report.hpp"

#include <cstdint>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

namespace {

using namespace cppvmm::boot;
using nlohmann::json;

/// An answer with two ranges, as it would be audited.
AnswerFigures answer(std::uint64_t reported, std::optional<std::uint64_t> unsound) {
  AnswerFigures figures;
  figures.ranges = {{100, reported - 1}, {1000, 1}};
  figures.reported_pages = reported;
  figures.touched_pages = 8192 - reported;
  figures.survey_us = 5;
  if (!unsound) return figures;
  AuditFigures& audit = figures.audit.emplace();
  audit.unsound_pages = *unsound;
  audit.missed_zero_pages = 7;
  if (*unsound != 0) audit.first_unsound_page = 123;
  return figures;
}

json json_of(const RunFigures& figures) { return json::parse(to_json(figures)); }

TEST(Report, WithoutAnAnswerHasNoneToTellOf) {
  const RunFigures figures;
  const json told = json_of(figures);
  EXPECT_EQ(told["boots"], json::array());
  EXPECT_EQ(told["answers_given"], 0);
  EXPECT_TRUE(told["unsound_answers"].is_null());
  EXPECT_TRUE(told["unsound_pages"].is_null());
  EXPECT_EQ(told["resets"], 0);
  EXPECT_EQ(find_fault(figures), std::nullopt);
}

TEST(Report, OfAnAnswerThatNobodyAuditedSaysSo) {
  RunFigures figures;
  figures.answers.add(1, answer(500, std::nullopt));
  const json told = json_of(figures);
  EXPECT_EQ(told["boots"], json::array({{{"boot", 1},
                                         {"reported_pages", 500},
                                         {"touched_pages", 7692},
                                         {"range_count", 2},
                                         {"unsound_pages", nullptr},
                                         {"missed_zero_pages", nullptr},
                                         {"survey_us", 5.0}}}));
  EXPECT_EQ(told["answers_given"], 1);
  EXPECT_TRUE(told["unsound_answers"].is_null());
  EXPECT_EQ(find_fault(figures), std::nullopt);
}

TEST(Report, KeepsTheLastAnswerOfEachBoot) {
  RunFigures figures;
  figures.resets = 4;
  figures.answers.add(1, answer(500, 0));
  figures.answers.add(1, answer(400, 0));
  figures.answers.add(3, answer(450, 0));
  for (int i = 0; i < 1000; ++i)
    figures.answers.add(5, answer(300, 0));
  figures.answers.add(5, answer(250, 0));
  const json told = json_of(figures);
  ASSERT_EQ(told["boots"].size(), 3U);
  EXPECT_EQ(told["boots"][0]["boot"], 1);
  EXPECT_EQ(told["boots"][0]["reported_pages"], 400);
  EXPECT_EQ(told["boots"][1]["boot"], 3);
  EXPECT_EQ(told["boots"][2]["boot"], 5);
  EXPECT_EQ(told["boots"][2]["reported_pages"], 250);
  EXPECT_EQ(told["boots"][2]["missed_zero_pages"], 7);
  EXPECT_EQ(told["answers_given"], 1004);
  EXPECT_EQ(told["unsound_answers"], 0);
  EXPECT_EQ(told["resets"], 4);
  EXPECT_EQ(told["reported_pages"], 250) << "of the last answer";
  EXPECT_EQ(told["ranges"].size(), 2U);
  EXPECT_NE(to_text(figures).find("resets      4, reported by boot 400, 450, 250 pages"), std::string::npos)
      << to_text(figures);
}

TEST(Report, ForgetsNoUnsoundAnswer) {
  RunFigures figures;
  figures.answers.add(1, answer(500, 0));
  figures.answers.add(2, answer(500, 9));
  figures.answers.add(2, answer(500, 3));
  figures.answers.add(2, answer(500, 0));
  const json told = json_of(figures);
  EXPECT_EQ(told["unsound_pages"], 0) << "of the last answer";
  EXPECT_EQ(told["unsound_answers"], 2);
  EXPECT_EQ(told["boots"][1]["unsound_pages"], 0);
  EXPECT_EQ(find_fault(figures), "the audit found reported pages that hold data in 2 of 4 answers, first in answer 2 "
                                 "(boot 2): 9 pages, the first is page 123");
  EXPECT_NE(
      to_text(figures).find("answers     4, of which this was the last; pages with data were reported in 2 of them"),
      std::string::npos)
      << to_text(figures);
}

TEST(Report, OfTheOnlyAnswerIsPlain) {
  RunFigures figures;
  figures.answers.add(1, answer(500, 9));
  EXPECT_EQ(find_fault(figures), "the audit found 9 reported pages that hold data, the first is page 123");
  EXPECT_EQ(to_text(figures).find("answers "), std::string::npos) << to_text(figures);
  EXPECT_EQ(to_text(figures).find("resets "), std::string::npos) << to_text(figures);
}

TEST(Report, FindsDataThatTheGuestTookForZeroes) {
  RunFigures figures;
  figures.nonzero_pages_at_end = 0;
  EXPECT_EQ(find_fault(figures), std::nullopt);
  figures.nonzero_pages_at_end = 4;
  EXPECT_EQ(find_fault(figures), "the audit found 4 pages that hold data after the guest took them for zero");
}

TEST(Report, TellsThePeakOfHostMemoryWhereItIsKnown) {
  RunFigures figures;
  figures.host_resident_bytes = 3 << 20;
  EXPECT_TRUE(json_of(figures)["host_peak_bytes"].is_null());
  EXPECT_NE(to_text(figures).find("host        3.0 MiB resident at the end\n"), std::string::npos) << to_text(figures);
  figures.host_peak_bytes = 64 << 20;
  EXPECT_EQ(json_of(figures)["host_peak_bytes"], 64 << 20);
  EXPECT_NE(to_text(figures).find("host        3.0 MiB resident at the end, 64.0 MiB at most\n"), std::string::npos)
      << to_text(figures);
}

TEST(Report, TellsWhatTheGuestGaveBack) {
  RunFigures figures;
  figures.ram_pages = 8192;
  auto& guest = figures.guest.emplace();
  EXPECT_TRUE(json_of(figures)["guest"]["give_back_result"].is_null());
  EXPECT_TRUE(json_of(figures)["balloon_target_bytes"].is_null());
  EXPECT_EQ(to_text(figures).find("gave back"), std::string::npos) << to_text(figures);
  figures.options.balloon_target = 8 << 20;
  guest.seen = cppvmm::zeroing::gave_back;
  guest.given_back_pages = 512;
  guest.give_back_calls = 3;
  guest.give_back_failures = 1;
  guest.give_back_result = 5;
  const json told = json_of(figures);
  EXPECT_EQ(told["balloon_target_bytes"], 8 << 20);
  EXPECT_EQ(told["guest"]["seen"], json::array({"gave_back"}));
  EXPECT_EQ(told["guest"]["given_back_pages"], 512);
  EXPECT_EQ(told["guest"]["give_back_calls"], 3);
  EXPECT_EQ(told["guest"]["give_back_failures"], 1);
  EXPECT_EQ(told["guest"]["give_back_result"], 5);
  EXPECT_NE(to_text(figures).find("(0.00 %), gave back 2.0 MiB\n"), std::string::npos) << to_text(figures);
}

TEST(Report, OfManyBootsIsALine) {
  RunFigures figures;
  figures.resets = 1000;
  for (std::uint32_t boot = 1; boot <= 1001; ++boot)
    figures.answers.add(boot, answer(500, std::nullopt));
  EXPECT_NE(to_text(figures).find("reported by boot 500, 500, 500, 500, 500, 500, 500, 500, ... pages\n"),
            std::string::npos)
      << to_text(figures);
  EXPECT_EQ(json_of(figures)["boots"].size(), 1001U);
}

} // namespace
