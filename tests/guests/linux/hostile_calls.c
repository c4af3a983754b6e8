// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// Throws at the hypervisor what a broken or hostile kernel would, and checks what comes back. By `mode`:
//
//   table     each bad control word and output address, and the good ones beside them: their exact result, and that
//             nothing is written where a call is refused
//   reuse     output pages in all the states they can be in: no answer names a page that holds data, or its own
//   together  all CPUs call at the same moment, `rounds` times
//   loop      CPU 0 calls, good and bad, for `seconds`, while CPU 1 counts its own steps
//
// What is wrong is told line by line (the first few), and last comes a line with "done": how many checks there were,
// how many failed, and how many calls must have arrived at the VMM, by what it counts.
#include "checks.h"
#include "guest.h"

#include <asm/msr.h>
#include <linux/atomic.h>
#include <linux/completion.h>
#include <linux/cpu.h>
#include <linux/err.h>
#include <linux/gfp.h>
#include <linux/kthread.h>
#include <linux/mc146818rtc.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/stop_machine.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

static char* mode = "table";
module_param(mode, charp, 0444);
MODULE_PARM_DESC(mode, "table, reuse, together or loop");
static char* way = "user";
module_param(way, charp, 0444);
MODULE_PARM_DESC(way,
                 "Who takes the calls: kernel (KVM, which forwards some), split (KVM, but for extended ones) or user");
static unsigned int rounds = 100;
module_param(rounds, uint, 0444);
MODULE_PARM_DESC(rounds, "of calls that all CPUs make together");
static unsigned int seconds = 60;
module_param(seconds, uint, 0444);
MODULE_PARM_DESC(seconds, "that the loop takes");

// ---- counts

static atomic64_t arrived_query, arrived_boot_zeroed, arrived_other, made;

// Whether KVM answers the calls that are not extended ones.
static bool kvm_answers(void) { return strcmp(way, "user") != 0; }

// Whether user space sees the call: the extended ones (0x8001 to 0x8041), of which KVM forwards those alone that have
// no reserved bit set and are not fast; and the others where KVM answers none (Linux arch/x86/kvm/hyperv.c,
// kvm_hv_hypercall).
static bool arrives(u64 control) {
  const u16 code = control;

  if (!kvm_answers()) return true;
  if (code < 0x8001 || code > 0x8041) return false;
  return strcmp(way, "split") == 0 || !(control & (RESERVED | NESTED | FAST));
}

static u64 call_with_input(u64 control, u64 input, u64 output) {
  const u16 code = control;

  atomic64_inc(&made);
  if (arrives(control))
    atomic64_inc(code == CALL_QUERY_CAPABILITIES       ? &arrived_query
                 : code == CALL_GET_BOOT_ZEROED_MEMORY ? &arrived_boot_zeroed
                                                       : &arrived_other);
  return guest_hypercall(control, input, output);
}

// Neither call has input: what is in its register is no matter.
static u64 call(u64 control, u64 output) { return call_with_input(control, U64_MAX, output); }

// ---- answers

static bool names(const struct answer* answer, u64 page) {
  u64 i;

  for (i = 0; i < min_t(u64, answer->count, ANSWER_RANGES); i++)
    if (page >= answer->range[i].first && page - answer->range[i].first < answer->range[i].count) return true;
  return false;
}

static u64 page_of(const void* at) { return __pa(at) >> PAGE_SHIFT; }

// RAM in ranges that are not empty, the largest first, none twice, and zeros behind them.
static bool is_well_formed(const struct answer* answer) {
  u64 i, j, pages = 0;

  if (answer->count > ANSWER_RANGES) return false;
  for (i = 0; i < answer->count; i++) {
    const u64 first = answer->range[i].first, count = answer->range[i].count;

    if (count == 0 || first >= node_end_pfn(0) || count > node_end_pfn(0) - first) return false;
    if (i > 0 && count > answer->range[i - 1].count) return false;
    for (j = 0; j < i; j++)
      if (first < answer->range[j].first + answer->range[j].count && answer->range[j].first < first + count)
        return false;
    pages += count;
  }
  return pages <= node_end_pfn(0) && !memchr_inv(&answer->range[i], 0, (ANSWER_RANGES - i) * sizeof(answer->range[0]));
}

// ---- the table

#define CANARY 0xA5
#define SURROUNDINGS 4 // pages, of which the outputs are in the second
static u8* surroundings;

static void expect_refused(const char* what, u64 control, u64 output, u64 status) {
  const u64 result = call(control, output);

  // All 64 bits: no repetition was completed, and what is reserved is zero.
  check(result == status, what, "\"control\": \"%llx\", \"output\": \"%llx\", \"result\": \"%llx\", \"expected\": %llu",
        control, output, result, status);
  check(!memchr_inv(surroundings, CANARY, SURROUNDINGS * PAGE_SIZE), what,
        "\"control\": \"%llx\", \"output\": \"%llx\", \"written\": true", control, output);
  memset(surroundings, CANARY, SURROUNDINGS * PAGE_SIZE);
}

