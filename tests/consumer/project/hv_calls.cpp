// Answers a hypercall in a VMM with KVM code of its own: links without cppvmm.vcpu.
#include <cstdint>
#include <cstdio>
import cppvmm.guest_memory;
import cppvmm.hv_calls;

int main() {
  using namespace cppvmm;
  const auto ram = Region::anonymous(GuestAddress(0), 16 * page_size);
  if (!ram) return 1;
  const auto map = MemoryMap::make({*ram});
  if (!map) return 2;
  const GuestMemory memory(*map);
  auto hypercalls = ExtendedHypercalls::create(memory);
  if (!hypercalls) return 3;
  const auto call = static_cast<std::uint64_t>(HvCallCode::ext_query_capabilities);
  const auto result = hypercalls->handle({.control = call, .output = GuestAddress(page_size)});
  const auto offered = memory.read_value<std::uint64_t>(GuestAddress(page_size));
  if (result != hv_result(HvStatus::success) || !offered || *offered != 1) return 4;
  std::puts("consumer_hv_calls: ok");
  return 0;
}
