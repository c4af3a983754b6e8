// A bare guest for tests: some memory at guest-physical 0 with the tables for long mode and for 32-bit protected mode,
// a VM that has it as slot 0, and starting states. Include it after all other headers: it imports cppvmm.vcpu.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <initializer_list>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <variant>
#include <vector>

#include <gtest/gtest.h>

#include "machine_facts.hpp"

import cppvmm.vcpu;

namespace cppvmm::test {

/// Anonymous private memory of the host, zero at first.
class HostMemory {
public:
  explicit HostMemory(std::size_t bytes) : bytes_(bytes) {
    void* const mapped =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(mapped);
  }
  HostMemory(HostMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  HostMemory& operator=(HostMemory&&) = delete;
  ~HostMemory() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return bytes_; }

  /// `at` and the bytes of T lie inside, or std::out_of_range.
  template <class T>
  [[nodiscard]] T read(std::uint64_t at) const {
    check(at, sizeof(T));
    T value;
    std::memcpy(&value, data_ + at, sizeof value);
    return value;
  }
  template <class T>
  void write(std::uint64_t at, const T& value) const {
    check(at, sizeof(T));
    std::memcpy(data_ + at, &value, sizeof value);
  }
  void write_bytes(std::uint64_t at, std::span<const std::uint8_t> bytes) const {
    check(at, bytes.size());
    if (!bytes.empty()) std::memcpy(data_ + at, bytes.data(), bytes.size());
  }

private:
  void check(std::uint64_t at, std::size_t length) const {
    if (at > bytes_ || length > bytes_ - at) throw std::out_of_range("HostMemory");
  }

  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// x86 machine code, put together from bytes.
class Code {
public:
  Code() = default;
  Code(std::initializer_list<int> bytes) { raw(bytes); }

  Code& raw(std::initializer_list<int> bytes) {
    for (const int byte : bytes)
      bytes_.push_back(static_cast<std::uint8_t>(byte));
    return *this;
  }
  template <class T>
  Code& value(T number) {
    std::array<std::uint8_t, sizeof(T)> bytes;
    std::memcpy(bytes.data(), &number, sizeof number);
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  /// out port, al.
  Code& out(std::uint8_t port) { return raw({0xE6, port}); }
  Code& hlt() { return raw({0xF4}); }
  /// jmp to itself.
  Code& spin() { return raw({0xEB, 0xFE}); }
  /// jmp to the first byte; 64-bit and 32-bit code.
  Code& loop() {
    const auto distance = -static_cast<std::int32_t>(bytes_.size()) - 5;
    return raw({0xE9}).value(distance);
  }
  /// mov eax, value: 64-bit and 32-bit code.
  Code& mov_eax(std::uint32_t number) { return raw({0xB8}).value(number); }
  /// mov ecx, value: 64-bit and 32-bit code.
  Code& mov_ecx(std::uint32_t number) { return raw({0xB9}).value(number); }
  /// mov edx, value: 64-bit and 32-bit code.
  Code& mov_edx(std::uint32_t number) { return raw({0xBA}).value(number); }
  /// mov rbx, value.
  Code& mov_rbx(std::uint64_t number) { return raw({0x48, 0xBB}).value(number); }

  [[nodiscard]] std::size_t size() const { return bytes_.size(); }
  [[nodiscard]] std::span<const std::uint8_t> bytes() const { return bytes_; }

private:
  std::vector<std::uint8_t> bytes_;
};

/// Where things are in a bare guest.
namespace layout {
inline constexpr std::uint64_t pml4 = 0x1000;
inline constexpr std::uint64_t pdpt = 0x2000;
inline constexpr std::uint64_t page_directory = 0x3000; // identity, 2 MiB pages, 1 GiB, user pages
inline constexpr std::uint64_t gdt = 0x4000;
inline constexpr std::uint64_t tss = 0x4800;
inline constexpr std::uint64_t idt64 = 0x5000;
inline constexpr std::uint64_t idt32 = 0x5800;
inline constexpr std::uint64_t handlers = 0x6000;        // 16 bytes for each of 32 vectors
inline constexpr std::uint64_t code = 0x8000;            // where code goes by default
inline constexpr std::uint64_t exception_stack = 0xB000; // top; what a fault at CPL 3 switches to
inline constexpr std::uint64_t stack = 0xC000;           // top
inline constexpr std::uint64_t user_stack = 0xD000;      // top
inline constexpr std::uint64_t free = 0x10000;           // from here on nothing

inline constexpr std::uint16_t code64_selector = 0x08;
inline constexpr std::uint16_t data_selector = 0x10;
inline constexpr std::uint16_t user_code64_selector = 0x18;
inline constexpr std::uint16_t user_data_selector = 0x20;
inline constexpr std::uint16_t code32_selector = 0x28;
inline constexpr std::uint16_t tss_selector = 0x30;
} // namespace layout

/// The handler of exception `vector` does nothing but write to this port (then HLT): no register is changed, and the
/// exception frame is on the stack.
[[nodiscard]] constexpr std::uint16_t exception_port(ExceptionVector vector) {
  return static_cast<std::uint16_t>(0x40 + static_cast<unsigned>(vector));
}

/// What the processor pushed, in long mode, for an exception that has no error code.
struct ExceptionFrame {
  std::uint64_t rip, cs, rflags, rsp, ss;
};

/// Writes the tables that `layout` names.
inline void write_guest_tables(const HostMemory& memory) {
  memory.write<std::uint64_t>(layout::pml4, layout::pdpt | 7);
  memory.write<std::uint64_t>(layout::pdpt, layout::page_directory | 7);
  for (std::uint64_t i = 0; i < 512; ++i)
    memory.write<std::uint64_t>(layout::page_directory + 8 * i, i << 21 | 0x87); // present, writable, user, large

  constexpr std::array<std::uint64_t, 8> descriptors = {
      0,
      0x00AF'9B00'0000'FFFF,                                   // 64-bit code
      0x00CF'9300'0000'FFFF,                                   // data
      0x00AF'FB00'0000'FFFF,                                   // 64-bit code, DPL 3
      0x00CF'F300'0000'FFFF,                                   // data, DPL 3
      0x00CF'9B00'0000'FFFF,                                   // 32-bit code
      0x0000'8B00'0000'0067 | (layout::tss & 0xFF'FFFF) << 16, // TSS, busy; its upper half is zero
      0,
  };
  memory.write(layout::gdt, descriptors);
  memory.write<std::uint64_t>(layout::tss + 4, layout::exception_stack); // RSP0
  memory.write<std::uint16_t>(layout::tss + 0x66, 0x68);                 // no I/O permission bitmap