// A good call: the result, and that exactly `bytes` at `output` were written.
static void expect_taken(const char* what, u64 control, u64 input, u8* output, size_t bytes) {
  const u64 result = call_with_input(control, input, __pa(output));
  u8* const end = surroundings + SURROUNDINGS * PAGE_SIZE;

  check(result == success, what, "\"control\": \"%llx\", \"output\": \"%llx\", \"result\": \"%llx\"", control,
        (u64)__pa(output), result);
  check(!memchr_inv(surroundings, CANARY, output - surroundings) &&
            !memchr_inv(output + bytes, CANARY, end - output - bytes),
        what, "\"output\": \"%llx\", \"written\": \"beyond its bytes\"", (u64)__pa(output));
  if ((u16)control == CALL_QUERY_CAPABILITIES)
    check(*(u64*)output == 1, what, "\"capabilities\": %llu", *(u64*)output);
  else
    check(is_well_formed((struct answer*)output) && ((struct answer*)output)->count > 0 &&
              !names((struct answer*)output, page_of(surroundings)) && !names((struct answer*)output, page_of(output)),
          what, "\"output\": \"%llx\", \"ranges\": %llu", (u64)__pa(output), ((struct answer*)output)->count);
  memset(output, CANARY, bytes);
}

// Fields of the control word that these calls have no use for.
static const struct {
  const char* what;
  u8 first, last; // bits
  enum status status;
} fields[] = {
    {"fast", 16, 16, invalid_parameter},
    {"variable header", 17, 26, invalid_hypercall_input},
    {"reserved 30:27", 27, 30, invalid_hypercall_input},
    {"nested", 31, 31, invalid_hypercall_input},
    {"rep count", 32, 43, invalid_hypercall_input},
    {"reserved 47:44", 44, 47, invalid_hypercall_input},
    {"rep start", 48, 59, invalid_hypercall_input},
    {"reserved 63:60", 60, 63, invalid_hypercall_input},
};

// Each bit of each field, and all of them; for both calls.
static void try_fields(u64 output) {
  static const u16 codes[] = {CALL_QUERY_CAPABILITIES, CALL_GET_BOOT_ZEROED_MEMORY};
  size_t i, c;
  u8 bit;

  for (i = 0; i < ARRAY_SIZE(fields); i++) {
    for (c = 0; c < ARRAY_SIZE(codes); c++) {
      for (bit = fields[i].first; bit <= fields[i].last; bit++)
        expect_refused(fields[i].what, codes[c] | BIT_ULL(bit), output, fields[i].status);
      expect_refused(fields[i].what, codes[c] | GENMASK_ULL(fields[i].last, fields[i].first), output, fields[i].status);
    }
  }
}

