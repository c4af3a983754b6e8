#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <variant>
#include <vector>

#include "saved_machine.hpp"

namespace cppvmm::boot {
namespace {

using Json = nlohmann::json;
using Text = std::unexpected<std::string>;

// Values as this program has them in memory: a file is for the same program and processor.
constexpr std::string_view signature = "cppvmm-boot machine, form 1\n";
constexpr std::uint64_t most_description = 32U << 20;
constexpr std::size_t chunk = std::size_t{1} << 20;
constexpr std::uint32_t hyperv_msrs = 0x4000'0000;
constexpr std::uint32_t hyperv_msrs_end = 0x4000'0200;

template <class Error>
Text failed(const char* what, const Error& error) {
  return Text(std::string(what) + ": " + error.message());
}

std::string hex(std::span<const std::byte> bytes) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes.size());
  for (const std::byte byte : bytes) {
    text += digits[std::to_integer<std::size_t>(byte >> 4)];
    text += digits[std::to_integer<std::size_t>(byte & std::byte{0xF})];
  }
  return text;
}

/// Throws for what is no such text.
std::vector<std::byte> unhex(const Json& json) {
  const auto& text = json.get_ref<const std::string&>();
  if (text.size() % 2 != 0) throw std::runtime_error("half a byte");
  std::vector<std::byte> bytes(text.size() / 2);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::uint8_t value = 0;
    const char* const at = text.data() + 2 * i;
    if (const auto read = std::from_chars(at, at + 2, value, 16); read.ec != std::errc() || read.ptr != at + 2)
      throw std::runtime_error("bytes that are none");
    bytes[i] = std::byte{value};
  }
  return bytes;
}

std::uint64_t number(const Json& json) {
  if (!json.is_number_unsigned()) throw std::runtime_error("something else than a number");
  return json.get<std::uint64_t>();
}

template <class T>
Json blob(const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  return hex(std::as_bytes(std::span(&value, 1)));
}

template <class T>
Json blob(const std::vector<T>& values) {
  static_assert(std::is_trivially_copyable_v<T>);
  return hex(std::as_bytes(std::span(values)));
}

/// Throws where the bytes are none or not as many.
template <class T>
void unblob(const Json& json, T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  const auto bytes = unhex(json);
  if (bytes.size() != sizeof value) throw std::runtime_error("a value of another size");
  std::memcpy(&value, bytes.data(), sizeof value);
}

