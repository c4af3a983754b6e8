// The zeroing guest: a client of HvExtCallGetBootZeroedMemory that does what an operating system does at boot. It looks
// for the hypervisor, asks which memory is zero already, and zeroes the rest of what it was given. Then, if it has a
// balloon target, it gives back what is beyond it. On vCPU 0 it asks and plans; all vCPUs share the zeroing and the
// giving back. Written for KVM that emulates every instruction: no work a page, only work a chunk.
#include "abi.hpp"
#include "plan.hpp"

#include <cstddef>
#include <cstdint>

using namespace cppvmm::zeroing;

namespace {

// Numbers of the TLFS ("Hypervisor CPUID Leaves", "Virtual MSRs", the hypercalls' pages). Spelled out here rather
// than shared with the library: the guest is the other side of the wire.
constexpr std::uint32_t leaf_interface = 0x4000'0001;
constexpr std::uint32_t leaf_features = 0x4000'0003;
constexpr std::uint32_t interface_hv1 = 0x3123'7648; // "Hv#1"
constexpr std::uint32_t msr_guest_os_id = 0x4000'0000;
constexpr std::uint32_t msr_hypercall = 0x4000'0001;
constexpr std::uint64_t hypercall_enable = 1;
constexpr std::uint64_t call_query_capabilities = 0x8001;
constexpr std::uint64_t call_get_boot_zeroed_memory = 0x8002;
constexpr std::uint64_t call_memory_heat_hint = 0x8003;
constexpr std::uint64_t capability_get_boot_zeroed_memory = 1;
constexpr std::uint64_t capability_cold_discard = 1 << 8; // as Linux's balloon looks for it (drivers/hv/hv_balloon.c)
constexpr std::uint64_t heat_cold_discard = 2;
constexpr std::uint64_t range_is_large = 1 << 11; // of 2 MiB pages
constexpr std::uint64_t status_mask = 0xFFFF;

// TLFS "Reporting the Guest OS Identity": bit 63 is open source, 62:56 the OS type (0x7F is none of those listed),
// 47:16 the version.
constexpr std::uint64_t os_id = std::uint64_t{1} << 63 | std::uint64_t{0x7F} << 56 | std::uint64_t{1} << 16;

/// Pages that a vCPU takes at a time: 256 KiB, some 30 ms of work where KVM emulates, some 20 us where it does not.
constexpr std::uint64_t chunk_pages = 64;

/// As many as Linux reports at a time (include/linux/page_reporting.h, PAGE_REPORTING_CAPACITY).
constexpr std::size_t most_hint_ranges = 32;
constexpr std::uint64_t large_pages = 512;
/// In one range, as the largest block that Linux has free.
constexpr std::uint64_t most_large = 2;
/// What a vCPU takes of addresses at a time, to give back what of it is to go.
constexpr std::uint64_t block_pages = most_hint_ranges * most_large * large_pages;

/// A list of pages to give back. On a vCPU's stack, which is one page: it crosses none.
struct Hint {
  std::uint64_t heat = heat_cold_discard;
  std::uint64_t ranges[most_hint_ranges];
  std::uint64_t pages[most_hint_ranges]; // of each range; not for the host
  std::size_t count = 0;
};

struct ZeroedAnswer {
  std::uint64_t count;
  Pages ranges[max_reported_ranges];
};
static_assert(sizeof(ZeroedAnswer) == 0xFF8);

alignas(page_bytes) unsigned char hypercall_page[page_bytes];
alignas(page_bytes) ZeroedAnswer answer;
alignas(8) std::uint64_t capability_word;
Pages lives_in[max_lives_in_ranges];
Pages cuts[max_reported_ranges + max_lives_in_ranges];
Pages plan[max_planned_ranges];
std::size_t plan_ranges;
/// RAM but what the guest lives in: made with the plan, with the lowest pages taken out when all is zeroed.
Pages free_memory[max_ram_ranges + max_lives_in_ranges];
std::size_t free_ranges;
std::uint32_t all_is_zeroed;
/// Set once the plan is complete; what vCPUs other than 0 wait for.
std::uint32_t plan_is_ready;

struct CpuidWords {
  std::uint32_t eax, ebx, ecx, edx;
};

CpuidWords cpuid(std::uint32_t leaf) {
  CpuidWords words;
  asm volatile("cpuid" : "=a"(words.eax), "=b"(words.ebx), "=c"(words.ecx), "=d"(words.edx) : "a"(leaf), "c"(0));
  return words;
}

std::uint64_t read_msr(std::uint32_t msr) {
  std::uint32_t low, high;
  asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
  return std::uint64_t{high} << 32 | low;
}

void write_msr(std::uint32_t msr, std::uint64_t value) {
  asm volatile("wrmsr" ::"c"(msr), "a"(static_cast<std::uint32_t>(value)), "d"(static_cast<std::uint32_t>(value >> 32))
               : "memory");
}

/// TLFS "64-bit calling convention": RCX control, RDX input GPA, R8 output GPA, RAX result; memory is identity-mapped.
std::uint64_t hypercall(std::uint64_t control, const void* input, const void* output) {
  register std::uint64_t r8 asm("r8") = reinterpret_cast<std::uint64_t>(output);
  std::uint64_t result;
  std::uint64_t rcx = control;
  std::uint64_t rdx = reinterpret_cast<std::uint64_t>(input);
  asm volatile("call *%[page]"
               : "=a"(result), "+c"(rcx), "+d"(rdx), "+r"(r8)
               : [page] "r"(static_cast<void*>(hypercall_page))
               : "r9", "r10", "r11", "memory", "cc");
  return result;
}

void out(std::uint16_t port, std::uint32_t value) { asm volatile("outl %0, %1" ::"a"(value), "d"(port) : "memory"); }

[[noreturn]] void exit_vm(ExitCode code) {
  out(exit_port, static_cast<std::uint32_t>(code));
  for (;;)
    asm volatile("hlt");
}

void zero(const Pages& pages) {
  std::uint64_t at = pages.first * page_bytes;
  std::uint64_t words = pages.count * (page_bytes / 8);
  asm volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(0) : "memory");
}

