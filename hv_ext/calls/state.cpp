module;
#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <limits>
#include <optional>
#include <span>
#include <vector>
module cppvmm.hv_calls:state.impl;
import :error;
import :overlay_page;
import :state;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

// The format: "cppvmmHv", u32 version, u32 which covered pages follow (bit 0 under the hypercall page, bit 1 under the
// reference TSC page), u64 GUEST_OS_ID, u64 HYPERCALL, u64 REFERENCE_TSC, u64 sequence, u64 TSC, u64 time, the pages.
constexpr std::array signature = {std::byte{'c'}, std::byte{'p'}, std::byte{'p'}, std::byte{'v'},
                                  std::byte{'m'}, std::byte{'m'}, std::byte{'H'}, std::byte{'v'}};
constexpr std::uint32_t version = 2;
constexpr std::size_t header_bytes = signature.size() + 4 + 4 + std::size_t{6} * 8;
constexpr std::uint32_t has_hypercall_page = 1;
constexpr std::uint32_t has_reference_tsc_page = 2;

template <class T>
static void put(std::vector<std::byte>& bytes, T value) {
  for (std::size_t i = 0; i < sizeof value; ++i)
    bytes.push_back(static_cast<std::byte>(value >> (8 * i)));
}

template <class T>
static T take(std::span<const std::byte>& bytes) {
  T value = 0;
  for (std::size_t i = 0; i < sizeof value; ++i)
    value |= static_cast<T>(static_cast<T>(bytes[i]) << (8 * i));
  bytes = bytes.subspan(sizeof value);
  return value;
}

static std::unexpected<HvError> invalid(const char* operation, std::uint64_t value) {
  return std::unexpected(HvError{.code = HvErrc::invalid_state, .operation = operation, .value = value});
}

HvResult<void> check_hv_state(const HvState& state) {
  const bool is_enabled = (state.hypercall & hv_hypercall_enabled) != 0;
  if (is_enabled && state.guest_os_id == 0) return invalid("a hypercall page without an OS ID", state.hypercall);
  if (!is_enabled && state.hypercall_page_covers)
    return invalid("a covered page without a hypercall page", state.hypercall);
  const bool has_tsc_page = (state.reference_tsc & hv_reference_tsc_enabled) != 0;
  if (state.reference_tsc != 0 && state.reference_tsc_sequence == 0)
    return invalid("a reference TSC without a sequence", state.reference_tsc);
  if (has_tsc_page && is_enabled && GuestAddress(state.reference_tsc).page() == GuestAddress(state.hypercall).page())
    return invalid("two pages that lie over one", state.reference_tsc);
  // Of 29,000 years. Beyond, it would not go on.
  if (state.reference_time >> 63 != 0) return invalid("a time that no guest has", state.reference_time);
  if (!has_tsc_page && state.reference_tsc_page_covers)
    return invalid("a covered page without a reference TSC page", state.reference_tsc);
  return {};
}

std::vector<std::byte> to_bytes(const HvState& state) {
  std::vector<std::byte> bytes(signature.begin(), signature.end());
  put(bytes, version);
  put(bytes, (state.hypercall_page_covers ? has_hypercall_page : 0) |
                 (state.reference_tsc_page_covers ? has_reference_tsc_page : 0));
  put(bytes, state.guest_os_id);
  put(bytes, state.hypercall);
  put(bytes, state.reference_tsc);
  put(bytes, std::uint64_t{state.reference_tsc_sequence});
  put(bytes, state.tsc);
  put(bytes, state.reference_time);
  for (const auto* covered : {&state.hypercall_page_covers, &state.reference_tsc_page_covers})
    if (*covered) bytes.insert(bytes.end(), (*covered)->begin(), (*covered)->end());
  return bytes;
}

HvResult<HvState> hv_state_from_bytes(std::span<const std::byte> bytes) {
  const std::size_t size = bytes.size();
  if (size < header_bytes || !std::ranges::equal(bytes.first(signature.size()), signature))
    return invalid("bytes that are no saved Hyper-V state", size);
  bytes = bytes.subspan(signature.size());
  if (const auto found = take<std::uint32_t>(bytes); found != version)
    return invalid("a saved Hyper-V state of another version", found);
  const auto pages = take<std::uint32_t>(bytes);
  HvState state;
  state.guest_os_id = take<std::uint64_t>(bytes);
  state.hypercall = take<std::uint64_t>(bytes);
  state.reference_tsc = take<std::uint64_t>(bytes);
  const auto sequence = take<std::uint64_t>(bytes);
  state.tsc = take<std::uint64_t>(bytes);
  state.reference_time = take<std::uint64_t>(bytes);
  if (pages > (has_hypercall_page | has_reference_tsc_page) ||
      bytes.size() != static_cast<std::size_t>(std::popcount(pages)) * page_size)
    return invalid("a saved Hyper-V state of another size", size);
  if (sequence > std::numeric_limits<std::uint32_t>::max()) return invalid("a sequence of more than 32 bits", sequence);
  state.reference_tsc_sequence = static_cast<std::uint32_t>(sequence);
  const auto take_page = [&](std::optional<HvPage>& covered) {
    std::ranges::copy(bytes.first(page_size), covered.emplace().begin());
    bytes = bytes.subspan(page_size);
  };
  if ((pages & has_hypercall_page) != 0) take_page(state.hypercall_page_covers);
  if ((pages & has_reference_tsc_page) != 0) take_page(state.reference_tsc_page_covers);
  if (auto checked = check_hv_state(state); !checked) return std::unexpected(checked.error());
  return state;
}

} // namespace cppvmm