// * Other control words. Where KVM takes the calls it answers those itself that it knows, and not with the code's being
// unknown: it enforces the features that CPUID names (KVM_CAP_HYPERV_ENFORCE_CPUID), and none of theirs is named. That
// comes before all else; but for the debugger's calls, which are looked at first.
static const struct {
  const char* what;
  u64 control;
  enum status status;
  enum status of_kvm; // where KVM takes the calls
} words[] = {
    {"code 0", 0x0000, invalid_hypercall_code, invalid_hypercall_code},
    {"SwitchVirtualAddressSpace", 0x0001, invalid_hypercall_code, invalid_hypercall_code},
    {"FlushVirtualAddressSpace", 0x0002, invalid_hypercall_code, access_denied},
    {"FlushVirtualAddressList", 0x0003 | REPS(1), invalid_hypercall_code, access_denied},
    {"NotifyLongSpinWait, which is fast", 0x0008 | FAST, invalid_hypercall_code, access_denied},
    {"SendSyntheticClusterIpi", 0x000B, invalid_hypercall_code, access_denied},
    {"FlushVirtualAddressSpaceEx", 0x0013, invalid_hypercall_code, access_denied},
    {"FlushVirtualAddressListEx", 0x0014 | REPS(1), invalid_hypercall_code, access_denied},
    {"SendSyntheticClusterIpiEx", 0x0015, invalid_hypercall_code, access_denied},
    {"GetPartitionId", 0x0046, invalid_hypercall_code, invalid_hypercall_code},
    {"GetVpRegisters, a rep call", 0x0050 | REPS(1), invalid_hypercall_code, invalid_hypercall_code},
    {"PostMessage", 0x005C, invalid_hypercall_code, access_denied},
    {"SignalEvent, which is fast", 0x005D | FAST, invalid_hypercall_code, access_denied},
    {"PostDebugData", 0x0069, invalid_hypercall_code, invalid_hypercall_code},
    {"PostDebugData, fast", 0x0069 | FAST, invalid_hypercall_code, invalid_parameter},
    {"RetrieveDebugData", 0x006A, invalid_hypercall_code, invalid_hypercall_code},
    {"ResetDebugSession", 0x006B, invalid_hypercall_code, invalid_hypercall_code},
    {"PostMessage, reserved bit", 0x005C | BIT_ULL(27), invalid_hypercall_input, access_denied},
    {"code 0, reserved bit", BIT_ULL(63), invalid_hypercall_input, invalid_hypercall_input},
    {"code 0, nested", NESTED, invalid_hypercall_input, invalid_hypercall_input},
    {"code 0x7FFF", 0x7FFF, invalid_hypercall_code, invalid_hypercall_code},
    {"code 0x8000", 0x8000, invalid_hypercall_code, invalid_hypercall_code},
    {"code 0x8000, fast", 0x8000 | FAST, invalid_hypercall_code, invalid_hypercall_code},
    {"MemoryHeatHint", 0x8003 | REPS(1), invalid_hypercall_code, invalid_hypercall_code},
    {"MemoryHeatHint, most reps", 0x8003 | REPS(511), invalid_hypercall_code, invalid_hypercall_code},
    {"MemoryHeatHint, too many reps", 0x8003 | REPS(4095), invalid_hypercall_code, invalid_hypercall_code},
    {"MemoryHeatHint, no rep", 0x8003, invalid_hypercall_code, invalid_hypercall_code},
    {"MemoryHeatHint, continued", 0x8003 | REPS(5) | BIT_ULL(48), invalid_hypercall_code, invalid_hypercall_code},
    {"MemoryHeatHint, fast", 0x8003 | REPS(1) | FAST, invalid_parameter, invalid_parameter},
    {"MemoryHeatHint, nested", 0x8003 | REPS(1) | NESTED, invalid_hypercall_input, invalid_hypercall_input},
    {"EpfSetup", 0x8004, invalid_hypercall_code, invalid_hypercall_code},
    {"SchedulerAssistSetup", 0x8005, invalid_hypercall_code, invalid_hypercall_code},
    {"MemoryHeatHintAsync", 0x8006 | REPS(1), invalid_hypercall_code, invalid_hypercall_code},
    {"code 0x8007", 0x8007, invalid_hypercall_code, invalid_hypercall_code},
    {"last extended code", 0x8041, invalid_hypercall_code, invalid_hypercall_code},
    {"last extended code, fast", 0x8041 | FAST, invalid_parameter, invalid_parameter},
    {"beyond the extended codes", 0x8042, invalid_hypercall_code, invalid_hypercall_code},
    {"beyond the extended codes, fast", 0x8042 | FAST, invalid_hypercall_code, invalid_hypercall_code},
    {"code 0xFFFF", 0xFFFF, invalid_hypercall_code, invalid_hypercall_code},
    {"all ones", U64_MAX, invalid_hypercall_input, invalid_hypercall_input},
    {"query, fast and nested", CALL_QUERY_CAPABILITIES | FAST | NESTED, invalid_hypercall_input,
     invalid_hypercall_input},
    {"boot zeroed, fast with reps", CALL_GET_BOOT_ZEROED_MEMORY | FAST | REPS(1), invalid_parameter, invalid_parameter},
};

static void try_words(u64 output) {
  size_t i;

  for (i = 0; i < ARRAY_SIZE(words); i++)
    expect_refused(words[i].what, words[i].control, output, kvm_answers() ? words[i].of_kvm : words[i].status);
}

// Output addresses without memory to write to.
static const struct {
  const char* what;
  u64 output;
  enum status query, boot_zeroed;
} addresses[] = {
    {"hole below 4 GiB", 0xC0000000, invalid_parameter, invalid_parameter},
    {"hole below 4 GiB, inside a page", 0xE0000008, invalid_parameter, invalid_parameter},
    {"I/O APIC", 0xFEC00000, invalid_parameter, invalid_parameter},
    {"local APIC", 0xFEE00000, invalid_parameter, invalid_parameter},
    {"local APIC, a register", 0xFEE00300, invalid_parameter, invalid_alignment},
    {"KVM's own page tables", 0xFEFFC000, invalid_parameter, invalid_parameter},
    {"last page below 4 GiB", 0xFFFFF000, invalid_parameter, invalid_parameter},
    {"last 8 bytes below 4 GiB", 0xFFFFFFF8, invalid_parameter, invalid_alignment},
    {"1 TiB", BIT_ULL(40), invalid_parameter, invalid_parameter},
    {"bit 51", BIT_ULL(51), invalid_parameter, invalid_parameter},
    {"last page of the space", BIT_ULL(52) - PAGE_SIZE, invalid_parameter, invalid_parameter},
    {"last 8 bytes of the space", BIT_ULL(52) - 8, invalid_parameter, invalid_alignment},
    {"last byte of the space", BIT_ULL(52) - 1, invalid_alignment, invalid_alignment},
    {"end of the space", BIT_ULL(52), invalid_alignment, invalid_alignment},
    {"bit 63", BIT_ULL(63), invalid_alignment, invalid_alignment},
    {"last page of all", ~(PAGE_SIZE - 1ULL), invalid_alignment, invalid_alignment},
    {"last 8 bytes of all", ~7ULL, invalid_alignment, invalid_alignment},
    {"all ones", U64_MAX, invalid_alignment, invalid_alignment},
};

