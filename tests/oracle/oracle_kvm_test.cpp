#include "draw.hpp"
#include "support/machine_facts.hpp"

#include <gtest/gtest.h>
#include <iostream>
#include <string>

#include "session.hpp"

// The same with vCPUs among the writers, and with KVM's dirty log among the ways to ask.

using namespace cppvmm::oracle;

namespace {

TEST(Oracle, FindsEveryAnswerSoundAndCompleteWithVcpus) {
  if (const std::string why = cppvmm::test::kvm_missing(); !why.empty()) GTEST_SKIP() << "no usable KVM: " << why;
  const Profile profile{.vcpus = true, .files = false};
  auto oracle = Oracle::start();
  ASSERT_TRUE(oracle) << oracle.error();
  const auto added = oracle->add_vcpu();
  ASSERT_TRUE(added) << added.error();
  const Plan what = plan(500);
  std::cout << "seed " << what.seed << std::endl;
  const Session session = run_cases(*oracle, what, profile);
  std::cout << summary(session.figures) << std::flush;
  if (session.failure) FAIL() << session.failure->report;
  EXPECT_EQ(session.figures.cases, what.cases);
  EXPECT_EQ(session.figures.unexplained(), 0U);
}

} // namespace
