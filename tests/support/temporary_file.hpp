// Files for tests.
#pragma once

#include <expected>
#include <string>

namespace cppvmm::test {

/// $TMPDIR, else /tmp.
[[nodiscard]] std::string temporary_folder();
/// A descriptor, to be closed, of an empty file without a name in `folder`; or why there is none, for a person.
[[nodiscard]] std::expected<int, std::string> temporary_file(const std::string& folder = temporary_folder());

} // namespace cppvmm::test
