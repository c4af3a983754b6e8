// The system calls that a piece of code makes: recorded, and failed one by one. For x86-64.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace cppvmm::test {

/// A call of the kernel that was made through the C library.
struct SystemCall {
  long number = 0;
  std::array<unsigned long, 6> arguments{};
  long result = 0; ///< As the kernel returns it: a negative errno.
  bool is_faulted = false;
  std::array<char, 24> path{}; ///< Of openat: how its path begins.
};

/// What goes wrong with a call.
struct Fault {
  enum class Kind : std::uint8_t {
    refused,      ///< It is not made, and answered with the error.
    failed_after, ///< It is made, and answered with the error.
    shortened,    ///< It is made of half of the bytes (or parts) that it was to be made of.
    ended,        ///< It is not made, and answered with 0: there is nothing more.
  };
  Kind kind = Kind::refused;
  int error = 0;
};

/// All that can go wrong with a call of a kind: `request` is the part of its arguments that says what it does, of calls
/// that do several things.
struct SystemCallFaults {
  const char* name;
  long number;
  unsigned long request; ///< any_request where all are alike
  std::span<const Fault> faults;
};
inline constexpr unsigned long any_request = ~0UL;
/// Instead of a call's number.
inline constexpr long any_call = -1;

/// Of the call; null where it is not listed.
[[nodiscard]] const SystemCallFaults* faults_of(const SystemCall& call);

/// For messages, e.g. "ioctl UFFDIO_REGISTER".
[[nodiscard]] std::string name_of(const SystemCall& call);
[[nodiscard]] std::string to_string(const Fault& fault);

/// Why system calls cannot be caught here; empty if they can: syscall user dispatch, Linux 5.11, CONFIG_GENERIC_ENTRY.
[[nodiscard]] std::string system_calls_missing();

/// What `work` calls on this thread. (What the allocator calls is among it, unless it has memory enough.)
[[nodiscard]] std::vector<SystemCall> record_system_calls(const std::function<void()>& work);

/// The same, with the fault number `which` of those that its `at`-th call, of those with this number, can meet with.
/// Where it has fewer, or fewer calls are made, all succeed, and none is marked as faulted.
[[nodiscard]] std::vector<SystemCall> fault_system_call(const std::function<void()>& work, std::size_t at,
                                                        std::size_t which, long number = any_call);

} // namespace cppvmm::test
