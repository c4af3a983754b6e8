// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// Asks for the memory that is known to be zero, as a guest that does not trust the answer: reads all of it before
// anything else runs, and compares it with what Linux has free. One line on the console says what came of it.
//
// All happens when it is loaded; to ask again, unload it and load it again.
#include "guest.h"

#include <asm/tsc.h>
#include <linux/gfp.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/module.h>
#include <linux/nmi.h>
#include <linux/nodemask.h>
#include <linux/sort.h>
#include <linux/stop_machine.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

static unsigned int scribble;
module_param(scribble, uint, 0444);
MODULE_PARM_DESC(scribble, "Pages to fill with data and to free again right before the call");
static unsigned int clear;
module_param(clear, uint, 0444);
MODULE_PARM_DESC(clear, "Pages to fill with data, to clear, and to free again right before the call");

// The pages [first, end).
struct extent {
  u64 first;
  u64 end;
};

static struct {
  struct answer* answer;
  struct page** written;               // The pages to scribble on, then those to clear.
  struct extent ranges[ANSWER_RANGES]; // What was answered: ascending, disjoint.
  unsigned int range_count;

  u64 capabilities_status, capabilities;
  u64 status;
  u64 call_ticks;     // Of the TSC: as a guest of ours, Linux has no clock but the timer's tick.
  u64 hash;           // Of the answer up to its last range: FNV-1a, of its words rather than its bytes.
  u64 answered_pages; // The sum of the ranges.
  u64 empty_ranges, impossible_ranges, repeated_pages;
  bool is_largest_first;

  u64 reported_pages; // Answered, and RAM.
  u64 not_ram_pages;
  u64 data_pages, data_words;
  s64 first_data_page; // Or -1.

  u64 buddy_pages, cached_pages; // Free: in the buddy allocator's lists, and in the CPUs' lists of single pages.
  u64 free_reported_pages;
  u64 scribbled_reported_pages, cleared_reported_pages;
} run;

static int by_first(const void* left, const void* right) {
  const struct extent *one = left, *other = right;

  return one->first < other->first ? -1 : one->first > other->first;
}

// Looks at the ranges as at any numbers that came from outside.
static void take_ranges(void) {
  const struct answer* answer = run.answer;
  u64 previous = U64_MAX, pages = 0;
  unsigned int i, kept = 0;

  run.is_largest_first = true;
  run.hash = 0xcbf29ce484222325;
  run.hash = (run.hash ^ answer->count) * 0x100000001b3;
  for (i = 0; i < answer->count; i++) {
    const u64 first = answer->range[i].first, count = answer->range[i].count;

    run.hash = (run.hash ^ first) * 0x100000001b3;
    run.hash = (run.hash ^ count) * 0x100000001b3;
    if (count > previous) run.is_largest_first = false;
    previous = count;
    if (count == 0) {
      run.empty_ranges++;
      continue;
    }
    // Of 52 bits, the widest physical address there can be.
    if (first >> 40 || count > (1ULL << 40) - first) {
      run.impossible_ranges++;
      continue;
    }
    run.answered_pages += count;
    run.ranges[run.range_count].first = first;
    run.ranges[run.range_count++].end = first + count;
  }

  sort(run.ranges, run.range_count, sizeof run.ranges[0], by_first, NULL);
  for (i = 0; i < run.range_count; i++) {
    if (kept > 0 && run.ranges[i].first <= run.ranges[kept - 1].end)
      run.ranges[kept - 1].end = max(run.ranges[kept - 1].end, run.ranges[i].end);
    else
      run.ranges[kept++] = run.ranges[i];
  }
  run.range_count = kept;
  for (i = 0; i < kept; i++)
    pages += run.ranges[i].end - run.ranges[i].first;
  run.repeated_pages = run.answered_pages - pages;
}

// How many of the pages [first, end) were reported.
static u64 reported_of(u64 first, u64 end) {
  u64 pages = 0;
  unsigned int i;

  for (i = 0; i < run.range_count && run.ranges[i].first < end; i++) {
    if (run.ranges[i].end > first) pages += min(run.ranges[i].end, end) - max(run.ranges[i].first, first);
  }
  return pages;
}

static void read_page(u64 page) {
  const u64* words = pfn_to_kaddr(page);
  unsigned int i;
  u64 count = 0;

  for (i = 0; i < PAGE_SIZE / sizeof *words; i++)
    count += READ_ONCE(words[i]) != 0;
  if (count == 0) return;
  if (run.data_pages++ == 0) run.first_data_page = page;
  run.data_words += count;
}

static void read_ranges(void) {
  unsigned int i;
  u64 page;

  for (i = 0; i < run.range_count; i++) {
    for (page = run.ranges[i].first; page < run.ranges[i].end; page++) {
      // The direct map has RAM alone.
      if (!pfn_valid(page) || !page_is_ram(page)) {
        run.not_ram_pages++;
        continue;
      }
      run.reported_pages++;
      read_page(page);
      // Reading takes as long as it takes.
      if (run.reported_pages % 1024 == 0) touch_nmi_watchdog();
    }
  }
}

static void take_free(const struct page* page, unsigned int order, u64* pages) {
  const u64 first = page_to_pfn(page);

  *pages += 1ULL << order;
  run.free_reported_pages += reported_of(first, first + (1ULL << order));
}

