module;
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <linux/kvm.h>
#include <memory>
#include <span>
#include <sys/ioctl.h>
#include <vector>
module cppvmm.vcpu:convert;
import :cpuid;
import :error;
import :ioctl;
import :registers;

namespace cppvmm {

static_assert(sizeof(Registers) == sizeof(kvm_regs));
static_assert(offsetof(Registers, rax) == offsetof(kvm_regs, rax));
static_assert(offsetof(Registers, rbx) == offsetof(kvm_regs, rbx));
static_assert(offsetof(Registers, rcx) == offsetof(kvm_regs, rcx));
static_assert(offsetof(Registers, rdx) == offsetof(kvm_regs, rdx));
static_assert(offsetof(Registers, rsi) == offsetof(kvm_regs, rsi));
static_assert(offsetof(Registers, rdi) == offsetof(kvm_regs, rdi));
static_assert(offsetof(Registers, rsp) == offsetof(kvm_regs, rsp));
static_assert(offsetof(Registers, rbp) == offsetof(kvm_regs, rbp));
static_assert(offsetof(Registers, r8) == offsetof(kvm_regs, r8));
static_assert(offsetof(Registers, r15) == offsetof(kvm_regs, r15));
static_assert(offsetof(Registers, rip) == offsetof(kvm_regs, rip));
static_assert(offsetof(Registers, rflags) == offsetof(kvm_regs, rflags));

kvm_regs to_kvm(const Registers& registers) { return std::bit_cast<kvm_regs>(registers); }

Registers from_kvm(const kvm_regs& registers) { return std::bit_cast<Registers>(registers); }

kvm_segment to_kvm(const Segment& segment) {
  return {.base = segment.base,
          .limit = segment.limit,
          .selector = segment.selector,
          .type = segment.type,
          .present = segment.present,
          .dpl = segment.dpl,
          .db = segment.db,
          .s = segment.non_system,
          .l = segment.long_mode,
          .g = segment.granularity,
          .avl = segment.available,
          .unusable = segment.unusable,
          .padding = 0};
}

Segment from_kvm(const kvm_segment& segment) {
  return {.base = segment.base,
          .limit = segment.limit,
          .selector = segment.selector,
          .type = segment.type,
          .dpl = segment.dpl,
          .present = segment.present != 0,
          .db = segment.db != 0,
          .non_system = segment.s != 0,
          .long_mode = segment.l != 0,
          .granularity = segment.g != 0,
          .available = segment.avl != 0,
          .unusable = segment.unusable != 0};
}

kvm_dtable to_kvm(const DescriptorTable& table) { return {.base = table.base, .limit = table.limit, .padding = {}}; }

DescriptorTable from_kvm(const kvm_dtable& table) { return {.base = table.base, .limit = table.limit}; }

kvm_sregs to_kvm(const SpecialRegisters& from) {
  kvm_sregs to{};
  to.cs = to_kvm(from.cs);
  to.ds = to_kvm(from.ds);
  to.es = to_kvm(from.es);
  to.fs = to_kvm(from.fs);
  to.gs = to_kvm(from.gs);
  to.ss = to_kvm(from.ss);
  to.tr = to_kvm(from.tr);
  to.ldt = to_kvm(from.ldt);
  to.gdt = to_kvm(from.gdt);
  to.idt = to_kvm(from.idt);
  to.cr0 = from.cr0;
  to.cr2 = from.cr2;
  to.cr3 = from.cr3;
  to.cr4 = from.cr4;
  to.cr8 = from.cr8;
  to.efer = from.efer;
  to.apic_base = from.apic_base;
  static_assert(sizeof to.interrupt_bitmap == sizeof from.interrupt_bitmap);
  std::memcpy(to.interrupt_bitmap, from.interrupt_bitmap.data(), sizeof to.interrupt_bitmap);
  return to;
}

SpecialRegisters from_kvm(const kvm_sregs& from) {
  SpecialRegisters to;
  to.cs = from_kvm(from.cs);
  to.ds = from_kvm(from.ds);
  to.es = from_kvm(from.es);
  to.fs = from_kvm(from.fs);
  to.gs = from_kvm(from.gs);
  to.ss = from_kvm(from.ss);
  to.tr = from_kvm(from.tr);
  to.ldt = from_kvm(from.ldt);
  to.gdt = from_kvm(from.gdt);
  to.idt = from_kvm(from.idt);
  to.cr0 = from.cr0;
  to.cr2 = from.cr2;
  to.cr3 = from.cr3;
  to.cr4 = from.cr4;
  to.cr8 = from.cr8;
  to.efer = from.efer;
  to.apic_base = from.apic_base;
  std::memcpy(to.interrupt_bitmap.data(), from.interrupt_bitmap, sizeof from.interrupt_bitmap);
  return to;
}

// Some structs end in flexible arrays, which some versions of the header declare in a way that C++ lays out otherwise
// than C. So here are tables with room for all that KVM takes, and request numbers with the size that C gives the
// structs.
constexpr unsigned long with_size_in_c(unsigned long request, unsigned long bytes = 8) {
  return (request & ~(static_cast<unsigned long>(_IOC_SIZEMASK) << _IOC_SIZESHIFT)) | bytes << _IOC_SIZESHIFT;
}
constexpr unsigned long get_supported_cpuid_request = with_size_in_c(KVM_GET_SUPPORTED_CPUID);
constexpr unsigned long get_supported_hv_cpuid_request = with_size_in_c(KVM_GET_SUPPORTED_HV_CPUID);
constexpr unsigned long get_cpuid2_request = with_size_in_c(KVM_GET_CPUID2);
constexpr unsigned long set_cpuid2_request = with_size_in_c(KVM_SET_CPUID2);
constexpr unsigned long get_msrs_request = with_size_in_c(KVM_GET_MSRS);
constexpr unsigned long set_msrs_request = with_size_in_c(KVM_SET_MSRS);
constexpr unsigned long get_msr_index_list_request = with_size_in_c(KVM_GET_MSR_INDEX_LIST, 4);
constexpr std::size_t legacy_xsave_bytes = 4096; // of KVM_GET_XSAVE
constexpr unsigned long get_xsave_request = with_size_in_c(KVM_GET_XSAVE, legacy_xsave_bytes);
constexpr unsigned long get_xsave2_request = with_size_in_c(KVM_GET_XSAVE2, legacy_xsave_bytes);
constexpr unsigned long set_xsave_request = with_size_in_c(KVM_SET_XSAVE, legacy_xsave_bytes);

struct CpuidTable {
  static constexpr std::uint32_t capacity = 256; // KVM_MAX_CPUID_ENTRIES

