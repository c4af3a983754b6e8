// What a kind of guest adds to the machine. Include it after all other headers: it imports modules.
#pragma once

#include "machine.hpp"
#include "report.hpp"
#include "saved_machine.hpp"
#include "tests/guests/zeroing/abi.hpp"

#include <boost/asio/io_context.hpp>
#include <cstdint>
#include <expected>
#include <string>
#include <vector>

import cppvmm.guest_memory;
import cppvmm.vcpu;
import cppvmm.vcpu_group;

namespace cppvmm::boot {

template <class T>
using Result = std::expected<T, Failure>;

[[nodiscard]] std::unexpected<Failure> failure(std::string text);

/// The exit's name and what it is about, for a line about it.
[[nodiscard]] std::string describe_exit(const Exit& exit);

/// A guest: what it starts with, which exits it has a use for, and what is known of it in the end. The machine calls
/// the members in this order, and all but `ram` and `lives_in` again for each boot, one at a time; on_exit on the
/// vCPUs' threads, between begin and end.
class Guest {
public:
  Guest() = default;
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
  virtual ~Guest() = default;

  /// RAM, ascending.
  [[nodiscard]] virtual const std::vector<zeroing::Pages>& ram() const = 0;
  /// Pages that leftovers are kept out of.
  [[nodiscard]] virtual zeroing::Pages lives_in() const { return {}; }
  /// Puts what the guest starts with into its memory, which is all zero but for leftovers and is there until `end`.
  /// Called for one boot more than Options::resets; of a machine that is restored, not at all.
  [[nodiscard]] virtual Result<void> load(const GuestMemory& memory) = 0;
  /// Puts the devices into the state that they have at power-on, and adds them to the VM, which has its memory and no
  /// vCPU yet. `vm` is there until `end`.
  [[nodiscard]] virtual Result<void> add_devices(Vm& vm) = 0;
  /// Whether these bring KVM's interrupt controller.
  [[nodiscard]] virtual bool has_interrupt_controller() const { return false; }
  /// What this vCPU's CPUID tells, but for Hyper-V's leaves.
  [[nodiscard]] virtual std::vector<CpuidEntry> cpuid(std::vector<CpuidEntry> supported, std::uint32_t /*id*/) const {
    return supported;
  }
  /// Gives a vCPU the registers that it starts with; not called of a machine that is restored.
  [[nodiscard]] virtual Result<void> set_registers(Vcpu& vcpu) = 0;
  /// What goes on beside the vCPUs. On the thread that runs `io`, as `end` is.
  virtual void begin(boost::asio::io_context& /*io*/) {}
  /// Handles an exit that does not concern Hyper-V; an error ends the run and is its failure.
  [[nodiscard]] virtual std::expected<VcpuAction, std::string> on_exit(Vcpu& vcpu, const Exit& exit) = 0;
  /// The vCPUs are about to end or have ended: nothing of begin may do anything any more. May be called again.
  virtual void end() {}
  /// Whether the vCPUs ended so that the machine can be saved (Options::save).
  [[nodiscard]] virtual bool is_to_be_saved() const { return false; }
  /// The devices, between add_devices and the end of the vCPUs; what is put back is what was taken.
  [[nodiscard]] virtual SavedDevices devices() const { return {}; }
  [[nodiscard]] virtual Result<void> restore_devices(const SavedDevices& /*devices*/) { return {}; }
  /// Adds what is known of the guest; an error when it did not come to its end, which Options::resets can start anew.
  [[nodiscard]] virtual Result<void> collect(const MemoryMap& map, RunFigures& figures) = 0;
};

} // namespace cppvmm::boot
