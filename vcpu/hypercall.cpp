module;
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
  return HypercallTransport::user;
}

} // namespace cppvmm