static void try_addresses(u64 output) {
  static const u16 unaligned[] = {1, 2, 4, 7, 9, 0x7FC, 0xFF9, 0xFFC, 0xFFF};
  const u64 ram_end = (u64)node_end_pfn(0) << PAGE_SHIFT;
  u64 offset;
  size_t i;

  for (i = 0; i < ARRAY_SIZE(addresses); i++) {
    expect_refused(addresses[i].what, CALL_QUERY_CAPABILITIES, addresses[i].output, addresses[i].query);
    expect_refused(addresses[i].what, CALL_GET_BOOT_ZEROED_MEMORY, addresses[i].output, addresses[i].boot_zeroed);
  }
  expect_refused("beyond RAM", CALL_QUERY_CAPABILITIES, ram_end, invalid_parameter);
  expect_refused("beyond RAM", CALL_GET_BOOT_ZEROED_MEMORY, ram_end, invalid_parameter);
  for (i = 0; i < ARRAY_SIZE(unaligned); i++) {
    expect_refused("unaligned", CALL_QUERY_CAPABILITIES, output + unaligned[i], invalid_alignment);
    expect_refused("unaligned", CALL_GET_BOOT_ZEROED_MEMORY, output + unaligned[i], invalid_alignment);
  }
  for (offset = 16; offset <= PAGE_SIZE - 8; offset += 8)
    expect_refused("over the page's end", CALL_GET_BOOT_ZEROED_MEMORY, output + offset, invalid_alignment);
  // The control word comes first.
  expect_refused("bad word and address", CALL_GET_BOOT_ZEROED_MEMORY | REPS(1), U64_MAX, invalid_hypercall_input);
  expect_refused("bad code and address", 0x8004, U64_MAX, invalid_hypercall_code);
}

// The guest may not write to the hypercall page (TLFS "Establishing the Hypercall Interface"), nor have it written.
static void try_hypercall_page(void) {
  static u8 before[PAGE_SIZE];
  const u64 page = vmalloc_to_pfn(hv_hypercall_pg);

  memcpy(before, hv_hypercall_pg, PAGE_SIZE);
  expect_refused("hypercall page", CALL_GET_BOOT_ZEROED_MEMORY, page << PAGE_SHIFT, invalid_parameter);
  expect_refused("hypercall page", CALL_GET_BOOT_ZEROED_MEMORY, page << PAGE_SHIFT | 8, invalid_parameter);
  expect_refused("end of the hypercall page", CALL_QUERY_CAPABILITIES, page << PAGE_SHIFT | 0xFF8, invalid_parameter);
  check(!memcmp(before, hv_hypercall_pg, PAGE_SIZE), "hypercall page", "\"written\": true");
}

// Page 0 is memory as any other. Linux has its use of it behind it.
static void try_page_zero(void) {
  static u8 before[PAGE_SIZE];
  const struct answer* const answer = __va(0);
  u64 result;

  memcpy(before, __va(0), PAGE_SIZE);
  result = call(CALL_QUERY_CAPABILITIES, 0);
  check(result == success && *(u64*)__va(0) == 1, "query into page 0", "\"result\": \"%llx\"", result);
  result = call(CALL_GET_BOOT_ZEROED_MEMORY, 0);
  check(result == success && is_well_formed(answer) && answer->count > 0 && !names(answer, 0), "answer into page 0",
        "\"result\": \"%llx\", \"ranges\": %llu", result, answer->count);
  memcpy(__va(0), before, PAGE_SIZE);
}

static void try_good_ones(u8* output) {
  static const u64 inputs[] = {0, 1, 0xFF9, 0xC0000000, BIT_ULL(52), U64_MAX};
  u64 offset;
  size_t i;

  for (offset = 0; offset < PAGE_SIZE; offset += 8)
    expect_taken("query at an offset", CALL_QUERY_CAPABILITIES, U64_MAX, output + offset, 8);
  expect_taken("answer at offset 0", CALL_GET_BOOT_ZEROED_MEMORY, U64_MAX, output, sizeof(struct answer));
  expect_taken("answer at offset 8", CALL_GET_BOOT_ZEROED_MEMORY, U64_MAX, output + 8, sizeof(struct answer));
  for (i = 0; i < ARRAY_SIZE(inputs); i++) {
    expect_taken("query, any input", CALL_QUERY_CAPABILITIES, inputs[i], output, 8);
    expect_taken("answer, any input", CALL_GET_BOOT_ZEROED_MEMORY, inputs[i], output, sizeof(struct answer));
  }
}

