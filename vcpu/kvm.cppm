module;
#include <cstdint>
#include <vector>
export module cppvmm.vcpu:kvm;
import :capabilities;
import :cpuid;
import :error;
import :file_descriptor;
import :vm;

namespace cppvmm {

/// /dev/kvm. Owns its descriptor; may be used by several threads at once.
export class Kvm {
public:
  /// Opens KVM and probes it. An `os` error when the device cannot be opened (ENOENT, EACCES) or is something else
  /// (ENOTTY); unsupported when its API version is not 12.
  [[nodiscard]] static KvmResult<Kvm> open(const char* path = "/dev/kvm");
  /// The same for an open descriptor, which it takes over.
  [[nodiscard]] static KvmResult<Kvm> adopt(FileDescriptor descriptor);

  [[nodiscard]] int descriptor() const { return descriptor_.number(); }
  /// What this KVM offers.
  [[nodiscard]] const Capabilities& capabilities() const { return capabilities_; }
  /// KVM_CHECK_EXTENSION: 0 when KVM lacks it, else what KVM says (api.rst tells what it means).
  [[nodiscard]] KvmResult<int> check_extension(std::uint32_t number) const;

  /// The CPUID leaves that this host and KVM can give a guest.
  [[nodiscard]] KvmResult<std::vector<CpuidEntry>> supported_cpuid() const;
  /// The leaves of KVM's own Hyper-V face; unsupported where it has none. Before Linux 5.11 this makes a VM to ask it.
  [[nodiscard]] KvmResult<std::vector<CpuidEntry>> supported_hv_cpuid() const;

  /// The MSRs that a VM's saved state has (KVM_GET_MSR_INDEX_LIST), for Vcpu::msrs. Which of them a vCPU has depends on
  /// its CPUID.
  [[nodiscard]] KvmResult<std::vector<std::uint32_t>> msr_indices() const;

  /// `type`: 0 for an ordinary VM.
  [[nodiscard]] KvmResult<Vm> create_vm(std::uint64_t type = 0) const;

private:
  Kvm(FileDescriptor descriptor, const Capabilities& capabilities);

  FileDescriptor descriptor_;
  Capabilities capabilities_;
};

} // namespace cppvmm
