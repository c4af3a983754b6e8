module cppvmm.guest_memory:backing.impl;
import :backing;

namespace cppvmm {

const char* to_string(Backing backing) { return traits_of(backing).name; }

} // namespace cppvmm
