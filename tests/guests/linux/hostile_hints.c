// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// Sends memory heat hints (HvExtCallMemoryHeatHint) as a broken or hostile kernel would, and checks what comes back:
// bad control words and addresses, ranges that are no RAM or none at all, lists that name the same or all of memory
// again and again, and pages that are in use. Memory that no list names keeps what it holds; what a cold discard names
// and is done reads zero.
//
// With `all=1`, it then gives away all memory that the guest has, itself included: nothing comes back then.
#include "checks.h"
#include "guest.h"

#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/module.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

static bool all;
module_param(all, bool, 0444);
MODULE_PARM_DESC(all, "Gives away all memory in the end");

#define CALL_MEMORY_HEAT_HINT 0x8003
#define CAPABILITIES 0x103 // boot-zeroed memory, heat hints, cold discard
enum heat { cold, hot, cold_discard };

// HV_GPA_PAGE_RANGE: so many pages of 4 KiB, 2 MiB or 1 GiB.
#define SMALL(page, count) ((u64)(page) << 12 | ((count) - 1))
#define LARGE(page, count) ((u64)(page) << 12 | BIT_ULL(11) | ((count) - 1))
#define LARGE_1_GIB BIT_ULL(12)
#define MOST_RANGES 511

#define BLOCK_ORDER 9 // 2 MiB
#define BLOCK_PAGES (1UL << BLOCK_ORDER)
#define BLOCKS 4
#define PATTERN 0x5A
static u8* block[BLOCKS];
static u64* list; // a page

static u64 page_of(const void* at) { return __pa(at) >> PAGE_SHIFT; }

static void fill(unsigned int which) { memset(block[which], PATTERN, BLOCK_PAGES * PAGE_SIZE); }

// The blocks of `zero`, a bit each, read zero, and the others what they were filled with; then all are filled again.
static void check_blocks(const char* what, unsigned int zero) {
  unsigned int i;

  for (i = 0; i < BLOCKS; i++) {
    check(!memchr_inv(block[i], zero & BIT(i) ? 0 : PATTERN, BLOCK_PAGES * PAGE_SIZE), what,
          "\"block\": %u, \"expected\": \"%s\"", i, zero & BIT(i) ? "zeros" : "what it held");
    if (zero & BIT(i)) fill(i);
  }
}

// `more` are bits of the control word beside the call's code.
static void expect(const char* what, u64 more, u64 input, enum status status, u64 reps) {
  const u64 result = guest_hypercall(CALL_MEMORY_HEAT_HINT | more, input, U64_MAX);

  check(result == (status | REPS(reps)), what,
        "\"control\": \"%llx\", \"input\": \"%llx\", \"result\": \"%llx\", \"expected\": \"%llx\"", more, input, result,
        status | REPS(reps));
}

static void try_words(void) {
  const u64 input = __pa(list);
  u8 bit;

  list[0] = cold_discard;
  list[1] = list[2] = list[3] = SMALL(page_of(block[0]), BLOCK_PAGES);
  expect("no rep count", 0, input, invalid_hypercall_input, 0);
  expect("rep start without a count", BIT_ULL(48), input, invalid_hypercall_input, 0);
  expect("rep start at the count", REPS(3) | 3ULL << 48, input, invalid_hypercall_input, 0);
  expect("rep start beyond the count", REPS(3) | 4095ULL << 48, input, invalid_hypercall_input, 0);
  expect("fast", REPS(3) | FAST, input, invalid_parameter, 0);
  expect("nested", REPS(3) | NESTED, input, invalid_hypercall_input, 0);
  for (bit = 17; bit < 64; bit++)
    if (bit <= 30 || (bit >= 44 && bit <= 47) || bit >= 60)
      expect("variable header or reserved", REPS(3) | BIT_ULL(bit), input, invalid_hypercall_input, 0);
  check_blocks("bad control words", 0);
}

