/// cppvmm.vcpu: KVM: the VM, its vCPUs, why a vCPU stopped, how threads of them start and stop.
export module cppvmm.vcpu;
export import :error;
