// What moves an arena's memory, one turn at a time. Include it after all other headers: moving.hpp imports
// cppvmm.guest_memory.
#pragma once

#include <cstdint>

#include "arena.hpp"

namespace cppvmm::oracle {

/// Whether the mover's turns are another process's, which is killed at the end: it may wait in the kernel for long.
[[nodiscard]] bool is_process(Mover mover);

/// One turn: how much was moved. `turn` counts from 0 on.
[[nodiscard]] std::uint64_t take_turn(Mover mover, const Arena& arena, std::uint64_t turn);

/// Whether this thread is having memory lost just now, and is told so by a SIGBUS.
[[nodiscard]] bool is_losing_memory();

/// Brings back what a killed one left: memory that is offline.
void restore_after(Mover mover);

} // namespace cppvmm::oracle
