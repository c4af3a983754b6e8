// The table by which a guest without ACPI learns of its processors and interrupts (Intel MultiProcessor Specification
// 1.4).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cppvmm::boot {

/// APIC IDs have 8 bits; the I/O APIC takes one, and 255 means all.
inline constexpr std::uint32_t mp_table_max_cpus = 254;

/// The floating pointer structure and the configuration table after it, for a machine with KVM's own interrupt
/// controllers as KVM routes to them at first: processors 0 to cpus - 1 (at most mp_table_max_cpus), an I/O APIC with
/// ISA interrupt n at its input n, and ExtINT and NMI at the local APICs' LINT0 and LINT1. To be loaded at `address`, a
/// multiple of 16 in 0xF0000..0xFFFFF.
[[nodiscard]] std::vector<std::byte> make_mp_table(std::uint64_t address, std::uint32_t cpus);

} // namespace cppvmm::boot
