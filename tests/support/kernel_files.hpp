// What the kernel says in its small files, and being told something there.
#pragma once

#include <string>

namespace cppvmm::test {

/// All that the file says; empty where there is none.
[[nodiscard]] std::string kernel_text(const std::string& path);
/// The number that it begins with; -1 where there is none.
[[nodiscard]] long kernel_number(const std::string& path);
/// Writes `value` in one go, and says whether the kernel took it; errno tells why not.
[[nodiscard]] bool tell_kernel(const std::string& path, const std::string& value);

} // namespace cppvmm::test