template <class T>
void unblob(const Json& json, std::vector<T>& values) {
  static_assert(std::is_trivially_copyable_v<T>);
  const auto bytes = unhex(json);
  if (bytes.size() % sizeof(T) != 0) throw std::runtime_error("values of another size");
  values.resize(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
}

/// Calls `each(name, member)` for each that is saved as it is; the same for both directions.
template <class Vcpu_, class Each>
void for_each_member(Vcpu_& vcpu, const Each& each) {
  each("tsc_khz", vcpu.tsc_khz);
  each("mp_state", vcpu.mp_state);
  each("registers", vcpu.registers);
  each("special_registers", vcpu.special_registers);
  each("control_registers", vcpu.control_registers);
  each("xsave", vcpu.xsave.bytes);
  each("nested", vcpu.nested.bytes);
  each("apic", vcpu.apic);
  each("events", vcpu.events);
  each("debug_registers", vcpu.debug_registers);
  each("msrs", vcpu.msrs);
  each("synthetic_msrs", vcpu.synthetic_msrs);
}

template <class Machine, class Each>
void for_each_member_of_board(Machine& machine, const Each& each) {
  each("chips", machine.chips);
  each("timer", machine.timer);
  each("clock", machine.clock);
  each("serial", machine.devices.serial);
  each("clock_index", machine.devices.clock_index);
}

constexpr std::array transports = {Hypercalls::kernel, Hypercalls::split, Hypercalls::user, Hypercalls::off};

Json describe(const SavedMachine& machine, const std::vector<PageRange>& pages) {
  Json vcpus = Json::array();
  for (const SavedVcpu& vcpu : machine.vcpus) {
    Json members;
    for_each_member(vcpu, [&](const char* name, const auto& member) { members[name] = blob(member); });
    vcpus.push_back(std::move(members));
  }
  Json json{{"kernel", machine.options.kernel},
            {"memory_bytes", machine.options.memory_bytes},
            {"hypercalls", to_string(machine.options.hypercalls)},
            {"enlightenments", static_cast<unsigned>(machine.options.enlightenments.set)},
            {"listed", machine.options.enlightenments.names},
            {"vcpus", std::move(vcpus)}};
  for_each_member_of_board(machine, [&](const char* name, const auto& member) { json[name] = blob(member); });
  json["hyperv"] = hex(to_bytes(machine.hyperv));
  Json ranges = Json::array();
  for (const PageRange& range : pages)
    ranges.push_back(Json::array({range.first().value(), range.count()}));
  json["pages"] = std::move(ranges);
  return json;
}

/// Throws where something is missing or of another type.
SavedMachine machine_of(const Json& json) {
  SavedMachine machine;
  machine.options.kernel = json.at("kernel").get<std::string>();
  machine.options.memory_bytes = number(json.at("memory_bytes"));
  const auto& vcpus = json.at("vcpus").get_ref<const Json::array_t&>();
  machine.options.cpus = static_cast<std::uint32_t>(vcpus.size());
  const auto word = json.at("hypercalls").get<std::string>();
  const auto* const transport =
      std::ranges::find_if(transports, [&](Hypercalls each) { return word == to_string(each); });
  if (transport == transports.end()) throw std::runtime_error("hypercalls of no known kind");
  machine.options.hypercalls = *transport;
  const auto set = number(json.at("enlightenments"));
  if (set > static_cast<std::uint64_t>(EnlightenmentSet::listed)) throw std::runtime_error("no known enlightenments");
  machine.options.enlightenments.set = static_cast<EnlightenmentSet>(set);
  machine.options.enlightenments.names = json.at("listed").get<std::vector<std::string>>();
  for (const Json& members : vcpus)
    for_each_member(machine.vcpus.emplace_back(),
                    [&](const char* name, auto& member) { unblob(members.at(name), member); });
  for_each_member_of_board(machine, [&](const char* name, auto& member) { unblob(json.at(name), member); });
  const auto state = hv_state_from_bytes(unhex(json.at("hyperv")));
  if (!state) throw std::runtime_error(state.error().message());
  machine.hyperv = *state;
  return machine;
}

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

std::string os_text(const std::string& what) { return what + ": " + std::generic_category().message(errno); }

/// All of the pages, a piece after the other; `step` has the piece's address and size.
template <class Step>
bool for_each_piece(const PageRange& range, const Step& step) {
  for (std::uint64_t done = 0; done < range.bytes(); done += chunk)
    if (!step(GuestAddress(range.start_address().value() + done),
              static_cast<std::size_t>(std::min<std::uint64_t>(chunk, range.bytes() - done))))
      return false;
  return true;
}

} // namespace

std::expected<void, std::string> finish_exit(Vcpu& vcpu, const std::function<bool(const Exit&)>& handle) {
  // KVM makes an access in pieces of 8 bytes, and a string instruction's within a page.
  constexpr int most_pieces = 5000;
  vcpu.stop_handle().request_stop();
  for (int i = 0; i < most_pieces; ++i) {
    const auto exit = vcpu.run();
    if (!exit) return failed("finish a vCPU's last exit", exit.error());
    if (const auto* const interrupted = std::get_if<Interrupted>(&*exit)) {
      if (interrupted->stop_requested) return {};
    } else if (!handle(*exit)) {
      break;
    }
  }
  return Text("a vCPU's last exit comes to no end");
}

