#include "clock_chip.hpp"
#include "console.hpp"
#include "layout.hpp"
#include "linux_image.hpp"
#include "serial.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <boost/asio/io_context.hpp>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <fcntl.h>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>
#include <utility>
#include <variant>
#include <vector>

#include "linux_guest.hpp"

namespace cppvmm::boot {
namespace {

constexpr std::uint16_t serial_port = 0x3F8; // COM1
constexpr std::uint32_t serial_interrupt = 4;
constexpr std::uint16_t keyboard_data_port = 0x60;
constexpr std::uint16_t keyboard_port = 0x64;
constexpr std::uint16_t clock_index_port = 0x70;
constexpr std::uint16_t clock_data_port = 0x71;
constexpr std::uint16_t reset_port = 0xCF9;

// In the hole below 4 GiB, where firmware would be (Linux Documentation/virt/kvm/api.rst, KVM_SET_TSS_ADDR).
constexpr std::uint64_t identity_map_address = 0xFEFF'C000;
constexpr std::uint32_t tss_address = 0xFEFF'D000;

std::unexpected<Failure> os_failure(const std::string& what, int error) {
  return failure(what + ": " + std::generic_category().message(error));
}

/// A file as a whole; an error names it. Empty files are none, and neither is what would not fit below 4 GiB.
Result<std::vector<std::byte>> read_file(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return os_failure("cannot open " + path, errno);
  const std::unique_ptr<const int, void (*)(const int*)> closer(&descriptor, [](const int* number) { close(*number); });
  struct stat status{};
  if (fstat(descriptor, &status) != 0) return os_failure("cannot read " + path, errno);
  if (!S_ISREG(status.st_mode)) return failure(path + " is no file");
  if (status.st_size == 0) return failure(path + " is empty");
  if (static_cast<std::uint64_t>(status.st_size) >= high_ram_start) return failure(path + " is too large");
  std::vector<std::byte> bytes(static_cast<std::size_t>(status.st_size));
  for (std::size_t done = 0; done < bytes.size();) {
    const ssize_t count = read(descriptor, bytes.data() + done, bytes.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return os_failure("cannot read " + path, errno);
    if (count == 0) return failure(path + " ended while it was read");
    done += static_cast<std::size_t>(count);
  }
  return bytes;
}

/// CPUID for processor `id` of `cpus`: one package of that many cores, with the APIC ID that it has.
void set_topology(std::vector<CpuidEntry>& entries, std::uint32_t id, std::uint32_t cpus) {
  const auto id_bits = static_cast<std::uint32_t>(std::bit_width(cpus - 1));
  std::erase_if(entries, [](const CpuidEntry& entry) {
    return entry.function == 0xB || entry.function == 0x1F || entry.function == 0x8000'0026;
  });
  const CpuidEntry* basic = find_cpuid(entries, 0);
  const CpuidEntry* extended = find_cpuid(entries, 0x8000'0000);
  constexpr std::uint32_t authentic = 0x6874'7541; // "Auth", of "AuthenticAMD"
  constexpr std::uint32_t hygon = 0x6F67'7948;     // "Hygo", of "HygonGenuine"
  const bool is_amd = basic != nullptr && (basic->ebx == authentic || basic->ebx == hygon);
  const bool has_x2apic_leaf = basic != nullptr && basic->eax >= 0xB;
  const bool has_amd_leaf = extended != nullptr && extended->eax >= 0x8000'001E;
  for (CpuidEntry& entry : entries) {
    switch (entry.function) {
    case 1: { // EBX: APIC ID [31:24], logical processors [23:16]; EDX[28]: there are several
      constexpr std::uint32_t several = 1U << 28;
      entry.ebx = (entry.ebx & 0xFFFF) | id << 24 | std::min(std::bit_ceil(cpus), 0xFFU) << 16;
      entry.edx = cpus > 1 ? entry.edx | several : entry.edx & ~several;
      break;
    }
    case 4: // EAX: core IDs in the package [31:26], processors that share the cache [25:14], both less one
      if ((entry.eax & 0x1F) != 0) {
        const bool shared = (entry.eax >> 5 & 7) >= 3;
        const std::uint32_t last = std::bit_ceil(cpus) - 1;
        entry.eax = (entry.eax & 0x3FFF) | (shared ? std::min(last, 0xFFFU) : 0) << 14 | std::min(last, 0x3FU) << 26;
      }
      break;
    case 0x8000'0008: // ECX, AMD: APIC ID bits [15:12], cores less one [7:0]
      if (is_amd) entry.ecx = (entry.ecx & ~0xF0FFU) | id_bits << 12 | (cpus - 1);
      break;
    case 0x8000'001D: // EAX, AMD: processors that share the cache, less one [25:14]
      entry.eax = (entry.eax & ~0x03FF'C000U) | ((entry.eax >> 5 & 7) >= 3 ? cpus - 1 : 0) << 14;
      break;
    default:
      break;
    }
  }
  // Levels of x2APIC IDs (Intel SDM vol. 2, CPUID leaf 0BH): one thread a core, all cores of the package, the end.
  if (has_x2apic_leaf) {
    constexpr std::uint32_t thread_level = 1;
    constexpr std::uint32_t core_level = 2;
    const auto level = [&](std::uint32_t index, std::uint32_t bits, std::uint32_t count, std::uint32_t type) {
      entries.push_back({.function = 0xB,
                         .index = index,
                         .index_significant = true,
                         .eax = bits,
                         .ebx = count,
                         .ecx = type << 8 | index,
                         .edx = id});
    };
    level(0, 0, 1, thread_level);
    level(1, id_bits, cpus, core_level);
    level(2, 0, 0, 0);
  }
  // AMD APM vol. 3, Fn8000_001E: the extended APIC ID; the core, of one thread; node 0 of one.
  if (has_amd_leaf) set_cpuid_entry(entries, {.function = 0x8000'001E, .eax = id, .ebx = id});
}

class LinuxGuest final : public Guest {
public:
  LinuxGuest(const Options& options, std::vector<zeroing::Pages> ram, std::vector<std::byte> kernel,
             std::vector<std::byte> initrd, LinuxImage image, LinuxPlan plan)
      : cpus_(options.cpus), save_at_(options.save_at), boots_left_(std::uint64_t{options.resets} + 1),
        console_(options.json == "-" ? STDERR_FILENO : STDOUT_FILENO), ram_(std::move(ram)), kernel_(std::move(kernel)),
        initrd_(std::move(initrd)), image_(image), plan_(std::move(plan)) {}

  [[nodiscard]] const std::vector<zeroing::Pages>& ram() const override { return ram_; }

  [[nodiscard]] Result<void> load(const GuestMemory& memory) override {
    const auto put = [&](std::uint64_t address, std::span<const std::byte> bytes) -> Result<void> {
      if (auto loaded = memory.load(GuestAddress(address), bytes); !loaded) return failure(loaded.error().message());
      return {};
    };
    for (const auto& block : plan_.blocks)
      if (auto loaded = put(block.address, block.bytes); !loaded) return loaded;
    if (auto loaded = put(plan_.kernel, image_.kernel); !loaded) return loaded;
    if (!initrd_.empty())
      if (auto loaded = put(plan_.initrd, initrd_); !loaded) return loaded;
    if (--boots_left_ != 0) return {};
    image_ = {};
    kernel_ = {};
    initrd_ = {};
    return {};
  }

  [[nodiscard]] Result<void> add_devices(Vm& vm) override {
    clock_index_ = 0;
    reset_ = false;
    serial_.emplace(Serial::Callbacks{
        .transmit = [this](char character) { transmit(character); },
        .interrupt =
            [this, &vm](bool active) {
              if (auto set = vm.set_interrupt_line(serial_interrupt, active); !set)
                interrupt_error_ = set.error().os_error;
            },
        .room = [this] { room_for_input(); },
    });
    if (auto set = vm.set_identity_map_address(identity_map_address); !set) return failure(set.error().message());
    if (auto set = vm.set_tss_address(tss_address); !set) return failure(set.error().message());
    if (auto made = vm.create_interrupt_controller(); !made) return failure(made.error().message());
    if (auto made = vm.create_interval_timer(); !made) return failure(made.error().message());
    return {};
  }

  [[nodiscard]] bool has_interrupt_controller() const override { return true; }

  [[nodiscard]] std::vector<CpuidEntry> cpuid(std::vector<CpuidEntry> supported, std::uint32_t id) const override {
    set_topology(supported, id, cpus_);
    return supported;
  }

  /// The boot processor's; the others wait for it to start them.
  [[nodiscard]] Result<void> set_registers(Vcpu& vcpu) override {
    if (vcpu.id() != 0) return {};
    auto special = vcpu.special_registers();
    if (!special) return failure(special.error().message());
    special->cs = code64_segment(linux_code_selector);
    special->ds = special->es = special->fs = special->gs = special->ss = data_segment(linux_data_selector);
    special->gdt = {.base = plan_.gdt, .limit = plan_.gdt_limit};
    special->cr0 = cr0_pe | cr0_mp | cr0_et | cr0_ne | cr0_wp | cr0_pg;
    special->cr3 = plan_.page_tables;
    special->cr4 = cr4_pae;
    special->efer = efer_lme | efer_lma;
    if (auto set = vcpu.set_special_registers(*special); !set) return failure(set.error().message());
    Registers registers;
    registers.rip = plan_.entry;
    registers.rsi = plan_.zero_page;
    if (auto set = vcpu.set_registers(registers); !set) return failure(set.error().message());
    return {};
  }

  void begin(boost::asio::io_context& io) override {
    const std::lock_guard lock(input_mutex_);
    input_ =
        std::make_shared<ConsoleInput>(io, [this](std::span<const char> bytes) { return serial_->receive(bytes); });
  }

  void end() override {
    const std::lock_guard lock(input_mutex_);
    input_.reset();
  }

  [[nodiscard]] std::expected<VcpuAction, std::string> on_exit(Vcpu& vcpu, const Exit& exit) override {
    if (const auto* out = std::get_if<IoOut>(&exit)) return port_write(*out);
    if (const auto* in = std::get_if<IoIn>(&exit)) return port_read(vcpu, *in);
    // Nothing is there: reads are all ones.
    if (std::holds_alternative<MmioRead>(exit) || std::holds_alternative<MmioWrite>(exit)) return VcpuAction::resume;
    if (std::holds_alternative<Shutdown>(exit)) return std::unexpected("the guest crashed (triple fault)");
    return std::unexpected("an exit that this guest has no reason for: " + describe_exit(exit));
  }

  [[nodiscard]] Result<void> collect(const MemoryMap& /*map*/, RunFigures& /*figures*/) override {
    if (auto error = interrupt_error_.load(); error != 0) return os_failure("the serial port's interrupt", error);
    if (!reset_ && !saves_) return failure("the guest ended without a reset");
    return {};
  }

  [[nodiscard]] bool is_to_be_saved() const override { return saves_; }
  [[nodiscard]] SavedDevices devices() const override {
    return {.serial = serial_->state(), .clock_index = clock_index_};
  }
  [[nodiscard]] Result<void> restore_devices(const SavedDevices& devices) override {
    if (!serial_->restore(devices.serial)) return failure("--restore: the serial port's state is none");
    clock_index_ = devices.clock_index;
    return {};
  }

private:
  /// A character for the console, with the serial port's lock held.
  void transmit(char character) {
    write_to_console(console_, character);
    if (save_at_.empty()) return;
    heard_ += character;
    if (heard_.size() > save_at_.size()) heard_.erase(0, heard_.size() - save_at_.size());
    if (heard_ == save_at_) saves_ = true;
  }

  /// A byte that the guest writes to a port.
  void write_byte(std::uint16_t port, std::uint8_t value) {
    constexpr std::uint8_t keyboard_reset = 0xFE; // pulses the line that resets the processor
    constexpr std::uint8_t reset_now = 0x04;
    if (port >= serial_port && port - serial_port < Serial::ports)
      serial_->write(port - serial_port, value);
    else if (port == clock_index_port)
      clock_index_ = value & 0x7F;
    else if ((port == keyboard_port && value == keyboard_reset) || (port == reset_port && (value & reset_now) != 0))
      reset_ = true;
  }

  [[nodiscard]] std::uint8_t read_byte(std::uint16_t port) {
    if (port >= serial_port && port - serial_port < Serial::ports) return serial_->read(port - serial_port);
    switch (port) {
    case clock_data_port:
      return read_clock_chip(clock_index_, std::time(nullptr));
    case keyboard_port:
      // Output that never ends, by which drivers know that there is no controller; ready for the reset command.
      return 0x01;
    case keyboard_data_port:
    case reset_port:
      return 0;
    default:
      return 0xFF;
    }
  }

  [[nodiscard]] VcpuAction port_write(const IoOut& out) {
    for (std::size_t i = 0; i < out.data.size(); ++i)
      write_byte(static_cast<std::uint16_t>(out.port + i % out.size), std::to_integer<std::uint8_t>(out.data[i]));
    return reset_ || saves_ ? VcpuAction::stop_group : VcpuAction::resume;
  }

  [[nodiscard]] std::expected<VcpuAction, std::string> port_read(Vcpu& vcpu, const IoIn& in) {
    std::vector<std::byte> data(std::size_t{in.size} * in.count);
    for (std::size_t i = 0; i < data.size(); ++i)
      data[i] = std::byte{read_byte(static_cast<std::uint16_t>(in.port + i % in.size))};
    if (auto completed = vcpu.complete_io_in(data); !completed) return std::unexpected(completed.error().message());
    return VcpuAction::resume;
  }

  void room_for_input() {
    const std::lock_guard lock(input_mutex_);
    if (input_) input_->resume();
  }

  std::uint32_t cpus_;
  std::string save_at_;      // what the guest says then; empty: never
  std::string heard_;        // the last that it said
  std::uint64_t boots_left_; // to be loaded for
  int console_;
  std::vector<zeroing::Pages> ram_;
  std::vector<std::byte> kernel_; // these three until they are loaded for the last time
  std::vector<std::byte> initrd_;
  LinuxImage image_; // of kernel_
  LinuxPlan plan_;
  std::mutex input_mutex_;
  std::shared_ptr<ConsoleInput> input_;
  std::atomic<int> interrupt_error_ = 0;
  std::atomic<bool> reset_ = false;
  std::atomic<bool> saves_ = false;
  std::atomic<std::uint8_t> clock_index_ = 0;
  std::optional<Serial> serial_;
};

} // namespace

Result<std::unique_ptr<Guest>> make_linux_guest(const Options& options) {
  auto kernel = read_file(options.kernel);
  if (!kernel) return std::unexpected(std::move(kernel.error()));
  const auto image = parse_linux_image(*kernel);
  if (!image) return failure(options.kernel + " " + image.error());
  std::vector<std::byte> initrd;
  if (!options.initrd.empty()) {
    auto read = read_file(options.initrd);
    if (!read) return std::unexpected(std::move(read.error()));
    initrd = std::move(*read);
  }
  auto ram = ram_ranges(options.memory_bytes);
  auto plan = plan_linux(*image, ram, initrd.size(), options.append, options.cpus);
  if (!plan) return failure(std::move(plan.error()));
  return std::make_unique<LinuxGuest>(options, std::move(ram), std::move(*kernel), std::move(initrd), *image,
                                      std::move(*plan));
}

std::unique_ptr<Guest> make_restored_guest(const Options& options) {
  return std::make_unique<LinuxGuest>(options, ram_ranges(options.memory_bytes), std::vector<std::byte>(),
                                      std::vector<std::byte>(), LinuxImage(), LinuxPlan());
}

} // namespace cppvmm::boot
