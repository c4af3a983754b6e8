module;
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>
export module cppvmm.hv_ext:hyperv_interface;
import :extended_hypercalls;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

/// A CPUID leaf for the guest, subleaf 0.
export struct HvCpuidLeaf {
  std::uint32_t function = 0;
  std::uint32_t eax = 0;
  std::uint32_t ebx = 0;
  std::uint32_t ecx = 0;
  std::uint32_t edx = 0;
  friend bool operator==(const HvCpuidLeaf&, const HvCpuidLeaf&) = default;
};

/// Leaves 0x40000000 to 0x40000006: "Hv#1" with the hypercall and VP_INDEX MSRs, and extended hypercalls if offered
/// (TLFS "Hypervisor CPUID Leaves"). They replace whatever the vCPU had in 0x40000000..0x400000FF; the guest also
/// needs CPUID 1.ECX[31].
export [[nodiscard]] std::array<HvCpuidLeaf, 7> hv_cpuid_leaves(const HvOptions& options);

/// The Hyper-V interface for a VMM whose kernel has none: the partition's synthetic MSRs and the hypercall page. Safe
/// to use from any thread.
///
/// As in KVM, enabling the hypercall page writes its code into guest RAM, where it stays when the page is moved or
/// disabled. One that was moved from may only be assigned to or destroyed.
export class HypervInterface {
public:
  /// `memory` must outlive this object. `code` is what the hypercall page holds from its first byte on (the rest of
  /// the page is filled with int3); at most a page of it is used.
  HypervInterface(const GuestMemory& memory, std::span<const std::byte> code);
  ~HypervInterface();
  HypervInterface(HypervInterface&&) noexcept;
  HypervInterface& operator=(HypervInterface&&) noexcept;

  /// RDMSR by the vCPU with this VP index; nothing: inject #GP.
  [[nodiscard]] std::optional<std::uint64_t> read_msr(std::uint32_t vp_index, std::uint32_t msr) const;

  /// WRMSR; false: inject #GP, nothing changed. Per TLFS "Establishing the Hypercall Interface":
  /// - GUEST_OS_ID: any value; 0 disables the hypercall page.
  /// - HYPERCALL: ignored while GUEST_OS_ID is 0; bit 0 enables the page at bits 63:12, another write moves it; bit 1
  ///   locks the MSR: further writes are #GP until `reset`. A page that is not the guest's to write is #GP.
  /// - VP_INDEX is read-only, and every other MSR is #GP.
  [[nodiscard]] bool write_msr(std::uint32_t msr, std::uint64_t value);

  /// Where the hypercall page is, if enabled.
  [[nodiscard]] std::optional<PageNumber> hypercall_page() const;

  /// Whether the guest has said who it is: GUEST_OS_ID is not 0. Until then a hypercall is #UD, whatever code leads to
  /// it: a page that was enabled before a reset holds its code still. As in KVM, where a page that is only disabled
  /// goes on calling.
  [[nodiscard]] bool takes_hypercalls() const;

  /// Back to the state at power-on: both MSRs are 0, and no longer locked. Guest memory stays as it is. For a reset of
  /// the machine in place, once its vCPUs have stopped: an answer in progress would go to memory of the next boot's.
  void reset();

private:
  struct State;
  std::unique_ptr<State> state_;
};

} // namespace cppvmm
