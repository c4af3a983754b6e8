// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// Checks of a module, counted; what does not hold is told line by line, the first few.
#pragma once

#include "guest.h"

#include <linux/atomic.h>

// TLFS, "Hypercall Status Codes".
enum status {
  success = 0x0000,
  invalid_hypercall_code = 0x0002,
  invalid_hypercall_input = 0x0003,
  invalid_alignment = 0x0004,
  invalid_parameter = 0x0005,
  access_denied = 0x0006,
};

// TLFS, "Hypercall Inputs".
#define FAST BIT_ULL(16)
#define NESTED BIT_ULL(31)
#define RESERVED (GENMASK_ULL(30, 27) | GENMASK_ULL(47, 44) | GENMASK_ULL(63, 60))
#define REPS(count) ((u64)(count) << 32)

static atomic64_t checks, wrong;

static bool complain(void) { return atomic64_inc_return(&wrong) <= 12; }

// Says what is wrong where `holds` does not.
#define check(holds, what, format, ...)                                                                                \
  do {                                                                                                                 \
    atomic64_inc(&checks);                                                                                             \
    if (!(holds) && complain()) guest_result("\"wrong\": \"%s\", " format, what, ##__VA_ARGS__);                       \
  } while (0)
