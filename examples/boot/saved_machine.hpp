// A machine that was stopped, and its file. Include it after all other headers: it imports modules.
#pragma once

#include "options.hpp"

#include <array>
#include <cstdint>
#include <expected>
#include <functional>
#include <span>
#include <string>
#include <vector>

import cppvmm.guest_memory;
import cppvmm.hv_ext;
import cppvmm.vcpu;

namespace cppvmm::boot {

/// A vCPU: all that KVM keeps of it.
struct SavedVcpu {
  std::uint32_t tsc_khz = 0;
  MpState mp_state{};
  Registers registers;
  SpecialRegisters special_registers;
  ExtendedControlRegisters control_registers;
  Xsave xsave;
  NestedState nested; ///< None where KVM's guests have no guests.
  LocalApic apic;
  VcpuEvents events;
  DebugRegisters debug_registers;
  std::vector<MsrEntry> msrs;
  std::vector<MsrEntry> synthetic_msrs; ///< Hyper-V's that are KVM's; put back last.
};

/// Devices of cppvmm-boot's own (serial.hpp).
struct SavedDevices {
  std::vector<std::uint8_t> serial;
  std::uint8_t clock_index = 0;
};

/// The machine but for its memory.
struct SavedMachine {
  /// Those that a machine has to have again (memory_bytes, cpus, hypercalls and enlightenments), and the kernel's name.
  Options options;
  std::vector<SavedVcpu> vcpus;
  std::array<InterruptController, 3> chips;
  IntervalTimer timer;
  VmClock clock;
  HvState hyperv;
  SavedDevices devices;
};

/// Finishes a vCPU's last exit, which was handled; what is left of an access that comes in pieces goes to `handle`. An
/// error is one line.
[[nodiscard]] std::expected<void, std::string> finish_exit(Vcpu& vcpu, const std::function<bool(const Exit&)>& handle);

/// Takes a vCPU's state. `msrs`: Kvm::msr_indices.
[[nodiscard]] std::expected<SavedVcpu, std::string> save_vcpu(Vcpu& vcpu, std::span<const std::uint32_t> msrs,
                                                              bool has_nested_state, bool has_synthetic_msrs);
/// Puts it back into a vCPU that was prepared, and has not run; `restore_hyperv_msrs` comes after Hyperv::restore.
[[nodiscard]] std::expected<void, std::string> restore_vcpu(Vcpu& vcpu, const SavedVcpu& saved);
[[nodiscard]] std::expected<void, std::string> restore_hyperv_msrs(Vcpu& vcpu, const SavedVcpu& saved);

/// Takes what the VM has once, but for the clock: before its vCPUs' state is taken, so that an interrupt that comes in
/// between is delivered twice, and not lost. Puts it back, after theirs.
[[nodiscard]] std::expected<void, std::string> save_board(const Vm& vm, SavedMachine& machine);
[[nodiscard]] std::expected<void, std::string> restore_board(Vm& vm, const SavedMachine& machine);

/// Writes the machine and the pages that are not known to be zero, which a survey tells. No vCPU runs.
[[nodiscard]] std::expected<void, std::string> write_machine(const std::string& path, const SavedMachine& machine,
                                                             const GuestMemory& memory);
/// Reads it back. What is no such file, or ends too soon, is an error; what a whole one says of vCPUs and devices goes
/// to KVM as it is. `make_memory` is called once the options are known; the pages go to what it gives, which is all
/// zero.
[[nodiscard]] std::expected<SavedMachine, std::string>
read_machine(const std::string& path,
             const std::function<std::expected<const GuestMemory*, std::string>(const Options&)>& make_memory);

} // namespace cppvmm::boot
