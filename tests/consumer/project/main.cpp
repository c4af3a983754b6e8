// Calls into each of the three modules: something from its interface, and something that has to be linked.
#include <cstdint>
#include <cstdio>
#include <string>
import cppvmm.guest_memory;
import cppvmm.vcpu;
import cppvmm.hv_ext;

int main() {
  const auto range = cppvmm::PageRange::make(cppvmm::PageNumber(16), 4);
  if (!range || range->bytes() != 4 * cppvmm::page_size) return 1;
  const auto refused = cppvmm::PageRange::make(cppvmm::PageNumber(~0ULL), 1);
  if (refused || refused.error().message().empty()) return 2;
  const cppvmm::KvmError error{.code = cppvmm::KvmErrc::unsupported, .operation = "consumer"};
  if (error.message().find("consumer") == std::string::npos) return 3;
  const cppvmm::HvControl control{static_cast<std::uint16_t>(cppvmm::HvCallCode::ext_get_boot_zeroed_memory)};
  if (control.call_code() != 0x8002 || control.has_reserved_bits()) return 4;
  std::puts("consumer: ok");
  return 0;
}