static void try_addresses(void) {
  const u64 input = __pa(list), ram_end = (u64)node_end_pfn(0) << PAGE_SHIFT;
  u64 offset;

  for (offset = 1; offset < 8; offset++)
    expect("unaligned", REPS(1), input + offset, invalid_alignment, 0);
  expect("over the page's end", REPS(1), input + PAGE_SIZE - 8, invalid_alignment, 0);
  expect("over the page's end", REPS(MOST_RANGES + 1), input, invalid_alignment, 0);
  expect("over the page's end", REPS(4095), input, invalid_alignment, 0);
  expect("beyond RAM", REPS(1), ram_end, invalid_parameter, 0);
  expect("hole below 4 GiB", REPS(1), 0xC0000000, invalid_parameter, 0);
  expect("local APIC", REPS(MOST_RANGES), 0xFEE00000, invalid_parameter, 0);
  expect("1 TiB", REPS(1), BIT_ULL(40), invalid_parameter, 0);
  expect("end of the space", REPS(1), BIT_ULL(52), invalid_alignment, 0);
  expect("all ones", REPS(1), ~7ULL, invalid_alignment, 0);
  check_blocks("bad addresses", 0);
}

static void try_ranges(void) {
  const u64 ram_end = node_end_pfn(0), input = __pa(list);
  const u64 bad[] = {SMALL(ram_end, 1),
                     SMALL(ram_end - 1, 2),
                     LARGE(0, 2048),
                     LARGE(ram_end & ~(BLOCK_PAGES - 1), 1) | LARGE_1_GIB,
                     LARGE(0, 1) | LARGE_1_GIB,
                     SMALL(0xC0000, 1),
                     SMALL(0xFEE00, 1),
                     SMALL(1ULL << 40, 1),
                     LARGE(page_of(block[2]), 1) | BIT_ULL(13),
                     LARGE(page_of(block[2]), 1) | BIT_ULL(20),
                     U64_MAX};
  u64 heat;
  size_t i;

  list[1] = SMALL(page_of(block[0]), BLOCK_PAGES);
  list[3] = LARGE(page_of(block[1]), 1);
  for (i = 0; i < ARRAY_SIZE(bad); i++) {
    list[0] = cold_discard;
    list[2] = bad[i];
    // All before it is done, and nothing behind it; as the other heats are, which leave what there is.
    expect("a bad range between two", REPS(3), input, invalid_parameter, 1);
    check_blocks("a bad range between two", BIT(0));
    expect("from the bad range on", REPS(3) | 1ULL << 48, input, invalid_parameter, 1);
    check_blocks("from the bad range on", 0);
    expect("behind the bad range", REPS(3) | 2ULL << 48, input, success, 3);
    check_blocks("behind the bad range", BIT(1));
    for (heat = cold; heat <= hot; heat++) {
      list[0] = heat;
      expect("a bad range, cold or hot", REPS(3), input, invalid_parameter, 1);
    }
    check_blocks("a bad range, cold or hot", 0);
  }
  list[2] = list[3];
  for (i = 0; i < 64; i++) {
    if (i < 2) continue;
    list[0] = BIT_ULL(i);
    expect("no heat", REPS(3), input, invalid_parameter, 0);
  }
  list[0] = cold_discard + 1;
  expect("no heat", REPS(3), input, invalid_parameter, 0);
  check_blocks("no heat", 0);
}

static void try_long_lists(void) {
  const u64 ram_end = node_end_pfn(0), input = __pa(list);
  u64 heat;
  size_t i;

  list[0] = cold_discard;
  for (i = 1; i <= MOST_RANGES; i++)
    list[i] = i % 2 ? LARGE(page_of(block[3]), 1) : SMALL(page_of(block[3]) + i % BLOCK_PAGES, 1);
  expect("the same again and again", REPS(MOST_RANGES), input, success, MOST_RANGES);
  check_blocks("the same again and again", BIT(3));
  // All of memory in each range, which leaves what it holds.
  for (heat = cold; heat <= hot; heat++) {
    list[0] = heat;
    for (i = 1; i <= MOST_RANGES; i++)
      list[i] = LARGE(0, ram_end / BLOCK_PAGES);
    expect("all of memory", REPS(16), input, success, 16);
  }
  check_blocks("all of memory", 0);
  // The last range of the list is in its page, and in what it names.
  list[0] = cold_discard;
  list[1] = SMALL(page_of(list), 1);
  list[2] = SMALL(vmalloc_to_pfn(hv_hypercall_pg), 1);
  list[3] = LARGE(page_of(block[1]), 1);
  expect("pages in use", REPS(3), input, success, 3);
  check(list[0] == cold_discard && list[3] == LARGE(page_of(block[1]), 1), "the list", "\"kept\": false");
  check_blocks("pages in use", BIT(1));
}

