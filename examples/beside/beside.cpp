// A VMM with KVM code of its own that shows its guest all of KVM's Hyper-V already, and what it adds to answer extended
// hypercalls where KVM forwards them: the twelve lines that end in a plus.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <system_error>
import cppvmm.guest_memory; // +
import cppvmm.hv_calls;     // +

// The guest, in 64-bit code: GUEST_OS_ID = 1; HYPERCALL = page 5 and the enable bit; KVM's TIME_REF_COUNT; through the
// hypercall page HvCallPostMessage, which is the VMM's, and HvExtCallGetBootZeroedMemory with its output at 0x6000.
// Each RAX goes to a port of its own.
asm(".section .rodata\n"
    "guest: mov $0x40000000, %ecx; mov $1, %eax; xor %edx, %edx; wrmsr\n"
    "  mov $0x40000001, %ecx; mov $0x5001, %eax; wrmsr\n"
    "  mov $0x40000020, %ecx; rdmsr; out %eax, $0x10\n"
    "  mov $0x5c, %ecx; xor %edx, %edx; xor %r8d, %r8d; mov $0x5000, %eax; call *%rax; out %eax, $0x11\n"
    "  mov $0x8002, %ecx; mov $0x6000, %r8d; mov $0x5000, %eax; call *%rax; out %eax, $0x12\n"
    "guest_end: .text\n");
extern "C" const std::byte guest[], guest_end[];

namespace {
constexpr std::uint64_t bytes = 32 << 20, tables = 0x1000, code = 0x4000, output = 0x6000, stack_top = 0x8000;
constexpr std::uint64_t invalid_hypercall_code = 2;

// struct kvm_cpuid2, whose flexible array some kernel headers lay out otherwise in C++ than in C, and its ioctls.
struct Cpuid {
  std::uint32_t count = 0, padding = 0;
  kvm_cpuid_entry2 entries[256] = {};
};
constexpr unsigned long get_supported_cpuid = _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0x05, 8);
constexpr unsigned long get_supported_hv_cpuid = _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0xC1, 8);
constexpr unsigned long set_cpuid2 = _IOC(_IOC_WRITE, KVMIO, 0x90, 8);

int check(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

/// CPUID with all of KVM's Hyper-V in the place of KVM's own leaves, under the vendor by which guests know it.
Cpuid full_cpuid(int kvm, int vcpu) {
  Cpuid all{.count = 128};
  check(ioctl(kvm, get_supported_cpuid, &all), "KVM_GET_SUPPORTED_CPUID");
  auto* const kept =
      std::remove_if(all.entries, all.entries + all.count, [](const auto& e) { return e.function >> 28 == 4; });
  all.count = static_cast<std::uint32_t>(kept - all.entries);
  for (auto& entry : all.entries)
    entry.ecx |= entry.function == 1 ? 1U << 31 : 0;
  Cpuid hyperv{.count = 64};
  check(ioctl(vcpu, get_supported_hv_cpuid, &hyperv), "KVM_GET_SUPPORTED_HV_CPUID: this KVM has no Hyper-V");
  for (std::uint32_t i = 0; i < hyperv.count; ++i) {
    auto& entry = all.entries[all.count++] = hyperv.entries[i];
    if (entry.function == 0x4000'0000) std::memcpy(&entry.ebx, "Microsoft Hv", 12);
  }
  return all;
}
} // namespace

int main() try {
  const int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "cannot open /dev/kvm");
  const int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
  check(ioctl(vm, KVM_SET_TSS_ADDR, 0xFFFB'D000), "KVM_SET_TSS_ADDR");
  check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
  auto* const ram = static_cast<std::byte*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  check(ram == MAP_FAILED ? -1 : 0, "mmap");
  const kvm_userspace_memory_region slot{0, 0, 0, bytes, reinterpret_cast<std::uint64_t>(ram)};
  check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
  using namespace cppvmm;                                                                                 // +
  const Region region = value_or_throw(Region::adopt(GuestAddress(0), {ram, bytes, Backing::anonymous})); // +
  const GuestMemory memory(value_or_throw(MemoryMap::make({region})));                                    // +
  auto hypercalls = value_or_throw(ExtendedHypercalls::create(memory));                                   // +

  const int vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
  const kvm_enable_cap synic{KVM_CAP_HYPERV_SYNIC2, 0, {}, {}};
  check(ioctl(vcpu, KVM_ENABLE_CAP, &synic), "KVM_CAP_HYPERV_SYNIC2: this KVM has no Hyper-V");
  Cpuid cpuid = full_cpuid(kvm, vcpu);
  auto* const features = std::ranges::find(cpuid.entries, 0x4000'0003U, &kvm_cpuid_entry2::function);
  if ((features->ebx & hv_feature_ebx_extended_hypercalls) == 0)                                         // +
    return std::fputs("KVM forwards no extended hypercalls: cppvmm.hv_ext has other ways\n", stderr), 1; // +
  check(ioctl(vcpu, set_cpuid2, &cpuid), "KVM_SET_CPUID2");

  // The guest's code, page tables that map 2 MiB to themselves, and the vCPU in 64-bit mode.
  const std::array<std::uint64_t, 3> entries = {tables + 0x1003, tables + 0x2003, 0x83};
  for (std::size_t i = 0; i < entries.size(); ++i)
    std::memcpy(ram + tables + 0x1000 * i, &entries[i], sizeof entries[i]);
  std::copy(guest, guest_end, ram + code);
  kvm_sregs sregs;
  check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
  sregs.cs = {0, ~0U, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0};                       // 64-bit code
  sregs.ds = sregs.es = sregs.ss = {0, ~0U, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0}; // writable data
  sregs.cr0 = 0x8001'0033, sregs.cr3 = tables, sregs.cr4 = 0x20, sregs.efer = 0x500;
  check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
  kvm_regs regs{};
  regs.rip = code, regs.rsp = stack_top, regs.rflags = 2;
  check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
  auto* run = static_cast<kvm_run*>(mmap(nullptr, sizeof(kvm_run), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0));
  check(run == MAP_FAILED ? -1 : 0, "mmap");

  for (;;) {
    check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
    if (run->exit_reason == KVM_EXIT_HYPERV && run->hyperv.type == KVM_EXIT_HYPERV_HCALL) {
      auto& call = run->hyperv.u.hcall;
      const GuestAddress input(call.params[0]), to(call.params[1]);                                 // +
      const auto result = hypercalls.handle({.control = call.input, .input = input, .output = to}); // +
      call.result = result.value_or(0);                                                             // +
      if (result) continue;                                                                         // +
      call.result = invalid_hypercall_code; // a call of the VMM's own, which it has not
      std::printf("a hypercall of the VMM's own: 0x%llx\n", call.input);
    } else if (run->exit_reason == KVM_EXIT_IO) {
      check(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
      if (run->io.port == 0x10) std::printf("KVM's reference time %s\n", regs.rax != 0 ? "runs" : "stands");
      if (run->io.port == 0x12) break;
    } else {
      return std::fprintf(stderr, "unexpected exit %u\n", run->exit_reason), 1;
    }
  }
  std::array<std::uint64_t, 3> answer;
  std::memcpy(answer.data(), ram + output, sizeof answer);
  std::printf("status %llu: %lu ranges, first %lu pages from page %lu on\n", regs.rax, answer[0], answer[2], answer[1]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
