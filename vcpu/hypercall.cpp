module;
#include <cpuid.h>
#include <expected>
#include <linux/kvm.h>
module cppvmm.vcpu:hypercall.impl;
import :capabilities;
import :error;
import :hypercall;
import :ioctl;

namespace cppvmm {

KvmResult<HypercallTransport> choose_hypercall_transport(const Capabilities& capabilities) {
  if (capabilities.forwards_extended_hypercalls) return HypercallTransport::kernel;
  if (!capabilities.msr_filter) return failed(KvmErrc::unsupported, "KVM_CAP_X86_MSR_FILTER", KVM_CAP_X86_MSR_FILTER);
  if ((capabilities.user_space_msr_reasons & msr_reason_filter) == 0)
    return failed(KvmErrc::unsupported, "KVM_CAP_X86_USER_SPACE_MSR", KVM_CAP_X86_USER_SPACE_MSR);
  return capabilities.hyperv_cpuid ? HypercallTransport::split : HypercallTransport::user;
}

const char* to_string(HypercallTransport transport) {
  switch (transport) {
  case HypercallTransport::kernel:
    return "kernel";
  case HypercallTransport::split:
    return "split";
  case HypercallTransport::user:
    return "user";
  }
  return "";
}

HypercallInstruction hypercall_instruction() {
  constexpr unsigned amd = 0x6874'7541;   // "Auth"enticAMD
  constexpr unsigned hygon = 0x6F67'7948; // "Hygo"nGenuine
  unsigned highest = 0, ebx = 0, ecx = 0, edx = 0;
  __cpuid(0, highest, ebx, ecx, edx);
  return ebx == amd || ebx == hygon ? HypercallInstruction::vmmcall : HypercallInstruction::vmcall;
}

} // namespace cppvmm
