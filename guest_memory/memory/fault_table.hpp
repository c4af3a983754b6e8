// Instructions that may fault where the memory they access has none to give, and where to go on then.
#pragma once

/// In an `asm goto`, after its instructions, which stand between the local labels 1 and 2: a fault of any of them goes
/// on at `label`, if a FaultGuard is installed (fault_guard.cpp); else it is the signal that it always was. No other
/// instruction belongs there than those that access guest memory, or copy from or to it, and what works on registers.
#define CPPVMM_ON_FAULT(label)                                                                                         \
  ".pushsection cppvmm_faults, \"aR\", @progbits\n"                                                                    \
  ".balign 4\n"                                                                                                        \
  ".long 1b - ., 2b - ., " label " - .\n"                                                                              \
  ".popsection\n"
