#include "examples/boot/options.hpp"
#include "tests/support/temporary_file.hpp"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "examples/boot/trace_file.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_calls;

using namespace cppvmm;
using namespace cppvmm::boot;
using nlohmann::json;

namespace {

class Trace : public testing::Test {
protected:
  Trace() {
    options.trace = std::filesystem::temp_directory_path() / ("cppvmm-trace-" + std::to_string(getpid()));
    options.cpus = 2;
  }
  void TearDown() override { std::filesystem::remove(options.trace); }

  /// Its lines.
  [[nodiscard]] std::vector<json> read() const {
    std::vector<json> lines;
    std::ifstream file(options.trace);
    for (std::string line; std::getline(file, line);)
      lines.push_back(json::parse(line));
    return lines;
  }

  Options options;
};

TEST_F(Trace, HasALineForEachEvent) {
  auto trace = TraceFile::create(options);
  ASSERT_TRUE(trace) << trace.error();
  const std::array ranges = {*PageRange::make(PageNumber(0x100), 16), *PageRange::make(PageNumber(2), 3)};
  (*trace)->begin_boot(1, Hypercalls::split);
  (*trace)->add(HvCpuidGiven{.vp_index = 1, .function = 0x4000'0003, .ebx = 1U << 20});
  (*trace)->add(HvMsrTouched{.vp_index = 1, .access = HvMsrAccess::write, .index = 0x4000'0000, .value = ~0ULL});
  (*trace)->add(HvMsrTouched{.index = 0x4000'01FF, .is_refused = true});
  (*trace)->add(HvRangesAnswered{
      .output = GuestAddress(0x5000), .ranges = ranges, .ram_pages = 100, .zeroed_pages = 20, .zeroed_ranges = 3});
  (*trace)->add(HvCallEnded{
      .call = {.control = 0x8002, .output = GuestAddress(0x5000), .vp_index = 1}, .result = 0x5, .took = {}});
  (*trace)->add(HvCallEnded{.call = {.control = 0x5C}, .no_result = HvNoResult::not_ours, .took = {}});
  (*trace)->add(HvCallEnded{.call = {.cpl = 3}, .no_result = HvNoResult::undefined_opcode, .took = {}});
  ASSERT_TRUE((*trace)->finish());
  const auto lines = read();
  ASSERT_EQ(lines.size(), 9U);
  for (const json& line : lines)
    EXPECT_TRUE(line["at_us"].is_number());
  EXPECT_EQ(lines[0]["event"], "trace");
  EXPECT_EQ(lines[0]["version"], 1);
  EXPECT_EQ(lines[0]["cpus"], 2);
  EXPECT_EQ(lines[1]["hypercalls"], "split");
  EXPECT_EQ(lines[2]["leaf"], "0x40000003");
  EXPECT_EQ(lines[2]["ebx"], "0x100000");
  EXPECT_EQ(lines[2]["vp"], 1);
  EXPECT_EQ(lines[3]["access"], "write");
  EXPECT_EQ(lines[3]["value"], "0xffffffffffffffff");
  EXPECT_EQ(lines[3]["refused"], false);
  EXPECT_TRUE(lines[4]["value"].is_null());
  EXPECT_EQ(lines[4]["refused"], true);
  EXPECT_EQ(lines[5]["ranges"], json::parse(R"([["0x100",16],["0x2",3]])"));
  EXPECT_EQ(lines[5]["zeroed_ranges"], 3);
  EXPECT_EQ(lines[6]["result"], "0x5");
  EXPECT_EQ(lines[6]["output"], "0x5000");
  EXPECT_EQ(lines[7]["result"], "not_ours");
  EXPECT_EQ(lines[8]["result"], "undefined_opcode");
}

TEST_F(Trace, HasABoundHoweverManyCall) {
  constexpr std::uint64_t most = 20'000;
  constexpr int threads = 4;
  constexpr int each = 500;
  auto trace = TraceFile::create(options, most);
  ASSERT_TRUE(trace) << trace.error();
  {
    std::vector<std::jthread> vcpus;
    vcpus.reserve(threads);
    for (int vcpu = 0; vcpu < threads; ++vcpu)
      vcpus.emplace_back([&] {
        for (int i = 0; i < each; ++i)
          (*trace)->add(HvCallEnded{.call = {.control = 0x8041}, .result = 2, .took = {}});
      });
  }
  ASSERT_TRUE((*trace)->finish());
  EXPECT_LE(std::filesystem::file_size(options.trace), most + 100);
  const auto lines = read();
  EXPECT_GT(lines.size(), 50U);
  EXPECT_EQ(lines.back()["event"], "full");
  // The first line and the last one are no calls.
  EXPECT_EQ(lines.back()["left_out"], threads * each - static_cast<int>(lines.size() - 2));
}

TEST_F(Trace, ThatCannotBeWrittenIsToldOf) {
  options.trace = "/nowhere/at/all";
  const auto none = TraceFile::create(options);
  ASSERT_FALSE(none);
  EXPECT_NE(none.error().find("/nowhere/at/all"), std::string::npos);
  options.trace = "/dev/full";
  if (!std::filesystem::exists(options.trace)) GTEST_SKIP() << "no /dev/full";
  auto full = TraceFile::create(options);
  ASSERT_TRUE(full);
  EXPECT_FALSE((*full)->finish());
  options.trace.clear();
}

} // namespace