std::expected<SavedVcpu, std::string> save_vcpu(Vcpu& vcpu, std::span<const std::uint32_t> msrs, bool has_nested_state,
                                                bool has_synthetic_msrs) {
  SavedVcpu saved;
  std::optional<std::string> why;
  const auto take = [&](const char* what, auto value, auto& into) {
    if (why) return;
    if (value)
      into = std::move(*value);
    else
      why = std::string("save ") + what + ": " + value.error().message();
  };
  // First: KVM takes what waits for it into account then.
  take("the run state", vcpu.mp_state(), saved.mp_state);
  take("the TSC's frequency", vcpu.tsc_khz(), saved.tsc_khz);
  take("registers", vcpu.registers(), saved.registers);
  take("special registers", vcpu.special_registers(), saved.special_registers);
  take("XCRs", vcpu.extended_control_registers(), saved.control_registers);
  take("XSAVE", vcpu.xsave(), saved.xsave);
  take("the local APIC", vcpu.local_apic(), saved.apic);
  take("debug registers", vcpu.debug_registers(), saved.debug_registers);
  take("events", vcpu.events(), saved.events);
  if (has_nested_state) take("nested state", vcpu.nested_state(), saved.nested);
  if (has_synthetic_msrs) take("synthetic MSRs", synthetic_msrs(vcpu), saved.synthetic_msrs);
  if (why) return Text(std::move(*why));
  for (const std::uint32_t index : msrs) {
    if (index >= hyperv_msrs && index < hyperv_msrs_end) continue;
    const auto value = vcpu.msr(index);
    if (value)
      saved.msrs.push_back({index, *value});
    else if (value.error().code != KvmErrc::unsupported) // as its CPUID has it
      return failed("save an MSR", value.error());
  }
  return saved;
}

std::expected<void, std::string> restore_vcpu(Vcpu& vcpu, const SavedVcpu& saved) {
  std::optional<std::string> why;
  const auto put = [&](const char* what, const auto& put_it) {
    if (why) return;
    if (const auto done = put_it(); !done) why = std::string("restore ") + what + ": " + done.error().message();
  };
  // The order that cppvmm.vcpu asks for.
  put("special registers", [&] { return vcpu.set_special_registers(saved.special_registers); });
  put("XCRs", [&] { return vcpu.set_extended_control_registers(saved.control_registers); });
  put("XSAVE", [&] { return vcpu.set_xsave(saved.xsave); });
  put("registers", [&] { return vcpu.set_registers(saved.registers); });
  put("the local APIC", [&] { return vcpu.set_local_apic(saved.apic); });
  if (why) return Text(std::move(*why));
  for (const MsrEntry& entry : saved.msrs) {
    if (const auto set = vcpu.set_msrs(std::span(&entry, 1)); set) continue;
    // Some can be read and not be set.
    if (const auto now = vcpu.msr(entry.index); !now || *now != entry.value)
      return Text("restore MSR " + std::to_string(entry.index) + ": KVM refuses");
  }
  put("debug registers", [&] { return vcpu.set_debug_registers(saved.debug_registers); });
  put("the run state", [&] { return vcpu.set_mp_state(saved.mp_state); });
  put("events", [&] { return vcpu.set_events(saved.events); });
  if (!saved.nested.bytes.empty()) put("nested state", [&] { return vcpu.set_nested_state(saved.nested); });
  if (why) return Text(std::move(*why));
  return {};
}

std::expected<void, std::string> restore_hyperv_msrs(Vcpu& vcpu, const SavedVcpu& saved) {
  if (saved.synthetic_msrs.empty()) return {};
  if (const auto set = vcpu.set_msrs(saved.synthetic_msrs); !set) return failed("restore synthetic MSRs", set.error());
  return {};
}

std::expected<void, std::string> save_board(const Vm& vm, SavedMachine& machine) {
  constexpr std::array chips = {InterruptChip::pic_master, InterruptChip::pic_slave, InterruptChip::io_apic};
  for (std::size_t i = 0; i < chips.size(); ++i) {
    const auto chip = vm.interrupt_controller(chips[i]);
    if (!chip) return failed("save an interrupt controller", chip.error());
    machine.chips[i] = *chip;
  }
  const auto timer = vm.interval_timer();
  if (!timer) return failed("save the interval timer", timer.error());
  machine.timer = *timer;
  return {};
}

