#include "linux_guest.hpp"
#include "program.hpp"
#include "tests/support/machine_facts.hpp"

#include <gtest/gtest.h>
#include <regex>

namespace {

using namespace cppvmm::testing;

using Beside = NeedsKvm;

// All of the 8192 pages but those in use, or but the first huge page.
TEST_F(Beside, AnswersWhatIsOursAndLeavesTheRest) {
  const Ended ended = run_program(CPPVMM_BESIDE, {});
  if (!cppvmm::test::machine_facts().kvm_forwards) {
    EXPECT_EQ(ended.status, 1);
    GTEST_SKIP() << "this KVM does not forward extended hypercalls: " << ended.err;
  }
  EXPECT_EQ(ended.status, 0) << ended.err;
  EXPECT_TRUE(std::regex_match(ended.out,
                               std::regex("KVM's reference time runs\n"
                                          "a hypercall of the VMM's own: 0x5c\n"
                                          "status 0: [0-9]+ ranges, first (8184|7680) pages from page (8|512) on\n")))
      << ended.out;
}

} // namespace