  for (unsigned vector = 0; vector < 32; ++vector) {
    const std::uint64_t handler = layout::handlers + 16 * vector;
    memory.write_bytes(handler, Code{0xE6, static_cast<int>(0x40 + vector), 0xF4, 0xEB, 0xFD}.bytes());
    const std::uint64_t gate = (handler & 0xFFFF) | (handler & 0xFFFF'0000) << 32 | 0x8E00ULL << 32; // interrupt, DPL 0
    memory.write<std::uint64_t>(layout::idt64 + 16 * vector, gate | std::uint64_t{layout::code64_selector} << 16);
    memory.write<std::uint64_t>(layout::idt64 + 16 * vector + 8, 0);
    memory.write<std::uint64_t>(layout::idt32 + 8 * vector, gate | std::uint64_t{layout::code32_selector} << 16);
  }
}

/// Starting states. Each returns what KVM said, and leaves everything that it does not name as KVM has it.
inline KvmResult<void> start_real_mode(Vcpu& vcpu, std::uint64_t rip = layout::code) {
  auto special = vcpu.special_registers();
  if (!special) return std::unexpected(special.error());
  special->cs.selector = 0;
  special->cs.base = 0;
  if (const auto set = vcpu.set_special_registers(*special); !set) return set;
  return vcpu.set_registers({.rsp = layout::stack, .rip = rip});
}

inline KvmResult<void> start_protected_mode(Vcpu& vcpu, std::uint64_t rip = layout::code) {
  auto special = vcpu.special_registers();
  if (!special) return std::unexpected(special.error());
  special->cs = code32_segment(layout::code32_selector);
  special->ds = special->es = special->fs = special->gs = special->ss = data_segment(layout::data_selector);
  special->gdt = {.base = layout::gdt, .limit = 8 * 8 - 1};
  special->idt = {.base = layout::idt32, .limit = 32 * 8 - 1};
  special->cr0 = cr0_pe | cr0_et | cr0_ne;
  if (const auto set = vcpu.set_special_registers(*special); !set) return set;
  return vcpu.set_registers({.rsp = layout::stack, .rip = rip});
}

/// At a `cpl` of 1 to 3 too, the guest may use ports (IOPL 3); the selectors name descriptors of CPL 0 and 3. CPUID
/// must have been set.
inline KvmResult<void> start_long_mode(Vcpu& vcpu, std::uint64_t rip = layout::code, std::uint8_t cpl = 0) {
  auto special = vcpu.special_registers();
  if (!special) return std::unexpected(special.error());
  special->cs = code64_segment(cpl == 0 ? layout::code64_selector : layout::user_code64_selector, cpl);
  special->ds = special->es = special->fs = special->gs = special->ss =
      data_segment(cpl == 0 ? layout::data_selector : layout::user_data_selector, cpl);
  special->tr = {};
  special->tr.base = layout::tss;
  special->tr.limit = 0x67;
  special->tr.selector = layout::tss_selector;
  special->tr.type = 0xB;
  special->tr.present = true;
  special->gdt = {.base = layout::gdt, .limit = 8 * 8 - 1};
  special->idt = {.base = layout::idt64, .limit = 32 * 16 - 1};
  special->cr0 = cr0_pe | cr0_mp | cr0_et | cr0_ne | cr0_wp | cr0_pg;
  special->cr3 = layout::pml4;
  special->cr4 = cr4_pae | cr4_osfxsr | cr4_osxmmexcpt;
  special->efer = efer_lme | efer_lma;
  if (const auto set = vcpu.set_special_registers(*special); !set) return set;
  return vcpu.set_registers(
      {.rsp = cpl == 0 ? layout::stack : layout::user_stack, .rip = rip, .rflags = cpl == 0 ? 0x2U : 0x3002U});
}

/// A test with a VM that has `memory` at guest-physical 0, slot 0. Skips, saying why, where /dev/kvm cannot be used.
class BareGuestTest : public testing::Test {
protected:
  static constexpr std::size_t memory_bytes = 2 << 20;

