#include "linux_guest.hpp"
#include "program.hpp"

#include <gtest/gtest.h>
#include <regex>

namespace {

using namespace cppvmm::testing;

using Embed = NeedsKvm;

// All of the 8192 pages but the seven in use, or but the first huge page.
TEST_F(Embed, AnswersItsGuest) {
  const Ended ended = run_program(CPPVMM_EMBED, {});
  EXPECT_EQ(ended.status, 0) << ended.err;
  EXPECT_TRUE(std::regex_match(ended.out,
                               std::regex("status 0: [0-9]+ ranges, first (8184|7680) pages from page (8|512) on\n")))
      << ended.out;
}

} // namespace
