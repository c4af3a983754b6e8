// Needs one module, and links without the others.
#include <cstdio>
#include <string>
import cppvmm.vcpu;

int main() {
  const cppvmm::KvmError error{.code = cppvmm::KvmErrc::unsupported, .operation = "consumer"};
  if (error.message().find("consumer") == std::string::npos) return 1;
  std::puts("consumer_vcpu: ok");
  return 0;
}