std::expected<void, std::string> restore_board(Vm& vm, const SavedMachine& machine) {
  for (const InterruptController& chip : machine.chips)
    if (const auto set = vm.set_interrupt_controller(chip); !set)
      return failed("restore an interrupt controller", set.error());
  if (const auto set = vm.set_interval_timer(machine.timer); !set)
    return failed("restore the interval timer", set.error());
  return {};
}

std::expected<void, std::string> write_machine(const std::string& path, const SavedMachine& machine,
                                               const GuestMemory& memory) {
  const std::vector<PageRange> pages = memory.survey().touched.ranges();
  const std::string description = describe(machine, pages).dump();
  // An earlier one stays until this one is whole. All that the guest has in memory is nobody else's to read.
  const std::string made = path + ".new";
  const int descriptor = open(made.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  const File file(descriptor < 0 ? nullptr : fdopen(descriptor, "wb"));
  if (!file) return Text(os_text("cannot write " + made));
  const auto put = [&](const void* bytes, std::size_t count) {
    return std::fwrite(bytes, 1, count, file.get()) == count;
  };
  const std::uint64_t size = description.size();
  bool is_written =
      put(signature.data(), signature.size()) && put(&size, sizeof size) && put(description.data(), description.size());
  std::vector<std::byte> piece(chunk);
  std::optional<std::string> why;
  for (const PageRange& range : pages)
    is_written = is_written && for_each_piece(range, [&](GuestAddress address, std::size_t bytes) {
                   if (const auto read = memory.read(address, std::span(piece).first(bytes)); !read) {
                     why = read.error().message();
                     return false;
                   }
                   return put(piece.data(), bytes);
                 });
  if (!why && (!is_written || std::fflush(file.get()) != 0)) why = os_text("cannot write " + made);
  if (!why && std::rename(made.c_str(), path.c_str()) != 0) why = os_text("cannot write " + path);
  if (!why) return {};
  unlink(made.c_str());
  return Text(std::move(*why));
}

std::expected<SavedMachine, std::string>
read_machine(const std::string& path,
             const std::function<std::expected<const GuestMemory*, std::string>(const Options&)>& make_memory) {
  const File file(std::fopen(path.c_str(), "rbe"));
  if (!file) return Text(os_text("cannot open " + path));
  const Text ended(path + " ends too soon");
  const auto get = [&](void* bytes, std::size_t count) { return std::fread(bytes, 1, count, file.get()) == count; };
  std::array<char, signature.size()> first{};
  std::uint64_t size = 0;
  if (!get(first.data(), first.size()) || std::string_view(first.data(), first.size()) != signature)
    return Text(path + " is no machine that --save has written");
  if (!get(&size, sizeof size)) return ended;
  if (size > most_description) return Text(path + " is damaged");
  std::string description(size, '\0');
  if (!get(description.data(), description.size())) return ended;
  SavedMachine machine;
  std::vector<PageRange> pages;
  try {
    const Json json = Json::parse(description);
    machine = machine_of(json);
    for (const Json& range : json.at("pages")) {
      const auto made = PageRange::make(PageNumber(number(range.at(0))), number(range.at(1)));
      if (!made) throw std::runtime_error("pages beyond all memory");
      pages.push_back(*made);
    }
  } catch (const std::exception& error) {
    return Text(path + " is damaged: " + error.what());
  }
  const auto memory = make_memory(machine.options);
  if (!memory) return Text(memory.error());
  std::vector<std::byte> piece(chunk);
  std::optional<std::string> why;
  for (const PageRange& range : pages) {
    const bool is_read = for_each_piece(range, [&](GuestAddress address, std::size_t bytes) {
      if (!get(piece.data(), bytes)) return false;
      if (const auto loaded = (*memory)->load(address, std::span(piece).first(bytes)); !loaded)
        why = loaded.error().message();
      return !why;
    });
    if (why) return Text(path + " is damaged: " + *why);
    if (!is_read) return ended;
  }
  return machine;
}

} // namespace cppvmm::boot
