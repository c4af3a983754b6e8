module;
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <fcntl.h>
#include <linux/kvm.h>
#include <span>
#include <utility>
#include <vector>
module cppvmm.vcpu:kvm.impl;
import :capabilities;
import :convert;
import :cpuid;
import :error;
import :file_descriptor;
import :ioctl;
import :kvm;
import :vm;

namespace cppvmm {

Kvm::Kvm(FileDescriptor descriptor, const Capabilities& capabilities)
    : descriptor_(std::move(descriptor)), capabilities_(capabilities) {}

KvmResult<Kvm> Kvm::open(const char* path) {
  const int number = ::open(path, O_RDWR | O_CLOEXEC);
  if (number < 0) return os_failed("open of the KVM device");
  return adopt(FileDescriptor(number));
}

// Leaf 0x40000003, EBX, of KVM's Hyper-V face (TLFS "Hypervisor Feature Identification").
constexpr std::uint32_t hyperv_features_leaf = 0x4000'0003;
constexpr std::uint32_t hyperv_extended_hypercalls = 1U << 20;

static KvmResult<Capabilities> probe(int descriptor) {
  const auto version = kvm_ioctl(descriptor, KVM_GET_API_VERSION, std::uintptr_t{0}, "KVM_GET_API_VERSION");
  if (!version) return std::unexpected(version.error());
  if (*version != KVM_API_VERSION)
    return failed(KvmErrc::unsupported, "KVM_GET_API_VERSION", static_cast<std::uint64_t>(*version));
  const auto mmap_bytes = kvm_ioctl(descriptor, KVM_GET_VCPU_MMAP_SIZE, std::uintptr_t{0}, "KVM_GET_VCPU_MMAP_SIZE");
  if (!mmap_bytes) return std::unexpected(mmap_bytes.error());

  // KVM answers 0 for what it does not know; an error is no different.
  const auto extension = [&](std::uint32_t number) {
    const auto value =
        kvm_ioctl(descriptor, KVM_CHECK_EXTENSION, std::uintptr_t{number}, "KVM_CHECK_EXTENSION", number);
    return static_cast<unsigned>(std::max(value.value_or(0), 0));
  };
  Capabilities result;
  result.vcpu_mmap_bytes = static_cast<std::size_t>(*mmap_bytes);
  result.memory_slots = extension(KVM_CAP_NR_MEMSLOTS);
  result.recommended_vcpus = std::max(extension(KVM_CAP_NR_VCPUS), 1U);
  result.max_vcpus = std::max(extension(KVM_CAP_MAX_VCPUS), result.recommended_vcpus);
  result.user_memory = extension(KVM_CAP_USER_MEMORY) != 0;
  result.read_only_memory = extension(KVM_CAP_READONLY_MEM) != 0;
  result.manual_dirty_log = (extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0;
  result.immediate_exit = extension(KVM_CAP_IMMEDIATE_EXIT) != 0;
  result.interrupt_controller = extension(KVM_CAP_IRQCHIP) != 0;
  result.interval_timer = extension(KVM_CAP_PIT2) != 0;
  result.system_event_data = extension(KVM_CAP_SYSTEM_EVENT_DATA) != 0;
  result.sync_registers = extension(KVM_CAP_SYNC_REGS) & KVM_SYNC_X86_VALID_FIELDS;
  // Says 1, and has had these three from the start.
  if (extension(KVM_CAP_X86_USER_SPACE_MSR) != 0)
    result.user_space_msr_reasons = msr_reason_invalid | msr_reason_unknown | msr_reason_filter;
  result.msr_filter = extension(KVM_CAP_X86_MSR_FILTER) != 0;
  result.xsave_bytes = extension(KVM_CAP_XSAVE2);
  result.nested_state_bytes = extension(KVM_CAP_NESTED_STATE);
  result.hyperv = extension(KVM_CAP_HYPERV) != 0;
  result.hyperv_cpuid = extension(KVM_CAP_HYPERV_CPUID) != 0;
  result.system_hyperv_cpuid = extension(KVM_CAP_SYS_HYPERV_CPUID) != 0;
  result.hyperv_enforce_cpuid = extension(KVM_CAP_HYPERV_ENFORCE_CPUID) != 0;
  result.hyperv_synic = extension(KVM_CAP_HYPERV_SYNIC2) != 0;
  // Every kernel that forwards them (6.3) can be asked without a vCPU (5.11).
  if (result.system_hyperv_cpuid) {
    const auto entries = get_cpuid(descriptor, get_supported_hv_cpuid_request, "KVM_GET_SUPPORTED_HV_CPUID");
    if (!entries) return std::unexpected(entries.error());
    const CpuidEntry* const features = find_cpuid(*entries, hyperv_features_leaf);
    result.forwards_extended_hypercalls = features != nullptr && (features->ebx & hyperv_extended_hypercalls) != 0;
  }
  return result;
}

KvmResult<Kvm> Kvm::adopt(FileDescriptor descriptor) {
  const auto capabilities = probe(descriptor.number());
  if (!capabilities) return std::unexpected(capabilities.error());
  return Kvm(std::move(descriptor), *capabilities);
}

KvmResult<int> Kvm::check_extension(std::uint32_t number) const {
  return kvm_ioctl(descriptor(), KVM_CHECK_EXTENSION, std::uintptr_t{number}, "KVM_CHECK_EXTENSION", number);
}

KvmResult<std::vector<CpuidEntry>> Kvm::supported_cpuid() const {
  return get_cpuid(descriptor(), get_supported_cpuid_request, "KVM_GET_SUPPORTED_CPUID");
}

KvmResult<std::vector<std::uint32_t>> Kvm::msr_indices() const {
  // How many there are, KVM says by refusing.
  std::vector<std::uint32_t> table(1);
  for (int attempt = 0; attempt < 3; ++attempt) {
    table[0] = static_cast<std::uint32_t>(table.size() - 1);
    const auto got =
        kvm_set(descriptor(), get_msr_index_list_request, table.data(), "KVM_GET_MSR_INDEX_LIST", table[0]);
    if (got) {
      table.resize(1 + table[0]);
      table.erase(table.begin());
      return table;
    }
    if (got.error().os_error != E2BIG) return std::unexpected(got.error());
    table.resize(1 + table[0]);
  }
  return failed(KvmErrc::unsupported, "KVM_GET_MSR_INDEX_LIST", table[0]);
}

KvmResult<std::vector<CpuidEntry>> Kvm::supported_hv_cpuid() const {
  if (capabilities_.system_hyperv_cpuid)
    return get_cpuid(descriptor(), get_supported_hv_cpuid_request, "KVM_GET_SUPPORTED_HV_CPUID");
  if (!capabilities_.hyperv_cpuid) return failed(KvmErrc::unsupported, "KVM_CAP_HYPERV_CPUID", KVM_CAP_HYPERV_CPUID);
  auto vm = create_vm();
  if (!vm) return std::unexpected(vm.error());
  const auto vcpu = vm->create_vcpu(0);
  if (!vcpu) return std::unexpected(vcpu.error());
  return vcpu->supported_hv_cpuid();
}

KvmResult<Vm> Kvm::create_vm(std::uint64_t type) const {
  const auto created = kvm_ioctl(descriptor(), KVM_CREATE_VM, std::uintptr_t{type}, "KVM_CREATE_VM", type);
  if (!created) return std::unexpected(created.error());
  return Vm::adopt(FileDescriptor(*created), capabilities_);
}

} // namespace cppvmm
