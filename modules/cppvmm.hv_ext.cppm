/// cppvmm.hv_ext: Hyper-V's extended hypercalls: the wire format, the Hyper-V interface that a guest sees, the answers.
export module cppvmm.hv_ext;
export import :tlfs;
