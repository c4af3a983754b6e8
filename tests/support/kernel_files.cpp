#include "kernel_files.hpp"

#include "descriptor.hpp"

#include <fcntl.h>
#include <fstream>
#include <sstream>
#include <string>
#include <unistd.h>

namespace cppvmm::test {

std::string kernel_text(const std::string& path) {
  const std::ifstream file(path);
  std::ostringstream all;
  all << file.rdbuf();
  return all.str();
}

long kernel_number(const std::string& path) {
  long value = -1;
  std::ifstream file(path);
  return file >> value ? value : -1;
}

bool tell_kernel(const std::string& path, const std::string& value) {
  const Descriptor file(open(path.c_str(), O_WRONLY | O_CLOEXEC));
  return file.is_open() && write(file.number(), value.data(), value.size()) == static_cast<ssize_t>(value.size());
}

} // namespace cppvmm::test