/// Brings the hypercall page up; false when there is no Hyper-V interface to bring up.
bool set_up_hypercalls(Report& report) {
  if ((cpuid(1).ecx >> 31 & 1) == 0) return false;
  report.seen |= seen_hypervisor;
  if (cpuid(leaf_interface).eax != interface_hv1) return false;
  report.seen |= seen_interface;
  const CpuidWords features = cpuid(leaf_features);
  if ((features.eax >> 6 & 1) != 0) report.seen |= seen_vp_index;
  if ((features.ebx >> 20 & 1) != 0) report.seen |= seen_extended_calls;
  if ((features.eax >> 5 & 1) == 0) return false;
  report.seen |= seen_hypercall_msrs;

  write_msr(msr_guest_os_id, os_id);
  const std::uint64_t value = reinterpret_cast<std::uint64_t>(hypercall_page) | hypercall_enable;
  write_msr(msr_hypercall, value);
  if (read_msr(msr_hypercall) != value) return false;
  report.seen |= seen_hypercall_page;
  return true;
}

/// Asks the host, and returns how many ranges of `answer` may be believed: those within its bounds.
std::size_t ask(Report& report) {
  if (!set_up_hypercalls(report)) return 0;

  // As Windows does: asked whether or not the feature bit is set.
  report.capabilities_result = hypercall(call_query_capabilities, nullptr, &capability_word);
  report.seen |= asked_capabilities;
  if ((report.capabilities_result & status_mask) != 0) return 0;
  report.capabilities = capability_word;
  if ((report.capabilities & capability_get_boot_zeroed_memory) == 0) return 0;

  report.zeroed_result = hypercall(call_get_boot_zeroed_memory, nullptr, &answer);
  report.seen |= asked_zeroed_memory;
  if ((report.zeroed_result & status_mask) != 0) return 0;
  report.reported_ranges = answer.count;
  return answer.count < max_reported_ranges ? answer.count : max_reported_ranges;
}

