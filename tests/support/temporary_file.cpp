#include "temporary_file.hpp"

#include <cerrno>
#include <cstdlib>
#include <expected>
#include <fcntl.h>
#include <string>
#include <system_error>
#include <unistd.h>

namespace cppvmm::test {

std::string temporary_folder() {
  const char* const folder = std::getenv("TMPDIR");
  return folder != nullptr && *folder != 0 ? folder : "/tmp";
}

std::expected<int, std::string> temporary_file(const std::string& folder) {
  std::string name = folder + "/cppvmm-test-XXXXXX";
  const int fd = mkostemp(name.data(), O_CLOEXEC);
  if (fd < 0) return std::unexpected("a file in " + folder + ": " + std::generic_category().message(errno));
  unlink(name.c_str());
  return fd;
}

} // namespace cppvmm::test