  void SetUp() override {
    if (const std::string why = kvm_missing(); !why.empty()) GTEST_SKIP() << "no usable KVM: " << why;
    auto opened = Kvm::open();
    ASSERT_TRUE(opened) << opened.error().message();
    kvm.emplace(std::move(*opened));
    auto created = kvm->create_vm();
    ASSERT_TRUE(created) << created.error().message();
    vm.emplace(std::move(*created));
    const auto tss = vm->set_tss_address(0xFFFB'D000); // below 4 GiB, where no test has memory
    ASSERT_TRUE(tss) << tss.error().message();
    write_guest_tables(memory);
    const auto slot = vm->set_memory_slot({.bytes = memory.size(), .host_address = memory.data()});
    ASSERT_TRUE(slot) << slot.error().message();
  }

  /// With the CPUID leaves that KVM supports.
  Vcpu make_vcpu(std::uint32_t id = 0, VcpuOptions options = {}) {
    auto vcpu = vm->create_vcpu(id, options);
    if (!vcpu) throw std::runtime_error(vcpu.error().message());
    const auto cpuid = kvm->supported_cpuid();
    if (!cpuid) throw std::runtime_error(cpuid.error().message());
    if (const auto set = vcpu->set_cpuid(*cpuid); !set) throw std::runtime_error(set.error().message());
    return std::move(*vcpu);
  }

  void load(const Code& code, std::uint64_t at = layout::code) { memory.write_bytes(at, code.bytes()); }

  HostMemory memory{memory_bytes};
  std::optional<Kvm> kvm;
  std::optional<Vm> vm;
};

/// Runs until an exit that is not a stray signal's.
inline KvmResult<Exit> run_on(Vcpu& vcpu) {
  for (;;) {
    auto exit = vcpu.run();
    if (!exit) return exit;
    const auto* const interrupted = std::get_if<Interrupted>(&*exit);
    if (interrupted == nullptr || interrupted->stop_requested) return exit;
  }
}

} // namespace cppvmm::test

/// `expression` is a KvmResult that holds a value.
#define ASSERT_KVM_OK(expression)                                                                                      \
  do {                                                                                                                 \
    const auto& kvm_result_ = (expression);                                                                            \
    ASSERT_TRUE(kvm_result_.has_value()) << #expression ": " << kvm_result_.error().message();                         \
  } while (false)

/// Runs the vCPU to its next exit, which is of `type`, and binds it to `name`.
#define ASSERT_RUN(type, name, vcpu)                                                                                   \
  const auto name##_exit_ = ::cppvmm::test::run_on(vcpu);                                                              \
  ASSERT_TRUE(name##_exit_.has_value()) << name##_exit_.error().message();                                             \
  ASSERT_TRUE(std::holds_alternative<::cppvmm::type>(*name##_exit_)) << ::cppvmm::exit_name(*name##_exit_);            \
  [[maybe_unused]] const auto& name = std::get<::cppvmm::type>(*name##_exit_)
