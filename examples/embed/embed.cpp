// The smallest custom VMM that answers Hyper-V's extended hypercalls: its KVM code is its own, cppvmm brings the guest
// memory and the answers. What a VMM with an exit loop of its own has to add is marked (1) to (4).
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fcntl.h>
#include <linux/kvm.h>
#include <span>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <system_error>
import cppvmm.guest_memory;
import cppvmm.hv_ext;

using namespace cppvmm;

// The guest, in 64-bit code: GUEST_OS_ID = 1; HYPERCALL = page 5 and the enable bit; HvExtCallGetBootZeroedMemory
// through that page with its output at 0x6000; HLT.
asm(".section .rodata\n"
    "guest: mov $0x40000000, %ecx; mov $1, %eax; xor %edx, %edx; wrmsr\n"
    "  mov $0x40000001, %ecx; mov $0x5001, %eax; wrmsr\n"
    "  mov $0x8002, %ecx; mov $0x6000, %r8d; mov $0x5000, %eax; call *%rax; hlt\n"
    "guest_end: .text\n");
extern "C" const std::byte guest[], guest_end[];

namespace {
constexpr std::uint64_t tables = 0x1000, code = 0x4000, output = 0x6000, stack_top = 0x8000, port = 0xE4;

// struct kvm_cpuid2, whose flexible array some kernel headers lay out otherwise in C++ than in C, and its ioctls.
struct Cpuid {
  std::uint32_t count = 0, padding = 0;
  kvm_cpuid_entry2 entries[256] = {};
};
constexpr unsigned long get_supported_cpuid = _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0x05, 8);
constexpr unsigned long set_cpuid2 = _IOC(_IOC_WRITE, KVMIO, 0x90, 8);

int check(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}
} // namespace

int main() try {
  const int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "cannot open /dev/kvm");
  const int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
  const Region ram = value_or_throw(Region::anonymous(GuestAddress(0), std::uint64_t{32} << 20));
  GuestMemory memory(value_or_throw(MemoryMap::make({ram})));
  const kvm_userspace_memory_region slot{0, 0, 0, ram.bytes(), reinterpret_cast<std::uint64_t>(ram.host_address())};
  check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");

  // (1) Own the Hyper-V MSRs: every access to one whose bit is 0 in the bitmap becomes an exit.
  std::array<std::uint8_t, 64> bitmap{};
  kvm_msr_filter filter{};
  filter.ranges[0] = {KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, bitmap.size() * 8, hv_msr_guest_os_id, bitmap.data()};
  const kvm_enable_cap exits{KVM_CAP_X86_USER_SPACE_MSR, 0, {KVM_MSR_EXIT_REASON_FILTER}, {}};
  check(ioctl(vm, KVM_ENABLE_CAP, &exits), "KVM_CAP_X86_USER_SPACE_MSR");
  check(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), "KVM_X86_SET_MSR_FILTER");

  // (2) Make the two that answer. The hypercall page begins with: out %al, $port; ret.
  auto hypercalls = value_or_throw(ExtendedHypercalls::create(memory));
  HypervInterface hyperv(memory, std::array{std::byte{0xE6}, std::byte{port}, std::byte{0xC3}});

  // (3) Show the guest Hyper-V's CPUID leaves in the place of KVM's. (They want leaf 1's ECX[31], too.)
  const int vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
  Cpuid cpuid{.count = 200}; // leaves room for Hyper-V's
  check(ioctl(kvm, get_supported_cpuid, &cpuid), "KVM_GET_SUPPORTED_CPUID");
  for (const auto& leaf : hv_cpuid_leaves(hypercalls.options())) {
    auto* const end = cpuid.entries + cpuid.count;
    auto* entry = std::find_if(cpuid.entries, end, [&](const auto& e) { return e.function == leaf.function; });
    if (entry == end) ++cpuid.count;
    *entry = {leaf.function, 0, 0, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx, {}};
  }
  for (auto& entry : cpuid.entries)
    entry.ecx |= entry.function == 1 ? 1U << 31 : 0;
  check(ioctl(vcpu, set_cpuid2, &cpuid), "KVM_SET_CPUID2");

  // The guest's code, page tables that map 2 MiB to themselves, and the vCPU in 64-bit mode.
  value_or_throw(memory.load(GuestAddress(code), std::span(guest, guest_end)));
  value_or_throw(memory.write_value(GuestAddress(tables), tables + 0x1003));
  value_or_throw(memory.write_value(GuestAddress(tables + 0x1000), tables + 0x2003));
  value_or_throw(memory.write_value(GuestAddress(tables + 0x2000), std::uint64_t{0x83}));
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

  while (check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN") == 0 && run->exit_reason != KVM_EXIT_HLT) { // (4) Answer the exits.
    if (run->exit_reason == KVM_EXIT_X86_WRMSR) {
      run->msr.error = hyperv.write_msr(run->msr.index, run->msr.data) ? 0 : 1; // 1: #GP
    } else if (run->exit_reason == KVM_EXIT_X86_RDMSR) {
      const auto value = hyperv.read_msr(0, run->msr.index);
      run->msr.error = value ? 0 : 1, run->msr.data = value.value_or(0);
    } else if (run->exit_reason == KVM_EXIT_IO && run->io.port == port) {
      check(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
      check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
      const bool long_mode = (sregs.efer & 0x400) != 0 && sregs.cs.l != 0;
      HvCallRegisters used{regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.r8};
      const auto result = hypercalls.handle(hv_call(used, long_mode, sregs.ss.dpl));
      if (!result && result.error() == HvNoResult::undefined_opcode)
        return std::fputs("hypercall from CPL 3: #UD, for a guest that has such code\n", stderr), 1;
      // A call that is not ours is the VMM's to answer; this one has none.
      set_hv_result(used, long_mode, result.value_or(hv_result(HvStatus::invalid_hypercall_code)));
      regs.rax = used.rax, regs.rdx = used.rdx;
      check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    } else {
      return std::fprintf(stderr, "unexpected exit %u\n", run->exit_reason), 1;
    }
  }
  check(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
  const auto answer = value_or_throw(memory.read_value<std::array<std::uint64_t, 3>>(GuestAddress(output)));
  std::printf("status %llu: %lu ranges, first %lu pages from page %lu on\n", regs.rax, answer[0], answer[2], answer[1]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
