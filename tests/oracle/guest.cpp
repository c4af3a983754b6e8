#include "guest.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <variant>
#include <vector>

#include "guest_log.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_ext;
import cppvmm.vcpu;

namespace cppvmm::oracle {
namespace {

constexpr std::size_t control_bytes = 0x10000;
constexpr std::uint64_t tables_at = guest_code_base;
constexpr std::uint64_t store_at = guest_code_base + 0x4000;
constexpr std::uint64_t read_at = guest_code_base + 0x5000;
constexpr std::uint64_t publish_at = guest_code_base + 0x6000;
constexpr std::uint16_t code_selector = 0x08;
constexpr std::uint16_t data_selector = 0x10;

// next: mov [rdi], al; add rdi, 4096; dec ecx; jnz next; hlt
constexpr std::array<std::uint8_t, 14> store_code = {0x88, 0x07, 0x48, 0x81, 0xC7, 0x00, 0x10,
                                                     0x00, 0x00, 0xFF, 0xC9, 0x75, 0xF3, 0xF4};
// the same with mov al, [rdi]
constexpr std::array<std::uint8_t, 14> read_code = {0x8A, 0x07, 0x48, 0x81, 0xC7, 0x00, 0x10,
                                                    0x00, 0x00, 0xFF, 0xC9, 0x75, 0xF3, 0xF4};

std::unexpected<std::string> failure(const KvmError& error) { return std::unexpected(error.message()); }

// next: mov [rdi], al; add rdi, 4096; inc edx; mov [rsi], edx; dec ecx; jnz next; hlt
constexpr std::array<std::uint8_t, 18> publish_code = {0x88, 0x07, 0x48, 0x81, 0xC7, 0x00, 0x10, 0x00, 0x00,
                                                       0xFF, 0xC2, 0x89, 0x16, 0xFF, 0xC9, 0x75, 0xEF, 0xF4};

} // namespace

struct Guest::Machine {
  Machine(Vm made_vm, Vcpu made_vcpu) : vm(std::move(made_vm)), vcpu(std::move(made_vcpu)) {
    void* const mapped = mmap(nullptr, control_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    control.reset(static_cast<std::byte*>(mapped));
  }

  struct Unmap {
    void operator()(std::byte* memory) const { munmap(memory, control_bytes); }
  };
  std::unique_ptr<std::byte, Unmap> control; // outlives the VM, which has it in a slot
  Vm vm;
  Vcpu vcpu;
  std::vector<MemorySlot> slots; ///< Of the guest's memory, numbered from 1 on.
};

Guest::Guest(std::unique_ptr<Machine> machine) : machine_(std::move(machine)) {}
Guest::Guest(Guest&&) noexcept = default;
Guest::~Guest() = default;

void Guest::write_tables(std::uint64_t tables, std::span<std::byte, table_pages * 4096> into) {
  std::memset(into.data(), 0, into.size());
  const auto put = [&](std::size_t at, std::uint64_t entry) { std::memcpy(into.data() + at, &entry, sizeof entry); };
  put(0, (tables + 0x1000) | 3);
  put(0x1000, (tables + 0x2000) | 3);
  for (std::uint64_t i = 0; i < 512; ++i)
    put(0x2000 + 8 * i, i << 21 | 0x83); // present, writable, large
}

std::expected<Guest, std::string> Guest::start() {
  const auto kvm = Kvm::open();
  if (!kvm) return failure(kvm.error());
  auto vm = kvm->create_vm();
  if (!vm) return failure(vm.error());
  if (const auto set = vm->set_tss_address(0xFFFB'D000); !set) return failure(set.error());
  auto vcpu = vm->create_vcpu(0);
  if (!vcpu) return failure(vcpu.error());
  const auto cpuid = kvm->supported_cpuid();
  if (!cpuid) return failure(cpuid.error());
  if (const auto set = vcpu->set_cpuid(*cpuid); !set) return failure(set.error());
  auto machine = std::make_unique<Machine>(std::move(*vm), std::move(*vcpu));

  write_tables(tables_at, std::span<std::byte, table_pages * 4096>(machine->control.get(), table_pages * 4096));
  std::memcpy(machine->control.get() + (store_at - guest_code_base), store_code.data(), store_code.size());
  std::memcpy(machine->control.get() + (read_at - guest_code_base), read_code.data(), read_code.size());
  std::memcpy(machine->control.get() + (publish_at - guest_code_base), publish_code.data(), publish_code.size());
  if (const auto set = machine->vm.set_memory_slot({.slot = 0,
                                                    .guest_address = guest_code_base,
                                                    .bytes = control_bytes,
                                                    .host_address = machine->control.get()});
      !set)
    return failure(set.error());
  return Guest(std::move(machine));
}

std::expected<void, std::string> Guest::set_memory(std::span<const GuestSlot> slots) {
  for (; !machine_->slots.empty(); machine_->slots.pop_back())
    if (const auto gone = machine_->vm.remove_memory_slot(machine_->slots.back().slot); !gone)
      return failure(gone.error());
  for (const GuestSlot& slot : slots) {
    const MemorySlot made{.slot = static_cast<std::uint32_t>(machine_->slots.size() + 1),
                          .guest_address = slot.first_page * 4096,
                          .bytes = slot.pages * 4096,
                          .host_address = slot.host,
                          .read_only = slot.read_only};
    if (const auto set = machine_->vm.set_memory_slot(made); !set) return failure(set.error());
    machine_->slots.push_back(made);
  }
  return {};
}

std::expected<DirtyLog, std::string> start_dirty_log(Guest& guest, GuestMemory& memory,
                                                     const WriteLogOptions& options) {
  auto log = DirtyLog::start(guest.machine().vm, memory, guest.machine().slots, options);
  if (!log) return std::unexpected(log.error().message());
  return std::move(*log);
}

std::expected<void, std::string> Guest::run(std::uint64_t tables, std::uint64_t code, std::uint64_t address,
                                            std::uint32_t count, std::uint8_t value, std::uint64_t progress) {
  Vcpu& vcpu = machine_->vcpu;
  auto special = vcpu.special_registers();
  if (!special) return failure(special.error());
  special->cs = code64_segment(code_selector);
  special->ds = special->es = special->fs = special->gs = special->ss = data_segment(data_selector);
  special->cr0 = cr0_pe | cr0_mp | cr0_et | cr0_ne | cr0_wp | cr0_pg;
  special->cr3 = tables;
  special->cr4 = cr4_pae;
  special->efer = efer_lme | efer_lma;
  if (const auto set = vcpu.set_special_registers(*special); !set) return failure(set.error());
  if (const auto set = vcpu.set_registers({.rax = value, .rcx = count, .rsi = progress, .rdi = address, .rip = code});
      !set)
    return failure(set.error());
  for (;;) {
    const auto exit = vcpu.run();
    if (!exit) return failure(exit.error());
    if (std::holds_alternative<Interrupted>(*exit)) continue;
    if (std::holds_alternative<Hlt>(*exit)) return {};
    return std::unexpected(std::string("the guest stopped for ") + exit_name(*exit));
  }
}

std::expected<void, std::string> Guest::access(std::uint64_t address, std::uint32_t count,
                                               std::optional<std::uint8_t> value) {
  return run(tables_at, value ? store_at : read_at, address, count, value.value_or(0));
}

std::expected<void, std::string> Guest::store_and_publish(std::uint64_t address, std::uint32_t count,
                                                          std::uint64_t progress) {
  return run(tables_at, publish_at, address, count, 1, progress);
}

std::expected<void, std::string> Guest::walk(std::uint64_t tables, std::uint64_t address, std::uint32_t count) {
  return run(tables, read_at, address, count, 0);
}

} // namespace cppvmm::oracle