  std::uint32_t count = 0;
  std::uint32_t padding = 0;
  std::array<kvm_cpuid_entry2, capacity> entries{};
};
static_assert(offsetof(CpuidTable, entries) == 8 && sizeof(kvm_cpuid_entry2) == 40);

constexpr std::uint32_t most_msrs = 64; // KVM takes up to 255 at once
template <std::uint32_t capacity>
struct MsrTable {
  std::uint32_t count = 0;
  std::uint32_t padding = 0;
  std::array<kvm_msr_entry, capacity> entries{};
};
static_assert(offsetof(MsrTable<most_msrs>, entries) == 8 && sizeof(kvm_msr_entry) == 16);

// Any of the ioctls that fill a struct kvm_cpuid2.
KvmResult<std::vector<CpuidEntry>> get_cpuid(int descriptor, unsigned long request, const char* operation) {
  const auto table = std::make_unique<CpuidTable>();
  table->count = CpuidTable::capacity;
  const auto done = kvm_ioctl(descriptor, request, table.get(), operation);
  if (!done) return std::unexpected(done.error());
  if (table->count > CpuidTable::capacity) return failed(KvmErrc::bad_state, operation, table->count);
  std::vector<CpuidEntry> result;
  result.reserve(table->count);
  for (const kvm_cpuid_entry2& entry : std::span(table->entries).first(table->count))
    result.push_back({.function = entry.function,
                      .index = entry.index,
                      .index_significant = (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) != 0,
                      .eax = entry.eax,
                      .ebx = entry.ebx,
                      .ecx = entry.ecx,
                      .edx = entry.edx});
  return result;
}

} // namespace cppvmm