static int try_table(void) {
  u8* output;

  surroundings = (u8*)__get_free_pages(GFP_KERNEL, get_order(SURROUNDINGS * PAGE_SIZE));
  if (!surroundings) return -ENOMEM;
  memset(surroundings, CANARY, SURROUNDINGS * PAGE_SIZE);
  output = surroundings + PAGE_SIZE;
  try_fields(__pa(output));
  try_words(__pa(output));
  try_addresses(__pa(output));
  try_hypercall_page();
  try_page_zero();
  try_good_ones(output);
  free_pages((unsigned long)surroundings, get_order(SURROUNDINGS * PAGE_SIZE));
  return 0;
}

// ---- output pages

#define PATTERN 0x5A
#define FRESH_ORDER 9 // 2 MiB
#define FRESH_BLOCKS 16
static struct answer *first, *second;
static struct page* fresh[FRESH_BLOCKS];
static u64 fresh_found;

// An answer into `output`, which does not name itself nor `holds_data`.
static void ask(const char* what, struct answer* output, const void* holds_data) {
  const u64 result = call(CALL_GET_BOOT_ZEROED_MEMORY, __pa(output));

  check(result == success && is_well_formed(output) && output->count > 0, what,
        "\"result\": \"%llx\", \"ranges\": %llu", result, output->count);
  check(!names(output, page_of(output)), what, "\"named\": \"its own page\", \"page\": %llu", page_of(output));
  if (holds_data)
    check(!names(output, page_of(holds_data)), what, "\"named\": \"a page with data\", \"page\": %llu",
          page_of(holds_data));
}

// A page that was allocated and not written to, that `second` calls zeroed, and that is not `other`; or null.
static void* fresh_page(const void* other) {
  size_t block, i;

  for (block = 0; block < FRESH_BLOCKS && fresh[block]; block++) {
    u8* const start = page_address(fresh[block]);

    for (i = 0; i < 1UL << FRESH_ORDER; i++)
      if (start + i * PAGE_SIZE != other && names(second, page_of(start + i * PAGE_SIZE))) return start + i * PAGE_SIZE;
  }
  return NULL;
}

// With the other CPUs halted, so that only what is done here is done.
static int reuse_pages(void* unused) {
  struct answer* page;
  u64* capabilities;

  ask("an answer", first, NULL);
  ask("beside an answer", second, first);
  memset(first, PATTERN, PAGE_SIZE);
  ask("beside an answer's page filled with other data", second, first);
  ask("into that page", first, second);
  ask("beside the second answer into one page", second, first);
  // It reads zero, which a look at content takes for zeroed; but not before it is written to.
  memset(first, 0, PAGE_SIZE);
  ask("into a page full of zeros", first, second);
  ask("beside the page that was full of zeros", second, first);
  memset(first, 0, PAGE_SIZE);
  ((u8*)first)[PAGE_SIZE - 1] = 1;
  ask("beside a page with data in its last byte only", second, first);

  page = fresh_page(NULL);
  if (page) {
    fresh_found++;
    ask("into a page that was named as zeroed", page, second);
    ask("beside the page that was named as zeroed", second, page);
    memset(page, PATTERN, PAGE_SIZE);
    ask("beside that page filled with other data", second, page);
  }
  capabilities = fresh_page(NULL);
  if (capabilities) {
    u64 result;

    fresh_found++;
    result = call(CALL_QUERY_CAPABILITIES, __pa(capabilities));
    check(result == success && *capabilities == 1, "query into a page that was named as zeroed",
          "\"result\": \"%llx\", \"capabilities\": %llu", result, *capabilities);
    ask("beside that query's page", second, capabilities);
  }
  page = fresh_page(capabilities);
  if (page) {
    fresh_found++;
    // A refused call writes nothing, and so changes nothing about the page.
    expect_refused("refused at a fresh page", CALL_GET_BOOT_ZEROED_MEMORY | NESTED, __pa(page),
                   invalid_hypercall_input);
    ask("beside a refused call's page", second, NULL);
    check(names(second, page_of(page)), "a refused call's page", "\"touched\": true");
  }

  // The page is the allocator's, and the answer is still in it.
  ask("into the page to be freed", first, NULL);
  free_page((unsigned long)first);
  ask("beside a freed page", second, first);
  check(first->count != 0, "a freed page", "\"kept\": false");
  first = NULL;
  return 0;
}

static int reuse(void) {
  size_t block;
  int error = -ENOMEM;

  surroundings = (u8*)__get_free_pages(GFP_KERNEL, get_order(SURROUNDINGS * PAGE_SIZE));
  first = (struct answer*)get_zeroed_page(GFP_KERNEL);
  second = (struct answer*)get_zeroed_page(GFP_KERNEL);
  if (!surroundings || !first || !second) goto out;
  memset(surroundings, CANARY, SURROUNDINGS * PAGE_SIZE);
  for (block = 0; block < FRESH_BLOCKS; block++)
    fresh[block] = alloc_pages(GFP_KERNEL | __GFP_NOWARN | __GFP_NORETRY, FRESH_ORDER);
  error = stop_machine(reuse_pages, NULL, NULL);
  for (block = 0; block < FRESH_BLOCKS; block++)
    if (fresh[block]) __free_pages(fresh[block], FRESH_ORDER);
out:
  free_pages((unsigned long)surroundings, get_order(SURROUNDINGS * PAGE_SIZE));
  free_page((unsigned long)first);
  free_page((unsigned long)second);
  return error;
}