// What was given back is known to be zero, and what holds data is not.
static void try_answer(void) {
  struct answer* const answer = (struct answer*)get_zeroed_page(GFP_KERNEL);
  u64 status, i, zeroed = 0, data = 0;

  if (!answer) return;
  list[0] = cold_discard;
  list[1] = LARGE(page_of(block[2]), 1);
  expect("before an answer", REPS(1), __pa(list), success, 1);
  status = guest_hypercall(CALL_GET_BOOT_ZEROED_MEMORY, 0, __pa(answer));
  for (i = 0; i < min_t(u64, answer->count, ANSWER_RANGES); i++) {
    const u64 first = answer->range[i].first, end = first + answer->range[i].count;

    if (first <= page_of(block[2]) && page_of(block[2]) + BLOCK_PAGES <= end) zeroed++;
    if (first < page_of(block[0]) + BLOCK_PAGES && page_of(block[0]) < end) data++;
  }
  check(status == success && zeroed == 1 && data == 0, "an answer",
        "\"status\": %llu, \"zeroed\": %llu, \"data\": %llu", status, zeroed, data);
  check_blocks("an answer", BIT(2));
  free_page((unsigned long)answer);
}

// A guest that keeps its handlers, which read zero by then, may fault for ever instead of once.
static void give_all_away(void) {
  const u64 below_1_mib = 0x100, ram_end = node_end_pfn(0);
  const struct desc_ptr no_handlers = {0};
  struct desc_ptr handlers;
  unsigned int ranges = 0;
  u64 first;

  list[0] = cold_discard;
  for (first = below_1_mib; first < ram_end; first += 2048)
    list[++ranges] = SMALL(first, min_t(u64, 2048, ram_end - first));
  local_irq_disable();
  asm volatile("sidt %0" : "=m"(handlers));
  asm volatile("lidt %0" : : "m"(no_handlers));
  guest_hypercall(CALL_MEMORY_HEAT_HINT | REPS(ranges), __pa(list), U64_MAX);
  // A guest that comes back has not lost what it gave away.
  asm volatile("lidt %0" : : "m"(handlers));
  local_irq_enable();
}

static int __init hostile_hints_init(void) {
  u64 capabilities = 0;
  unsigned int i;
  int error = -ENODEV;

  if (!hv_hypercall_pg) return error;
  list = (u64*)get_zeroed_page(GFP_KERNEL);
  error = list ? 0 : -ENOMEM;
  for (i = 0; i < BLOCKS && !error; i++) {
    block[i] = (u8*)__get_free_pages(GFP_KERNEL | __GFP_NOWARN, BLOCK_ORDER);
    if (!block[i])
      error = -ENOMEM;
    else
      fill(i);
  }
  if (!error) {
    check(guest_hypercall(CALL_QUERY_CAPABILITIES, 0, __pa(list)) == success && *list == CAPABILITIES, "capabilities",
          "\"capabilities\": \"%llx\"", *list);
    capabilities = *list;
    try_words();
    try_addresses();
    try_ranges();
    try_long_lists();
    try_answer();
  }
  guest_result("\"done\": true, \"error\": %d, \"capabilities\": %llu, \"checks\": %llu, \"failed\": %llu", error,
               capabilities, atomic64_read(&checks), atomic64_read(&wrong));
  if (!error && all) give_all_away();
  for (i = 0; i < BLOCKS; i++)
    if (block[i]) free_pages((unsigned long)block[i], BLOCK_ORDER);
  free_page((unsigned long)list);
  return error;
}

static void __exit hostile_hints_exit(void) {}

module_init(hostile_hints_init);
module_exit(hostile_hints_exit);
MODULE_DESCRIPTION("Sends the memory heat hints of a broken or hostile kernel, and checks what comes back");
MODULE_LICENSE("GPL");