void make_plan(const BootInfo& boot, Report& report) {
  const std::size_t reported = ask(report);
  std::size_t cut_count = 0;
  for (std::size_t i = 0; i < reported; ++i) {
    for (std::size_t l = 0; l < boot.lives_in_ranges; ++l)
      if (overlap(answer.ranges[i], boot.lives_in[l])) {
        ++report.lives_in_overlaps;
        break;
      }
    cuts[cut_count++] = answer.ranges[i];
  }
  for (std::size_t l = 0; l < boot.lives_in_ranges; ++l) {
    lives_in[l] = boot.lives_in[l];
    cuts[cut_count++] = boot.lives_in[l];
  }

  free_ranges = subtract(boot.ram, boot.ram_ranges, lives_in, boot.lives_in_ranges, free_memory);
  plan_ranges = subtract(boot.ram, boot.ram_ranges, cuts, cut_count, plan);
  std::uint64_t pages = 0;
  for (std::size_t i = 0; i < plan_ranges; ++i)
    pages += plan[i].count;
  report.planned_ranges = plan_ranges;
  report.planned_pages = pages;
}

/// Zeroes chunks of the plan until none are left; returns the pages zeroed here.
std::uint64_t zero_chunks(Report& report) {
  std::uint64_t zeroed = 0;
  std::size_t range = 0;
  std::uint64_t range_start = 0; // where plan[range] begins, counted in planned pages
  for (;;) {
    std::uint64_t at = __atomic_fetch_add(&report.cursor, chunk_pages, __ATOMIC_RELAXED);
    const std::uint64_t end = at + chunk_pages;
    while (at < end) {
      while (range < plan_ranges && at >= range_start + plan[range].count)
        range_start += plan[range++].count;
      if (range == plan_ranges) return zeroed;
      const std::uint64_t range_end = range_start + plan[range].count;
      const std::uint64_t count = (end < range_end ? end : range_end) - at;
      zero(Pages{plan[range].first + (at - range_start), count});
      at += count;
      zeroed += count;
    }
  }
}

/// Takes the lowest `pages` out of what is free.
void keep_lowest(std::uint64_t pages) {
  for (std::size_t i = 0; i < free_ranges && pages != 0; ++i) {
    const std::uint64_t kept = pages < free_memory[i].count ? pages : free_memory[i].count;
    free_memory[i].first += kept;
    free_memory[i].count -= kept;
    pages -= kept;
  }
}

void send(Hint& hint, Report& report) {
  const std::size_t count = hint.count;
  if (count == 0) return;
  hint.count = 0;
  const std::uint64_t result = hypercall(call_memory_heat_hint | std::uint64_t{count} << 32, &hint, nullptr);
  const bool is_success = (result & status_mask) == 0;
  const std::uint64_t done = result >> 32 & 0xFFF;
  if (done > count || (is_success && done != count)) exit_vm(ExitCode::bad_hint);
  std::uint64_t pages = 0;
  for (std::size_t i = 0; i < done; ++i)
    pages += hint.pages[i];
  __atomic_fetch_or(&report.seen, gave_back, __ATOMIC_RELAXED);
  __atomic_fetch_add(&report.given_back_pages, pages, __ATOMIC_RELAXED);
  __atomic_fetch_add(&report.give_back_calls, 1, __ATOMIC_RELAXED);
  if (!is_success) __atomic_fetch_add(&report.give_back_failures, 1, __ATOMIC_RELAXED);
  if (!is_success || __atomic_load_n(&report.give_back_failures, __ATOMIC_RELAXED) == 0)
    __atomic_store_n(&report.give_back_result, result, __ATOMIC_RELAXED);
}

