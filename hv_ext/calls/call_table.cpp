module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <span>
#include <utility>
#include <vector>
module cppvmm.hv_calls:call_table.impl;
import :call;
import :call_table;
import :error;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

static const char* mistake_in(const HvCallRow& row) {
  if (!row.handler) return "a call without a handler";
  if (row.input_bytes > page_size || row.output_bytes > page_size) return "a call whose parameters exceed a page";
  if (row.kind == HvCallKind::simple && (row.input_bytes_per_rep != 0 || row.output_bytes_per_rep != 0))
    return "a simple call with parameters for each rep";
  return nullptr;
}

HvResult<HvCallTable> HvCallTable::make(std::vector<HvCallRow> rows) {
  const auto refuse = [](const char* mistake, std::uint16_t code) {
    return std::unexpected(HvError{.code = HvErrc::invalid_options, .operation = mistake, .value = code});
  };
  for (const HvCallRow& row : rows)
    if (const char* const mistake = mistake_in(row)) return refuse(mistake, row.code);
  std::ranges::sort(rows, {}, &HvCallRow::code);
  const auto twice = std::ranges::adjacent_find(rows, {}, &HvCallRow::code);
  if (twice != rows.end()) return refuse("two calls of one code", twice->code);
  HvCallTable table;
  table.rows_ = std::move(rows);
  return table;
}

const HvCallRow* HvCallTable::find(std::uint16_t code) const {
  const auto row = std::ranges::lower_bound(rows_, code, {}, &HvCallRow::code);
  return row != rows_.end() && row->code == code ? &*row : nullptr;
}

/// TLFS "Alignment Requirements".
static bool fits_a_page(GuestAddress address, std::uint64_t bytes) {
  return address.is_aligned(hv_parameter_alignment) && address.offset_in_page() + bytes <= page_size &&
         address.checked_add(bytes).has_value();
}

std::expected<HvCheckedCall, HvStatus> check_call(const HvCall& call, const HvCallRow& row, const GuestMemory& memory,
                                                  HvCallInput& input) {
  const HvControl control{call.control};
  const std::uint64_t reps = control.rep_count();
  const bool reps_fit =
      row.kind == HvCallKind::rep ? control.rep_start() < reps : reps == 0 && control.rep_start() == 0;
  if (!reps_fit || control.variable_header_size() != 0) return std::unexpected(HvStatus::invalid_hypercall_input);
  const std::uint64_t input_bytes = row.input_bytes + reps * row.input_bytes_per_rep;
  const std::uint64_t output_bytes = row.output_bytes + reps * row.output_bytes_per_rep;
  if ((input_bytes != 0 && !fits_a_page(call.input, input_bytes)) ||
      (output_bytes != 0 && !fits_a_page(call.output, output_bytes)))
    return std::unexpected(HvStatus::invalid_alignment);
  if (output_bytes != 0 && !memory.snapshot()->check_write(call.output, output_bytes))
    return std::unexpected(HvStatus::invalid_parameter);
  const auto copy = std::span(input).first(static_cast<std::size_t>(input_bytes));
  if (!copy.empty() && !memory.read(call.input, copy)) return std::unexpected(HvStatus::invalid_parameter);
  return HvCheckedCall{.control = control, .input = copy, .output = call.output, .vp_index = call.vp_index};
}

} // namespace cppvmm
