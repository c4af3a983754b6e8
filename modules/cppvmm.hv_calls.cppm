/// cppvmm.hv_calls: Hyper-V's extended hypercalls: the wire format, the Hyper-V interface that a guest sees, the
/// answers. Needs nothing of KVM.
///
///     auto hypercalls = cppvmm::ExtendedHypercalls::create(memory);
///     // at a hypercall exit, with the registers that it uses, the mode and the CPL of the vCPU:
///     auto result = hypercalls->handle(cppvmm::hv_call(registers, long_mode, cpl));
///     if (result) cppvmm::set_hv_result(registers, long_mode, *result);
///     else if (result.error() == cppvmm::HvNoResult::undefined_opcode) inject_undefined_opcode();
///     else answer_myself();
export module cppvmm.hv_calls;
export import :boot_zeroed_memory;
export import :call;
export import :call_table;
export import :cpuid;
export import :error;
export import :extended_hypercalls;
export import :hyperv_interface;
export import :memory_heat_hint;
export import :overlay_page;
export import :query_capabilities;
export import :reference_time;
export import :state;
export import :tlfs;
export import :trace;
