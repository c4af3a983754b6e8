/// cppvmm.hv_ext: cppvmm.hv_calls for a VM of cppvmm.vcpu: how hypercalls arrive, the CPUID leaves, what
/// is saved and restored, KVM's dirty log.
///
///     auto hyperv = cppvmm::Hyperv::create(*vm, memory);
///     hyperv->prepare(*vcpu, *kvm->supported_cpuid());
///     for (;;) {
///       auto exit = vcpu->run();
///       if (!*hyperv->handle(*vcpu, *exit)) handle_myself(*exit);
///     }
///
/// Every call gives a KvmResult or HypervResult, which the example does not look at.
export module cppvmm.hv_ext;
export import :cpuid;
export import :dirty_log;
export import :error;
export import :hyperv;
export import :synthetic_msrs;
export import cppvmm.hv_calls;
