// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// What the modules share: hypercalls through the guest's own hypercall page, the answers' layout, and results as lines
// for machines.
#pragma once

#include <asm/mshyperv.h>
#include <asm/nospec-branch.h>
#include <linux/printk.h>
#include <linux/types.h>

// HvExtCallQueryCapabilities: the output is one u64, of which bit 0 says that the other can be made.
#define CALL_QUERY_CAPABILITIES 0x8001
#define CALL_GET_BOOT_ZEROED_MEMORY 0x8002

#define ANSWER_RANGES 255

// The output of HvExtCallGetBootZeroedMemory.
struct answer {
  u64 count;
  struct {
    u64 first; // A page number: pages of 4 KiB.
    u64 count;
  } range[ANSWER_RANGES];
};

// Makes a hypercall with any control word and any guest-physical addresses; its result. U64_MAX, which is none, when
// Linux has set up no hypercall page.
static inline u64 guest_hypercall(u64 control, u64 input, u64 output) {
  register u64 r8 asm("r8") = output;
  u64 result = U64_MAX;

  if (!hv_hypercall_pg) return result;
  asm volatile(CALL_NOSPEC
               : "=a"(result), ASM_CALL_CONSTRAINT, "+c"(control), "+d"(input), "+r"(r8)
               : THUNK_TARGET(hv_hypercall_pg)
               : "cc", "memory", "r9", "r10", "r11");
  return result;
}

// One line for machines: "cppvmm: " and a JSON object, of at most 800 characters, with `fields` after the module's
// name. An error by its level, so that it is on the console of a kernel that was told to be quiet.
#define guest_result(fields, ...) pr_err("cppvmm: {\"module\": \"" KBUILD_MODNAME "\", " fields "}\n", ##__VA_ARGS__)