// ---- all CPUs

#define MOST_CPUS 8

static struct worker {
  struct answer* output;
  u8* data; // full of the pattern, all the time
  struct task_struct* thread;
  struct completion done;
} workers[MOST_CPUS];
static unsigned int cpus;
static struct answer* shared;
static atomic_t present, meetings;

// Lets nobody go on before all CPUs are here.
static void meet(void) {
  const int meeting = atomic_read(&meetings);

  if (atomic_inc_return(&present) == cpus) {
    atomic_set(&present, 0);
    smp_mb();
    atomic_inc(&meetings);
    return;
  }
  while (atomic_read(&meetings) == meeting) {
    cpu_relax();
    cond_resched();
  }
  smp_mb();
}

static void check_answer(const char* what, const struct answer* answer, u64 result, unsigned int cpu) {
  unsigned int i;

  check(result == success && is_well_formed(answer) && answer->count > 0, what,
        "\"cpu\": %u, \"result\": \"%llx\", \"ranges\": %llu", cpu, result, answer->count);
  check(!names(answer, page_of(answer)), what, "\"cpu\": %u, \"named\": \"its own page\"", cpu);
  for (i = 0; i < cpus; i++)
    check(!names(answer, page_of(workers[i].data)), what, "\"cpu\": %u, \"named\": \"the data of CPU %u\"", cpu, i);
}

static void query_together(const char* what, u8* output, unsigned int cpu) {
  const u64 result = call(CALL_QUERY_CAPABILITIES, __pa(output));

  check(result == success && *(u64*)output == 1, what, "\"cpu\": %u, \"result\": \"%llx\", \"capabilities\": %llu", cpu,
        result, *(u64*)output);
}

#define ROUNDS_A_MEETING 4

// Behind an answer in its page there are 8 bytes left, for a query's.
static int call_together(void* which) {
  struct worker* const self = which;
  const unsigned int cpu = self - workers;
  unsigned int round;
  u64 result;

  for (round = 0; round < rounds; round++) {
    if (round % ROUNDS_A_MEETING == 0) meet();
    // Half of them begin with the one call, half with the other.
    if ((round + cpu) % 2 == 0) query_together("query, all at once", (u8*)self->output + 0xFF8, cpu);
    if (round > 0) check(self->output->count > 0, "the last answer", "\"cpu\": %u, \"kept\": false", cpu);
    // All zero, for those who look at content: only the call itself tells that its page will not stay so.
    if (round % 3 == 2) memset(self->output, 0, PAGE_SIZE);
    result = call(CALL_GET_BOOT_ZEROED_MEMORY, __pa(self->output));
    check_answer("answer, all at once", self->output, result, cpu);
    if ((round + cpu) % 2 != 0) query_together("query, all at once", (u8*)self->output + 0xFF8, cpu);
  }

  for (round = 0; round < rounds; round++) {
    if (round % ROUNDS_A_MEETING == 0) meet();
    if ((round + cpu) % 2 == 0) query_together("query, one page", (u8*)shared + 0xFF8, cpu);
    result = call(CALL_GET_BOOT_ZEROED_MEMORY, __pa(shared));
    check(result == success, "answer, one page", "\"cpu\": %u, \"result\": \"%llx\"", cpu, result);
    if ((round + cpu) % 2 != 0) query_together("query, one page", (u8*)shared + 0xFF8, cpu);
    if (round % ROUNDS_A_MEETING != ROUNDS_A_MEETING - 1) continue;
    meet();
    if (round / ROUNDS_A_MEETING % cpus == cpu) check_answer("one page, written by all", shared, success, cpu);
  }
  check(!memchr_inv(self->data, PATTERN, PAGE_SIZE), "the data", "\"cpu\": %u, \"kept\": false", cpu);
  kthread_complete_and_exit(&self->done, 0);
}

static void free_workers(void) {
  unsigned int i;

  for (i = 0; i < MOST_CPUS; i++) {
    free_page((unsigned long)workers[i].output);
    free_page((unsigned long)workers[i].data);
  }
  free_page((unsigned long)shared);
}

static int together(void) {
  unsigned int i;

  cpus = num_online_cpus();
  if (cpus > MOST_CPUS) return -E2BIG;
  shared = (struct answer*)get_zeroed_page(GFP_KERNEL);
  for (i = 0; i < cpus; i++) {
    init_completion(&workers[i].done);
    workers[i].output = (struct answer*)get_zeroed_page(GFP_KERNEL);
    workers[i].data = (u8*)__get_free_page(GFP_KERNEL);
    if (!shared || !workers[i].output || !workers[i].data) {
      free_workers();
      return -ENOMEM;
    }
    memset(workers[i].data, PATTERN, PAGE_SIZE);
  }
  for (i = 0; i < cpus; i++) {
    workers[i].thread = kthread_create_on_cpu(call_together, &workers[i], i, "hostile/%u");
    if (IS_ERR(workers[i].thread)) {
      const int error = PTR_ERR(workers[i].thread);

      while (i-- > 0)
        kthread_stop(workers[i].thread); // never woken: they end without a call
      free_workers();
      return error;
    }
  }
  for (i = 0; i < cpus; i++)
    wake_up_process(workers[i].thread);
  for (i = 0; i < cpus; i++)
    wait_for_completion(&workers[i].done);
  free_workers();
  return 0;
}

