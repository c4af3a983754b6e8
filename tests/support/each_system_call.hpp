// Fails every system call of a piece of code in turn, in every way in which it can fail, and looks at what is left.
#pragma once

#include "held.hpp"
#include "system_calls.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <malloc.h>
#include <map>
#include <set>
#include <string>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <vector>

#include <gtest/gtest.h>

namespace cppvmm::test {

/// Has malloc keep what it has, so that it needs no system call once it has enough.
inline void keep_heap() {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 16 << 20);
}

/// Mappings that some userfaultfd holds.
inline std::size_t held_by_userfaultfd() {
  std::size_t held = 0;
  std::ifstream smaps("/proc/self/smaps");
  for (std::string line; std::getline(smaps, line);)
    if (line.starts_with("VmFlags:") &&
        (line.find(" uw") != std::string::npos || line.find(" um") != std::string::npos ||
         line.find(" ui") != std::string::npos))
      ++held;
  return held;
}

/// Of a mapping that could not be unmapped: none of it is in memory. It goes now.
inline void expect_given_back(const SystemCall& unmap) {
  auto* const start = reinterpret_cast<void*>(unmap.arguments[0]);
  const std::size_t bytes = unmap.arguments[1];
  std::vector<unsigned char> resident((bytes + 4095) / 4096);
  if (mincore(start, bytes, resident.data()) != 0) EXPECT_EQ(errno, ENOMEM) << "it was unmapped in parts";
  for (const unsigned char page : resident)
    EXPECT_EQ(page & 1, 0) << "memory that could not be unmapped is held for good";
  EXPECT_EQ(munmap(start, bytes), 0);
}

/// Whether all ways to fail are tried for each call; otherwise for the first call of each kind. Of the others then one,
/// not always the same, and of those that are made again and again only every eighth is failed.
inline bool wants_all_faults() { return std::getenv("CPPVMM_ALL_FAULTS") != nullptr; }

/// All but the work itself is done without failures.
struct FaultedWork {
  std::function<void()> prepare = [] {};
  std::function<void()> work;
  std::function<void()> check = [] {};
  std::function<void()> finish = [] {}; ///< Gives back what `prepare` and the work were to make.
};

/// Runs the work once with that fault, and compares. False where there is no such call, or no such way for it to fail.
inline bool fail_system_call(const FaultedWork& faulted, std::size_t at, std::size_t which, long number = any_call) {
  const Held before = held_now();
  const std::size_t registered = held_by_userfaultfd();
  faulted.prepare();
  const std::vector<SystemCall> calls = fault_system_call(faulted.work, at, which, number);
  const auto call = std::ranges::find(calls, true, &SystemCall::is_faulted);
  const bool is_faulted = call != calls.end();
  std::string what = "no call failed";
  if (is_faulted)
    what = name_of(*call) + " (call " + std::to_string(call - calls.begin()) + ") " +
           to_string(faults_of(*call)->faults[which]);
  const testing::ScopedTrace trace(__FILE__, __LINE__, what);
  if (is_faulted && call->number == SYS_munmap) expect_given_back(*call);
  faulted.check();
  faulted.finish();
  EXPECT_EQ(held_now(), before);
  EXPECT_EQ(held_by_userfaultfd(), registered);
  return is_faulted;
}

/// The work leaves nothing behind, whichever of its calls fails, and `check` says what is to be so then. How many
/// faults there were.
inline std::size_t fail_each_system_call(const FaultedWork& faulted) {
  std::size_t faults = 0;
  std::set<std::string> unlisted;
  std::map<const SystemCallFaults*, std::size_t> seen;
  // The first time is for what is made once in a process.
  std::vector<SystemCall> calls;
  for (int i = 0; i < 2; ++i) {
    faulted.prepare();
    calls = record_system_calls(faulted.work);
    faulted.check();
    faulted.finish();
  }
  EXPECT_FALSE(calls.empty());
  for (std::size_t at = 0; at < calls.size(); ++at) {
    const SystemCallFaults* const row = faults_of(calls[at]);
    if (row == nullptr) {
      unlisted.insert(name_of(calls[at]));
    } else if (const std::size_t times = seen[row]++; times == 0 || wants_all_faults()) {
      for (std::size_t which = 0; fail_system_call(faulted, at, which); ++which)
        ++faults;
    } else if (!row->faults.empty() && (times < 8 || times % 8 == 0)) {
      faults += fail_system_call(faulted, at, at % row->faults.size()) ? 1 : 0;
    }
  }
  for (const std::string& name : unlisted)
    ADD_FAILURE() << "support/system_calls.cpp does not list how this can fail: " << name;
  return faults;
}

} // namespace cppvmm::test
