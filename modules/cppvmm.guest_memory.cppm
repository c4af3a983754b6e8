/// cppvmm.guest_memory: what memory the guest has, who may read and write it, which of its pages may hold data.
export module cppvmm.guest_memory;
export import :address;
export import :error;