// ---- the loop

#define LOOP_PARTS 10 // of the time; each of them longer where it is too short for these calls
#define CALLS_A_PART 32
static atomic64_t steps, longest_gap, most_calls; // between two steps; the gap in cycles of the TSC

// Waits for the clock chip to show another second; when that was, in cycles. Linux's own clock is no measure: in a
// guest of Hyper-V without its reference clock it is the timer interrupts that are counted, and some are lost.
static u64 next_second(void) {
  u8 before, now;
  bool read = false;

  do {
    spin_lock_irq(&rtc_lock);
    now = CMOS_READ(RTC_SECONDS);
    spin_unlock_irq(&rtc_lock);
    if (!read) before = now;
    read = true;
    cond_resched();
  } while (now == before);
  return rdtsc_ordered();
}

// CPU 1: what it gets done, the longest time that it got nothing done, and how many calls CPU 0 made at most meanwhile.
static int count_steps(void* unused) {
  u64 last = rdtsc_ordered(), last_made = atomic64_read(&made);

  while (!kthread_should_stop()) {
    const u64 now = rdtsc_ordered(), now_made = atomic64_read(&made);

    if (now_made - last_made > atomic64_read(&most_calls)) atomic64_set(&most_calls, now_made - last_made);
    last_made = now_made;
    if (now - last > atomic64_read(&longest_gap)) atomic64_set(&longest_gap, now - last);
    last = now;
    atomic64_inc(&steps);
    cond_resched();
  }
  return 0;
}

// Writes that leave the interface as it was: the hypercall page once more, to another place and back, off and on.
static void write_msrs(struct answer* output, const u8* other) {
  static u8 code[PAGE_SIZE];
  u64 id, page, result;
  bool stays;

  memcpy(code, hv_hypercall_pg, PAGE_SIZE);
  rdmsrl(HV_X64_MSR_GUEST_OS_ID, id);
  rdmsrl(HV_X64_MSR_HYPERCALL, page);
  wrmsrl(HV_X64_MSR_HYPERCALL, page);
  wrmsrl(HV_X64_MSR_HYPERCALL, (u64)__pa(other) | HV_X64_MSR_HYPERCALL_ENABLE);
  // KVM's code stays in the page that Linux calls; else that has again what it had, and nothing can be called.
  stays = !memcmp(code, hv_hypercall_pg, PAGE_SIZE);
  check(stays == !strcmp(way, "kernel"), "hypercall page that was covered", "\"stays\": %d", stays);
  if (stays) {
    result = call(CALL_GET_BOOT_ZEROED_MEMORY, __pa(output));
    check(result == success && !names(output, page_of(other)), "answer, hypercall page elsewhere",
          "\"result\": \"%llx\"", result);
    result = call(CALL_GET_BOOT_ZEROED_MEMORY, __pa(other));
    check(result == invalid_parameter, "answer into the hypercall page elsewhere", "\"result\": \"%llx\"", result);
  } else {
    check(!memcmp(code, other, PAGE_SIZE), "hypercall page elsewhere", "\"code\": false");
  }
  wrmsrl(HV_X64_MSR_HYPERCALL, page & ~(u64)HV_X64_MSR_HYPERCALL_ENABLE);
  wrmsrl(HV_X64_MSR_GUEST_OS_ID, 0);
  wrmsrl(HV_X64_MSR_HYPERCALL, page);
  wrmsrl(HV_X64_MSR_GUEST_OS_ID, id);
  wrmsrl(HV_X64_MSR_HYPERCALL, page);
  rdmsrl(HV_X64_MSR_HYPERCALL, result);
  check(result == page, "HYPERCALL", "\"value\": \"%llx\"", result);
  check(!memcmp(code, hv_hypercall_pg, PAGE_SIZE), "hypercall page, back", "\"code\": false");
  check(stays || !memchr_inv(other, 0, PAGE_SIZE), "page that was covered", "\"given_back\": false");
}

static void bad_call(size_t i, u64 output) {
  u64 result;

  switch (i % 4) {
  case 0:
    result = call(words[i / 4 % ARRAY_SIZE(words)].control, output);
    break;
  case 1:
    result = call(CALL_QUERY_CAPABILITIES, addresses[i / 4 % ARRAY_SIZE(addresses)].output);
    break;
  case 2:
    result = call(CALL_GET_BOOT_ZEROED_MEMORY, addresses[i / 4 % ARRAY_SIZE(addresses)].output);
    break;
  default:
    result = call(CALL_GET_BOOT_ZEROED_MEMORY | BIT_ULL(16 + i / 4 % 48), output);
    break;
  }
  check(result != success && result <= U16_MAX, "a bad call", "\"call\": %zu, \"result\": \"%llx\"", i, result);
}

