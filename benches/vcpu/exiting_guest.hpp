#pragma once
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <linux/kvm.h>
#include <memory>
#include <stdexcept>
#include <string>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <system_error>
#include <vector>
import cppvmm.guest_memory;
import cppvmm.vcpu;

// A guest that does nothing but exit, and the least that runs one.

namespace cppvmm::bench {

/// x86 machine code.
class Code {
public:
  Code& raw(std::initializer_list<int> bytes) {
    for (const int byte : bytes)
      bytes_.push_back(static_cast<std::uint8_t>(byte));
    return *this;
  }
  template <class T>
  Code& value(T number) {
    const auto* const bytes = reinterpret_cast<const std::uint8_t*>(&number);
    bytes_.insert(bytes_.end(), bytes, bytes + sizeof number);
    return *this;
  }
  /// ECX and EDX:EAX, then wrmsr.
  Code& wrmsr(std::uint32_t index, std::uint64_t number) {
    raw({0xB9}).value(index);
    raw({0xB8}).value(static_cast<std::uint32_t>(number));
    raw({0xBA}).value(static_cast<std::uint32_t>(number >> 32));
    return raw({0x0F, 0x30});
  }
  /// jmp to the byte at `target`.
  Code& jump(std::size_t target) {
    const auto distance = static_cast<std::int32_t>(target) - static_cast<std::int32_t>(bytes_.size()) - 5;
    return raw({0xE9}).value(distance);
  }
  [[nodiscard]] std::size_t size() const { return bytes_.size(); }
  [[nodiscard]] const std::uint8_t* data() const { return bytes_.data(); }

private:
  std::vector<std::uint8_t> bytes_;
};

/// A VM of one slot, 2 MiB at 0, and a vCPU that starts in 64-bit code. Throws what fails.
class ExitingGuest {
public:
  static constexpr std::uint64_t bytes = 2 << 20;
  static constexpr std::uint64_t code = 0x8000;
  static constexpr std::uint64_t stack = 0xC000; // its top
  static constexpr std::uint64_t free = 0x10000; // from here on nothing

  explicit ExitingGuest(const Kvm& kvm)
      : region_(value_or_throw(Region::anonymous(GuestAddress(0), bytes))),
        memory_(std::make_unique<GuestMemory>(value_or_throw(MemoryMap::make({region_})))),
        vm_(value_or_throw(kvm.create_vm())) {
    value_or_throw(vm_.set_tss_address(0xFFFB'D000)); // below 4 GiB, where it has no memory
    value_or_throw(vm_.set_memory_slot({.bytes = bytes, .host_address = region_.host_address()}));
  }

  /// With its CPUID set, in long mode at the code.
  void start(Vcpu& vcpu, const Code& instructions) const {
    constexpr std::uint64_t pml4 = 0x1000, pdpt = 0x2000, page_directory = 0x3000;
    write(pml4, pdpt | 3);
    write(pdpt, page_directory | 3);
    write(page_directory, std::uint64_t{0x83}); // present, writable, large
    std::memcpy(at(code), instructions.data(), instructions.size());
    SpecialRegisters special = value_or_throw(vcpu.special_registers());
    special.cs = code64_segment(0x08);
    special.ds = special.es = special.fs = special.gs = special.ss = data_segment(0x10);
    special.cr0 = cr0_pe | cr0_mp | cr0_et | cr0_ne | cr0_wp | cr0_pg;
    special.cr3 = pml4;
    special.cr4 = cr4_pae;
    special.efer = efer_lme | efer_lma;
    value_or_throw(vcpu.set_special_registers(special));
    value_or_throw(vcpu.set_registers({.rsp = stack, .rip = code}));
  }

  [[nodiscard]] Vm& vm() { return vm_; }
  [[nodiscard]] const GuestMemory& memory() const { return *memory_; }
  [[nodiscard]] std::byte* at(std::uint64_t address) const {
    return static_cast<std::byte*>(region_.host_address()) + address;
  }
  void write(std::uint64_t address, std::uint64_t number) const { std::memcpy(at(address), &number, sizeof number); }
  [[nodiscard]] std::uint64_t read(std::uint64_t address) const {
    std::uint64_t number = 0;
    std::memcpy(&number, at(address), sizeof number);
    return number;
  }

private:
  Region region_;
  std::unique_ptr<GuestMemory> memory_; // what answers hypercalls refers to it
  Vm vm_;
};

/// The floor: KVM_RUN and its page.
class BareRun {
public:
  BareRun(int vcpu, std::size_t bytes) : vcpu_(vcpu), bytes_(bytes) {
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap of kvm_run");
    run_ = static_cast<kvm_run*>(mapped);
  }
  BareRun(const BareRun&) = delete;
  BareRun& operator=(const BareRun&) = delete;
  ~BareRun() { munmap(run_, bytes_); }

  /// Until the next exit.
  kvm_run& next() {
    while (ioctl(vcpu_, KVM_RUN, 0) != 0)
      if (errno != EINTR) throw std::system_error(errno, std::generic_category(), "KVM_RUN");
    return *run_;
  }
  /// One of a byte.
  [[nodiscard]] std::uint8_t& io_data() { return reinterpret_cast<std::uint8_t*>(run_)[run_->io.data_offset]; }
  [[nodiscard]] kvm_run& page() { return *run_; }
  [[nodiscard]] int vcpu() const { return vcpu_; }

private:
  int vcpu_;
  std::size_t bytes_;
  kvm_run* run_;
};

/// What a VMM has seen of its guest's exits.
struct Seen {
  std::uint64_t exits = 0;
  std::uint64_t sum = 0;
  void add(std::uint64_t value) {
    ++exits;
    sum = sum * 31 + value;
  }
  friend bool operator==(const Seen&, const Seen&) = default;
};

[[noreturn]] inline void unexpected_exit(const std::string& which) {
  throw std::runtime_error("the guest exits otherwise: " + which);
}

/// Ours beside the floor, each until its guest has exited so often once more; both see the same.
template <class Ours, class Floor>
void run_exits(Measurement& measurement, Ours& ours, Floor& floor) {
  const std::uint64_t exits = unless_brief(2000, 100);
  const auto run = [exits](auto& vmm) { vmm.run_until(vmm.seen().exits + exits); };
  run(ours);
  run(floor);
  if (ours.seen() != floor.seen()) return measurement.fail("ours and the floor have seen other exits");
  if (std::getenv("CPPVMM_LAB") != nullptr) measurement.note("in the lab");
  measurement.run([&] { run(ours); }, [&] { run(floor); }, exits);
  if (ours.seen() != floor.seen()) measurement.fail("ours and the floor have seen other exits");
}

/// Opens KVM, and measures; where it cannot be used, says so.
template <class Measure>
auto with_kvm(Measure measure) {
  return [measure](Measurement& measurement) {
    try {
      const auto kvm = Kvm::open();
      if (!kvm) return measurement.skip("no usable KVM: " + kvm.error().message());
      if (const auto vm = kvm->create_vm(); !vm) return measurement.skip("no usable KVM: " + vm.error().message());
      measure(measurement, *kvm);
    } catch (const std::exception& error) {
      measurement.fail(error.what());
    }
  };
}

inline constexpr const char* no_msr_filter = "this KVM has no MSR filter (Linux 5.10)";
[[nodiscard]] inline bool has_msr_filter(const Kvm& kvm) {
  return kvm.capabilities().msr_filter && (kvm.capabilities().user_space_msr_reasons & msr_reason_filter) != 0;
}

} // namespace cppvmm::bench
