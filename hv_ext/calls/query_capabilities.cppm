module;
#include <cstdint>
#include <functional>
export module cppvmm.hv_calls:query_capabilities;
import :call_table;
import cppvmm.guest_memory;

namespace cppvmm {

/// HvExtCallQueryCapabilities: answers with what `capabilities` returns at that time, on the calling vCPU's thread.
/// `memory` must outlive the row.
export [[nodiscard]] HvCallRow query_capabilities_row(const GuestMemory& memory,
                                                      std::function<std::uint64_t()> capabilities);
HvCallRow query_capabilities_row(const GuestMemory&& memory, std::function<std::uint64_t()> capabilities) = delete;

} // namespace cppvmm