// Linux's own books of what is free.
static void walk_free(const struct zone* zone) {
  const struct page* page;
  unsigned int order, list, cpu;

  for (order = 0; order < ARRAY_SIZE(zone->free_area); order++) {
    for (list = 0; list < MIGRATE_TYPES; list++)
      list_for_each_entry(page, &zone->free_area[order].free_list[list], buddy_list)
          take_free(page, order, &run.buddy_pages);
  }
  for_each_online_cpu(cpu) {
    const struct per_cpu_pages* cached = per_cpu_ptr(zone->per_cpu_pageset, cpu);

    for (list = 0; list < NR_PCP_LISTS; list++) {
      order = list < NR_LOWORDER_PCP_LISTS ? list / MIGRATE_PCPTYPES : HPAGE_PMD_ORDER;
      list_for_each_entry(page, &cached->lists[list], pcp_list) take_free(page, order, &run.cached_pages);
    }
  }
}

// With this CPU to itself, the others held: what is free stays free, and nothing is written but by this.
static int ask_and_read(void* unused) {
  struct answer* answer = run.answer;
  unsigned int i;
  u64 start;
  int node, zone;

  // In here, so that nobody takes them again.
  for (i = 0; i < scribble + clear; i++)
    __free_page(run.written[i]);

  run.capabilities_status = guest_hypercall(CALL_QUERY_CAPABILITIES, 0, __pa(answer));
  run.capabilities = answer->count;
  // An answer that was not written is not taken for one.
  memset(answer, 0xff, PAGE_SIZE);
  start = rdtsc_ordered();
  run.status = guest_hypercall(CALL_GET_BOOT_ZEROED_MEMORY, 0, __pa(answer));
  run.call_ticks = rdtsc_ordered() - start;
  if (run.status != 0 || answer->count > ANSWER_RANGES) return 0;

  take_ranges();
  read_ranges();
  for_each_online_node(node) {
    for (zone = 0; zone < MAX_NR_ZONES; zone++) {
      if (populated_zone(&NODE_DATA(node)->node_zones[zone])) walk_free(&NODE_DATA(node)->node_zones[zone]);
    }
  }
  for (i = 0; i < scribble + clear; i++) {
    const u64 page = page_to_pfn(run.written[i]);

    *(i < scribble ? &run.scribbled_reported_pages : &run.cleared_reported_pages) += reported_of(page, page + 1);
  }
  return 0;
}

// Takes the pages to be written from Linux, and writes them.
static int write_pages(void) {
  const unsigned int count = scribble + clear;
  unsigned int i;

  if (count < scribble) return -EINVAL;
  if (count == 0) return 0;
  run.written = vcalloc(count, sizeof *run.written);
  if (!run.written) return -ENOMEM;
  for (i = 0; i < count; i++) {
    run.written[i] = alloc_page(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN);
    if (!run.written[i]) goto none;
    memset(page_address(run.written[i]), 0xa5, PAGE_SIZE);
    if (i >= scribble) clear_page(page_address(run.written[i]));
  }
  return 0;

none:
  while (i-- > 0)
    __free_page(run.written[i]);
  vfree(run.written);
  return -ENOMEM;
}

static int __init zeroed_memory_init(void) {
  int error;

  run.first_data_page = -1;
  run.answer = (struct answer*)get_zeroed_page(GFP_KERNEL);
  if (!run.answer) return -ENOMEM;
  error = write_pages();
  if (error) {
    free_page((unsigned long)run.answer);
    return error;
  }
  stop_machine(ask_and_read, NULL, NULL);
  guest_result(
      "\"capabilities_status\": %llu, \"capabilities\": %llu, \"status\": %llu, \"call_ticks\": %llu, \"tsc_khz\": %u, "
      "\"ranges\": %llu, \"hash\": %llu, \"answered_pages\": %llu, \"empty_ranges\": %llu, "
      "\"impossible_ranges\": %llu, \"repeated_pages\": %llu, \"largest_first\": %s, "
      "\"reported_pages\": %llu, \"not_ram_pages\": %llu, \"data_pages\": %llu, \"data_words\": %llu, "
      "\"first_data_page\": %lld, \"buddy_pages\": %llu, \"cached_pages\": %llu, "
      "\"free_reported_pages\": %llu, \"used_reported_pages\": %llu, "
      "\"scribbled_reported_pages\": %llu, \"cleared_reported_pages\": %llu",
      run.capabilities_status, run.capabilities, run.status, run.call_ticks, tsc_khz, run.answer->count, run.hash,
      run.answered_pages, run.empty_ranges, run.impossible_ranges, run.repeated_pages,
      run.is_largest_first ? "true" : "false", run.reported_pages, run.not_ram_pages, run.data_pages, run.data_words,
      run.first_data_page, run.buddy_pages, run.cached_pages, run.free_reported_pages,
      run.reported_pages - run.free_reported_pages, run.scribbled_reported_pages, run.cleared_reported_pages);
  vfree(run.written);
  free_page((unsigned long)run.answer);
  return 0;
}

// Nothing is left; but a module without this cannot be unloaded.
static void __exit zeroed_memory_exit(void) {}

module_init(zeroed_memory_init);
module_exit(zeroed_memory_exit);
MODULE_DESCRIPTION("Asks Hyper-V for the memory that is known to be zero, and reads all of it");
MODULE_LICENSE("GPL");