/// As a balloon does: 2 MiB pages where they are whole, the rest by 4 KiB pages.
void give_back(const Pages& pages, Hint& hint, Report& report) {
  std::uint64_t at = pages.first;
  const std::uint64_t end = pages.first + pages.count;
  while (at < end) {
    const bool is_large = at % large_pages == 0 && end - at >= large_pages;
    std::uint64_t count = large_pages - at % large_pages;
    if (is_large)
      count = (end - at < most_large * large_pages ? (end - at) / large_pages : most_large) * large_pages;
    else if (count > end - at)
      count = end - at;
    const std::uint64_t additional = (is_large ? count / large_pages : count) - 1;
    hint.ranges[hint.count] = at * page_bytes | (is_large ? range_is_large : 0) | additional;
    hint.pages[hint.count] = count;
    at += count;
    if (++hint.count == most_hint_ranges) send(hint, report);
  }
}

/// Gives blocks of addresses back until none are left.
void give_blocks_back(const BootInfo& boot, Report& report) {
  if (boot.ram_ranges == 0) return;
  const Pages& last = boot.ram[boot.ram_ranges - 1];
  Hint hint;
  for (;;) {
    const std::uint64_t first = __atomic_fetch_add(&report.given_back_cursor, 1, __ATOMIC_RELAXED) * block_pages;
    if (first >= last.first + last.count) return;
    for (std::size_t i = 0; i < free_ranges; ++i) {
      const std::uint64_t range_end = free_memory[i].first + free_memory[i].count;
      const std::uint64_t from = free_memory[i].first > first ? free_memory[i].first : first;
      const std::uint64_t to = range_end < first + block_pages ? range_end : first + block_pages;
      if (from < to) give_back(Pages{from, to - from}, hint, report);
    }
    send(hint, report);
  }
}

} // namespace

extern "C" void zeroing_main(const BootInfo& boot, std::uint64_t cpu) {
  if (boot.magic != BootInfo::expected_magic || boot.cpus == 0 || boot.cpus > max_cpus || cpu >= boot.cpus ||
      boot.ram_ranges > max_ram_ranges || boot.lives_in_ranges > max_lives_in_ranges)
    exit_vm(ExitCode::bad_boot_info);
  Report& report = *reinterpret_cast<Report*>(boot.report);

  if (cpu == 0) {
    make_plan(boot, report);
    __atomic_store_n(&plan_is_ready, 1, __ATOMIC_RELEASE);
    if (boot.cpus > 1) out(gate_port, static_cast<std::uint32_t>(GateAction::open));
  } else {
    while (__atomic_load_n(&plan_is_ready, __ATOMIC_ACQUIRE) == 0)
      out(gate_port, static_cast<std::uint32_t>(GateAction::wait));
  }

  const std::uint64_t zeroed = zero_chunks(report);
  report.cpu_zeroed_pages[cpu] = zeroed;
  __atomic_fetch_add(&report.zeroed_pages, zeroed, __ATOMIC_RELAXED);
  const bool is_last = __atomic_add_fetch(&report.cpus_done, 1, __ATOMIC_ACQ_REL) == boot.cpus;
  const bool gives_back =
      boot.balloon_target != no_balloon_target && (report.capabilities & capability_cold_discard) != 0;
  if (!gives_back) {
    if (is_last) exit_vm(ExitCode::done);
    return;
  }
  if (is_last) {
    keep_lowest(boot.balloon_target);
    __atomic_store_n(&all_is_zeroed, 1, __ATOMIC_RELEASE);
    if (boot.cpus > 1) out(gate_port, static_cast<std::uint32_t>(GateAction::open_zeroed));
  } else {
    while (__atomic_load_n(&all_is_zeroed, __ATOMIC_ACQUIRE) == 0)
      out(gate_port, static_cast<std::uint32_t>(GateAction::wait_zeroed));
  }
  give_blocks_back(boot, report);
  if (__atomic_add_fetch(&report.cpus_ended, 1, __ATOMIC_ACQ_REL) == boot.cpus) exit_vm(ExitCode::done);
}
