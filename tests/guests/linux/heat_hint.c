// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// Tells the host which memory Linux has free, so that it can have it back: registers with Linux's free page reporting,
// and sends the blocks that come from there as hints of cold memory whose content may go (HvExtCallMemoryHeatHint).
//
// What is counted can be read in /sys/module/heat_hint/parameters. A word written to `ask` there has the memory asked
// for that is known to be zero; how much that is becomes a line on the console, with the word and the counters.
#include "guest.h"

#include <linux/errno.h>
#include <linux/gfp.h>
#include <linux/irqflags.h>
#include <linux/kernel.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/page_reporting.h>
#include <linux/percpu.h>
#include <linux/scatterlist.h>
#include <linux/string.h>

#define CALL_MEMORY_HEAT_HINT 0x8003
#define CAPABILITY_COLD_DISCARD BIT_ULL(8)
#define COLD_DISCARD 2

// The input is a page: the kind of hint, then ranges.
#define HINT_RANGES (PAGE_SIZE / sizeof(u64) - 1)
// A range: how many pages follow the first, whether they are of 2 MiB, and the first one's number or address.
#define RANGE_MOST_PAGES 2048
#define RANGE_IS_LARGE BIT_ULL(11)
#define LARGE_ORDER (PMD_SHIFT - PAGE_SHIFT)

static bool read_back;
module_param(read_back, bool, 0444);
MODULE_PARM_DESC(read_back,
                 "Read the first page of each block of 2 MiB or more that was given back, which has to be zero");

// Counted by one work item alone.
static unsigned long calls, pages, read_pages, data_pages;
module_param(calls, ulong, 0444);
MODULE_PARM_DESC(calls, "How many hints were sent");
module_param(pages, ulong, 0444);
MODULE_PARM_DESC(pages, "How many pages of 4 KiB the host took");
module_param(read_pages, ulong, 0444);
MODULE_PARM_DESC(read_pages, "How many of these were read (read_back)");
module_param(data_pages, ulong, 0444);
MODULE_PARM_DESC(data_pages, "How many of those held data");
static unsigned long failures[32];
module_param_array(failures, ulong, NULL, 0444);
MODULE_PARM_DESC(failures, "How many hints were refused, by status; the last one: any other");

static unsigned long refused(void) {
  unsigned long sum = 0;
  size_t i;

  for (i = 0; i < ARRAY_SIZE(failures); i++)
    sum += failures[i];
  return sum;
}

// A block of the buddy allocator's: aligned to its size, of at most 2^10 pages.
static u64 range_of(struct scatterlist* block) {
  const unsigned int order = get_order(block->length);
  const u64 first = page_to_pfn(sg_page(block));

  BUILD_BUG_ON(1 << (LARGE_ORDER - 1) > RANGE_MOST_PAGES);
  if (order < LARGE_ORDER) return (first << 12) | ((1ULL << order) - 1);
  return (first << PAGE_SHIFT) | RANGE_IS_LARGE | ((1ULL << (order - LARGE_ORDER)) - 1);
}

// The blocks are nobody's until this returns.
static void look_at(struct scatterlist* blocks, unsigned int count) {
  struct scatterlist* block;
  unsigned int i;

  for_each_sg(blocks, block, count, i) {
    if (block->length < PMD_SIZE) continue;
    read_pages++;
    data_pages += memchr_inv(page_address(sg_page(block)), 0, PAGE_SIZE) != NULL;
  }
}

static int report(struct page_reporting_dev_info* reporting, struct scatterlist* blocks, unsigned int count) {
  struct scatterlist* block;
  unsigned long flags, bytes = 0;
  u64 *input, result;
  unsigned int i;

  BUILD_BUG_ON(PAGE_REPORTING_CAPACITY > HINT_RANGES);
  // The input page is this CPU's.
  local_irq_save(flags);
  input = *this_cpu_ptr(hyperv_pcpu_input_arg);
  input[0] = COLD_DISCARD;
  for_each_sg(blocks, block, count, i) {
    input[1 + i] = range_of(block);
    bytes += block->length;
  }
  result = hv_do_rep_hypercall(CALL_MEMORY_HEAT_HINT, count, 0, input, NULL);
  local_irq_restore(flags);

  calls++;
  if (!hv_result_success(result)) {
    failures[min_t(size_t, hv_result(result), ARRAY_SIZE(failures) - 1)]++;
    return -EIO;
  }
  pages += bytes / PAGE_SIZE;
  if (read_back) look_at(blocks, count);
  return 0;
}

static struct page_reporting_dev_info reporting = {.report = report};

static int ask(const char* word, const struct kernel_param* parameter) {
  struct answer* answer;
  u64 status, answered = 0;
  unsigned int i;

  if (strlen(word) > 32 || strpbrk(word, "\"\\")) return -EINVAL;
  answer = (struct answer*)get_zeroed_page(GFP_KERNEL);
  if (!answer) return -ENOMEM;
  status = guest_hypercall(CALL_GET_BOOT_ZEROED_MEMORY, 0, __pa(answer));
  for (i = 0; i < min_t(u64, answer->count, ANSWER_RANGES); i++)
    answered += answer->range[i].count;
  guest_result("\"at\": \"%.*s\", \"status\": %llu, \"ranges\": %llu, \"answered_pages\": %llu, \"calls\": %lu, "
               "\"pages\": %lu, \"refused\": %lu, \"read_pages\": %lu, \"data_pages\": %lu",
               (int)strcspn(word, "\n"), word, status, answer->count, answered, calls, pages, refused(), read_pages,
               data_pages);
  free_page((unsigned long)answer);
  return 0;
}

static const struct kernel_param_ops ask_ops = {.set = ask};
module_param_cb(ask, &ask_ops, NULL, 0200);
MODULE_PARM_DESC(ask, "Ask for the memory that is known to be zero; the word is for the line that says so");

static int __init heat_hint_init(void) {
  int error;

  if (!hv_query_ext_cap(CAPABILITY_COLD_DISCARD)) {
    guest_result("\"at\": \"start\", \"error\": \"the host takes no hints\"");
    return -ENODEV;
  }
  error = page_reporting_register(&reporting);
  if (error) guest_result("\"at\": \"start\", \"error\": \"no free page reporting: %d\"", error);
  return error;
}

static void __exit heat_hint_exit(void) { page_reporting_unregister(&reporting); }

module_init(heat_hint_init);
module_exit(heat_hint_exit);
MODULE_DESCRIPTION("Tells Hyper-V which memory is free");
MODULE_LICENSE("GPL");