struct loop {
  struct answer* output;
  u8* other;
  struct completion done;
};

// CPU 0.
static int call_in_a_loop(void* which) {
  struct loop* const self = which;
  u64 start = next_second(), part_start, last_made = 0, last_steps = 0, msrs = 0, now, result;
  const u64 second = next_second() - start;
  unsigned int part = 0;
  size_t i = 0;

  atomic64_set(&longest_gap, 0);
  last_steps = atomic64_read(&steps);
  part_start = start = rdtsc_ordered();
  while (part < LOOP_PARTS) {
    result = call(CALL_QUERY_CAPABILITIES, __pa(self->output));
    check(result == success && self->output->count == 1, "query in the loop", "\"result\": \"%llx\"", result);
    bad_call(i++, __pa(self->output));
    result = call(CALL_GET_BOOT_ZEROED_MEMORY, __pa(self->output));
    check(result == success && self->output->count > 0 && self->output->count <= ANSWER_RANGES &&
              !names(self->output, page_of(self->output)),
          "answer in the loop", "\"result\": \"%llx\", \"ranges\": %llu", result, self->output->count);
    bad_call(i++, __pa(self->output));
    if (i % 64 == 2) { // the first time round too
      write_msrs(self->output, self->other);
      msrs++;
    }
    cond_resched();
    now = rdtsc_ordered();
    if (now - part_start < second * seconds / LOOP_PARTS || atomic64_read(&made) - last_made < CALLS_A_PART) continue;
    part++;
    guest_result("\"mode\": \"loop\", \"part\": %u, \"made\": %llu, \"steps\": %llu", part,
                 atomic64_read(&made) - last_made, atomic64_read(&steps) - last_steps);
    last_made = atomic64_read(&made);
    last_steps = atomic64_read(&steps);
    part_start = now;
  }
  now = max(now - start, second) / 1000; // in thousands, for the products to fit
  guest_result("\"mode\": \"loop\", \"ms\": %llu, \"per_second\": %llu, \"msr_rounds\": %llu, \"longest_gap_us\": "
               "%llu, \"most_calls_in_a_gap\": %llu",
               now * 1000 / (second / 1000), atomic64_read(&made) * (second / 1000) / now, msrs,
               (u64)atomic64_read(&longest_gap) * 1000 / (second / 1000), (u64)atomic64_read(&most_calls));
  kthread_complete_and_exit(&self->done, 0);
}

static int loop(void) {
  struct loop self = {.output = (struct answer*)get_zeroed_page(GFP_KERNEL), .other = (u8*)get_zeroed_page(GFP_KERNEL)};
  struct task_struct *counter, *caller;
  int error = -ENOMEM;

  if (num_online_cpus() < 2 || seconds == 0) {
    error = -EINVAL;
    goto out;
  }
  if (!self.output || !self.other) goto out;
  init_completion(&self.done);
  counter = kthread_create_on_cpu(count_steps, NULL, 1, "hostile_steps/%u");
  error = PTR_ERR_OR_ZERO(counter);
  if (error) goto out;
  wake_up_process(counter);
  caller = kthread_create_on_cpu(call_in_a_loop, &self, 0, "hostile_calls/%u");
  error = PTR_ERR_OR_ZERO(caller);
  if (!error) {
    wake_up_process(caller);
    wait_for_completion(&self.done);
  }
  kthread_stop(counter);
out:
  free_page((unsigned long)self.output);
  free_page((unsigned long)self.other);
  return error;
}

// ---- module

static int __init hostile_calls_init(void) {
  int error = -EINVAL;

  if (!hv_hypercall_pg)
    error = -ENODEV;
  else if (!strcmp(mode, "table"))
    error = try_table();
  else if (!strcmp(mode, "reuse"))
    error = reuse();
  else if (!strcmp(mode, "together"))
    error = together();
  else if (!strcmp(mode, "loop"))
    error = loop();
  guest_result("\"mode\": \"%s\", \"done\": true, \"error\": %d, \"checks\": %llu, \"failed\": %llu, \"fresh\": %llu, "
               "\"calls\": {\"0x8001\": %llu, \"0x8002\": %llu, \"other\": %llu}, \"made\": %llu",
               mode, error, atomic64_read(&checks), atomic64_read(&wrong), fresh_found, atomic64_read(&arrived_query),
               atomic64_read(&arrived_boot_zeroed), atomic64_read(&arrived_other), atomic64_read(&made));
  return error;
}

static void __exit hostile_calls_exit(void) {}

module_init(hostile_calls_init);
module_exit(hostile_calls_exit);
MODULE_DESCRIPTION("Makes the hypercalls of a broken or hostile kernel, and checks what comes back");
MODULE_LICENSE("GPL");
