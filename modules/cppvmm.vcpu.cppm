/// cppvmm.vcpu: KVM: the VM, its vCPUs, why a vCPU stopped, how it is answered and how it is stopped.
///
///     auto kvm = cppvmm::Kvm::open();
///     auto vm = kvm->create_vm();
///     vm->set_memory_slot({.slot = 0, .guest_address = 0, .bytes = bytes, .host_address = memory});
///     auto vcpu = vm->create_vcpu(0);
///     vcpu->set_cpuid(*kvm->supported_cpuid());
///     for (;;) {
///       auto exit = vcpu->run();
///       if (const auto* out = std::get_if<cppvmm::IoOut>(&*exit)) write_port(out->port, out->data);
///       else if (std::holds_alternative<cppvmm::Hlt>(*exit)) break;
///     }
///
/// Every call gives a KvmResult, which the example does not look at.
export module cppvmm.vcpu;
export import :capabilities;
export import :cpuid;
export import :error;
export import :exit;
export import :file_descriptor;
export import :hypercall;
export import :kvm;
export import :registers;
export import :state;
export import :stop;
export import :vcpu;
export import :vm;
