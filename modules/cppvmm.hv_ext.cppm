/// cppvmm.hv_ext: Hyper-V's extended hypercalls: the wire format, the Hyper-V interface that a guest sees, the answers.
///
///     auto hypercalls = cppvmm::ExtendedHypercalls::create(memory);
///     // at a hypercall exit, with RCX, RDX, R8 and the CPL of the vCPU:
///     auto result = hypercalls->handle(rcx, cppvmm::GuestAddress(rdx), cppvmm::GuestAddress(r8), cpl);
///     if (result) set_rax(*result); else inject_undefined_opcode();
export module cppvmm.hv_ext;
export import :boot_zeroed_memory;
export import :dirty_log;
export import :error;
export import :extended_hypercalls;
export import :hyperv;
export import :hyperv_interface;
export import :tlfs;
