module;
#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cpuid.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fault_table.hpp"
module cppvmm.guest_memory:guest_copy.impl;
import :address;
import :descriptor;
import :error;
import :fault_guard;
import :guest_copy;

namespace cppvmm {

// include/uapi/asm-generic/mman-common.h (Linux 5.14), which the headers of older distributions lack.
static constexpr int advice_populate_read = 22;
static constexpr int advice_populate_write = 23;

static bool is_inaccessible(int error) { return error == EFAULT || error == EHWPOISON; }

MemoryErrc GuestAccess::code() const { return is_inaccessible(error) ? MemoryErrc::inaccessible : MemoryErrc::os; }

GuestReach reach_of(bool is_adopted) {
  return is_adopted && !FaultGuard::is_installed() ? GuestReach::kernel : GuestReach::plain;
}

static std::uint64_t left_in_page(const std::byte* at) {
  return page_size - reinterpret_cast<std::uintptr_t>(at) % page_size;
}

enum class Direction : std::uint8_t { from_guest, to_guest };

/// Why a byte could not be had: the kernel tells memory that was lost only where it is asked to bring it in (mm/gup.c,
/// faultin_page_range; include/linux/mm.h, vm_fault_to_errno).
static int why(const std::byte* guest, Direction direction) {
  const auto page = reinterpret_cast<std::uintptr_t>(guest) & ~(page_size - 1);
  const int advice = direction == Direction::to_guest ? advice_populate_write : advice_populate_read;
  const bool is_lost = madvise(reinterpret_cast<void*>(page), page_size, advice) != 0 && errno == EHWPOISON;
  return is_lost ? EHWPOISON : EFAULT;
}

// --- by loads and stores ---

// Single instructions that the fault table knows: on x86-64 an aligned access of up to 8 bytes is one that nothing
// tears, and a compiler leaves it where it stands.

/// False when the memory cannot be had.
template <class Word>
[[gnu::always_inline]] static inline bool load_word(Word& word, const std::byte* guest) {
  if constexpr (sizeof(Word) == 8)
    asm goto("1: movq (%1), %0\n2:\n" CPPVMM_ON_FAULT("%l2") : "=r"(word) : "r"(guest) : "memory" : fault);
  else if constexpr (sizeof(Word) == 4)
    asm goto("1: movl (%1), %0\n2:\n" CPPVMM_ON_FAULT("%l2") : "=r"(word) : "r"(guest) : "memory" : fault);
  else if constexpr (sizeof(Word) == 2)
    asm goto("1: movw (%1), %0\n2:\n" CPPVMM_ON_FAULT("%l2") : "=r"(word) : "r"(guest) : "memory" : fault);
  else
    asm goto("1: movb (%1), %0\n2:\n" CPPVMM_ON_FAULT("%l2") : "=q"(word) : "r"(guest) : "memory" : fault);
  return true;
fault:
  return false;
}

template <class Word>
[[gnu::always_inline]] static inline bool store_word(std::byte* guest, Word word) {
  if constexpr (sizeof(Word) == 8)
    asm goto("1: movq %1, (%0)\n2:\n" CPPVMM_ON_FAULT("%l2") : : "r"(guest), "r"(word) : "memory" : fault);
  else if constexpr (sizeof(Word) == 4)
    asm goto("1: movl %1, (%0)\n2:\n" CPPVMM_ON_FAULT("%l2") : : "r"(guest), "r"(word) : "memory" : fault);
  else if constexpr (sizeof(Word) == 2)
    asm goto("1: movw %1, (%0)\n2:\n" CPPVMM_ON_FAULT("%l2") : : "r"(guest), "r"(word) : "memory" : fault);
  else
    asm goto("1: movb %1, (%0)\n2:\n" CPPVMM_ON_FAULT("%l2") : : "r"(guest), "q"(word) : "memory" : fault);
  return true;
fault:
  return false;
}

/// Calls `step` with an offset and a zero of the type to access there, the widest that is aligned and fits, until it
/// returns false; how many bytes that were.
template <class Step>
[[gnu::always_inline]] static inline std::uint64_t for_each_word(const std::byte* guest, std::uint64_t bytes,
                                                                 Step step) {
  std::uint64_t done = 0;
  while (done < bytes) {
    const std::uint64_t left = bytes - done;
    const auto address = reinterpret_cast<std::uintptr_t>(guest) + done;
    const std::uint64_t aligned = std::uint64_t{1} << std::min(std::countr_zero(address), 3);
    const std::uint64_t size = std::min(aligned, std::bit_floor(left));
    bool is_done = false;
    switch (size) {
    case 8:
      for (const std::uint64_t end = done + left / 8 * 8; done < end; done += 8)
        if (!step(done, std::uint64_t{})) return done;
      continue;
    case 4:
      is_done = step(done, std::uint32_t{});
      break;
    case 2:
      is_done = step(done, std::uint16_t{});
      break;
    default:
      is_done = step(done, std::uint8_t{});
      break;
    }
    if (!is_done) return done;
    done += size;
  }
  return done;
}

static std::uint64_t load_words(std::byte* into, const std::byte* guest, std::uint64_t bytes) {
  return for_each_word(guest, bytes, [&]<class Word>(std::uint64_t at, Word word) {
    if (!load_word(word, guest + at)) return false;
    std::memcpy(into + at, &word, sizeof word);
    return true;
  });
}

static std::uint64_t store_words(std::byte* guest, const std::byte* from, std::uint64_t bytes) {
  return for_each_word(guest, bytes, [&]<class Word>(std::uint64_t at, Word word) {
    std::memcpy(&word, from + at, sizeof word);
    return store_word(guest + at, word);
  });
}

// Of many bytes, as many at once as every machine can: where an access of a block faults, its words tell at which byte.

constexpr std::uint64_t block = 64;

[[gnu::always_inline]] static inline bool load_block(std::byte* into, const std::byte* guest) {
  asm goto(
      "1: movdqu (%1), %%xmm0\n movdqu 16(%1), %%xmm1\n movdqu 32(%1), %%xmm2\n movdqu 48(%1), %%xmm3\n2:\n"
      "movdqu %%xmm0, (%0)\n movdqu %%xmm1, 16(%0)\n movdqu %%xmm2, 32(%0)\n movdqu %%xmm3, 48(%0)\n" CPPVMM_ON_FAULT(
          "%l2")
      :
      : "r"(into), "r"(guest)
      : "xmm0", "xmm1", "xmm2", "xmm3", "memory"
      : fault);
  return true;
fault:
  return false;
}

[[gnu::always_inline]] static inline bool store_block(std::byte* guest, const std::byte* from) {
  asm goto("movdqu (%1), %%xmm0\n movdqu 16(%1), %%xmm1\n movdqu 32(%1), %%xmm2\n movdqu 48(%1), %%xmm3\n"
           "1: movdqu %%xmm0, (%0)\n movdqu %%xmm1, 16(%0)\n movdqu %%xmm2, 32(%0)\n movdqu %%xmm3, "
           "48(%0)\n2:\n" CPPVMM_ON_FAULT("%l2")
           :
           : "r"(guest), "r"(from)
           : "xmm0", "xmm1", "xmm2", "xmm3", "memory"
           : fault);
  return true;
fault:
  return false;
}

// And as many as those can that have AVX. The compiler makes no use of it here, and expects nothing in the upper
// halves.

constexpr std::uint64_t wide_block = 128;

static bool has_wide_blocks(std::uint64_t bytes) { return bytes >= wide_block && __builtin_cpu_supports("avx"); }

[[gnu::always_inline]] static inline bool load_wide_block(std::byte* into, const std::byte* guest) {
  asm goto("1: vmovdqu (%1), %%ymm0\n vmovdqu 32(%1), %%ymm1\n vmovdqu 64(%1), %%ymm2\n vmovdqu 96(%1), %%ymm3\n2:\n"
           "vmovdqu %%ymm0, (%0)\n vmovdqu %%ymm1, 32(%0)\n vmovdqu %%ymm2, 64(%0)\n vmovdqu %%ymm3, "
           "96(%0)\n" CPPVMM_ON_FAULT("%l2")
           :
           : "r"(into), "r"(guest)
           : "xmm0", "xmm1", "xmm2", "xmm3", "memory"
           : fault);
  return true;
fault:
  return false;
}

[[gnu::always_inline]] static inline bool store_wide_block(std::byte* guest, const std::byte* from) {
  asm goto("vmovdqu (%1), %%ymm0\n vmovdqu 32(%1), %%ymm1\n vmovdqu 64(%1), %%ymm2\n vmovdqu 96(%1), %%ymm3\n"
           "1: vmovdqu %%ymm0, (%0)\n vmovdqu %%ymm1, 32(%0)\n vmovdqu %%ymm2, 64(%0)\n vmovdqu %%ymm3, "
           "96(%0)\n2:\n" CPPVMM_ON_FAULT("%l2")
           :
           : "r"(guest), "r"(from)
           : "xmm0", "xmm1", "xmm2", "xmm3", "memory"
           : fault);
  return true;
fault:
  return false;
}

/// How many bytes of whole blocks there were.
[[gnu::noinline]] static std::uint64_t load_wide_blocks(std::byte* into, const std::byte* guest, std::uint64_t bytes) {
  std::uint64_t done = 0;
  while (bytes - done >= wide_block && load_wide_block(into + done, guest + done))
    done += wide_block;
  asm volatile("vzeroupper");
  return done;
}

[[gnu::noinline]] static std::uint64_t store_wide_blocks(std::byte* guest, const std::byte* from, std::uint64_t bytes) {
  std::uint64_t done = 0;
  while (bytes - done >= wide_block && store_wide_block(guest + done, from + done))
    done += wide_block;
  asm volatile("vzeroupper");
  return done;
}

// And all of them where the processor does that itself as fast as it can (fast short REP MOVSB). Some of AMD's slow
// down where the two sides are not aligned alike (glibc's bug 30994), so that these copy by blocks.

static bool has_fast_strings() {
  static const bool has = [] {
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    constexpr unsigned fast_short_rep_movsb = 1U << 4; // Intel SDM, CPUID leaf 7
    return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & fast_short_rep_movsb) != 0;
  }();
  return has;
}

/// How many bytes were copied before one of either side faulted. Of the two, the words that come next tell which.
[[gnu::noinline]] static std::uint64_t copy_string(std::byte* into, const std::byte* from, std::uint64_t bytes) {
  std::uint64_t left = bytes;
  asm goto("1: rep movsb\n2:\n" CPPVMM_ON_FAULT("%l[fault]") : "+D"(into), "+S"(from), "+c"(left) : : "memory" : fault);
  return bytes;
fault:
  return bytes - left;
}

/// How many bytes were copied; none where blocks do as well.
static std::uint64_t copy_string_if_fast(std::byte* into, const std::byte* from, std::uint64_t bytes) {
  constexpr std::uint64_t fewest = 2048;
  return bytes >= fewest && has_fast_strings() ? copy_string(into, from, bytes) : 0;
}

// What is read is copied faster by the 64 bytes that AVX-512 loads at once, where it has this as well: such processors
// do not slow down for it.

constexpr std::uint64_t widest_block = 256;

static bool has_widest_blocks() {
  static const bool has = __builtin_cpu_supports("avx512f") && has_fast_strings();
  return has;
}

[[gnu::always_inline]] static inline bool load_widest_block(std::byte* into, const std::byte* guest) {
  asm goto("1: vmovdqu64 (%1), %%zmm0\n vmovdqu64 64(%1), %%zmm1\n vmovdqu64 128(%1), %%zmm2\n vmovdqu64 192(%1), "
           "%%zmm3\n2:\n vmovdqu64 %%zmm0, (%0)\n vmovdqu64 %%zmm1, 64(%0)\n vmovdqu64 %%zmm2, 128(%0)\n vmovdqu64 "
           "%%zmm3, 192(%0)\n" CPPVMM_ON_FAULT("%l2")
           :
           : "r"(into), "r"(guest)
           : "xmm0", "xmm1", "xmm2", "xmm3", "memory"
           : fault);
  return true;
fault:
  return false;
}

[[gnu::noinline]] static std::uint64_t load_widest_blocks(std::byte* into, const std::byte* guest,
                                                          std::uint64_t bytes) {
  std::uint64_t done = 0;
  while (bytes - done >= widest_block && load_widest_block(into + done, guest + done))
    done += widest_block;
  asm volatile("vzeroupper");
  return done;
}

[[gnu::noinline]] static std::uint64_t load_many(std::byte* into, const std::byte* guest, std::uint64_t bytes) {
  std::uint64_t done = bytes >= widest_block && has_widest_blocks() ? load_widest_blocks(into, guest, bytes)
                                                                    : copy_string_if_fast(into, guest, bytes);
  if (has_wide_blocks(bytes - done)) done += load_wide_blocks(into + done, guest + done, bytes - done);
  while (bytes - done >= block && load_block(into + done, guest + done))
    done += block;
  return done + load_words(into + done, guest + done, bytes - done);
}

static std::uint64_t load_from_guest(std::byte* into, const std::byte* guest, std::uint64_t bytes) {
  return bytes < block ? load_words(into, guest, bytes) : load_many(into, guest, bytes);
}

[[gnu::noinline]] static std::uint64_t store_many(std::byte* guest, const std::byte* from, std::uint64_t bytes) {
  std::uint64_t done = copy_string_if_fast(guest, from, bytes);
  if (has_wide_blocks(bytes - done)) done += store_wide_blocks(guest + done, from + done, bytes - done);
  while (bytes - done >= block && store_block(guest + done, from + done))
    done += block;
  return done + store_words(guest + done, from + done, bytes - done);
}

static std::uint64_t store_to_guest(std::byte* guest, const std::byte* from, std::uint64_t bytes) {
  return bytes < block ? store_words(guest, from, bytes) : store_many(guest, from, bytes);
}

static std::uint64_t store_zeros(std::byte* guest, std::uint64_t bytes) {
  return for_each_word(guest, bytes,
                       [&]<class Word>(std::uint64_t at, Word zero) { return store_word(guest + at, zero); });
}

static GuestAccess plain_result(std::uint64_t done, std::uint64_t bytes, const std::byte* guest, Direction direction) {
  return {.done = done, .error = done == bytes ? 0 : why(guest + done, direction)};
}

// --- through the kernel ---

/// Memory of ours to copy from or to; or, where it is cleared, zeros in any number.
struct Local {
  std::byte* bytes = nullptr; ///< Null: zeros.

  static constexpr std::size_t most_parts = 16;
  struct Parts {
    std::array<iovec, most_parts> vectors;
    std::size_t count = 0;
    std::uint64_t bytes = 0;
  };
  /// From `at` on, up to `bytes`.
  [[nodiscard]] Parts parts(std::uint64_t at, std::uint64_t wanted) const;
};

alignas(page_size) static constexpr std::array<std::byte, page_size> zeros{};

Local::Parts Local::parts(std::uint64_t at, std::uint64_t wanted) const {
  Parts parts;
  if (bytes != nullptr) {
    parts.vectors[0] = {.iov_base = bytes + at, .iov_len = wanted};
    parts.count = 1;
    parts.bytes = wanted;
    return parts;
  }
  while (parts.bytes < wanted && parts.count < most_parts) {
    const std::uint64_t part = std::min<std::uint64_t>(page_size, wanted - parts.bytes);
    // Only read: system calls' vectors know no const.
    parts.vectors[parts.count++] = {.iov_base = const_cast<std::byte*>(zeros.data()), .iov_len = part};
    parts.bytes += part;
  }
  return parts;
}

/// What it says is like read(2): this thread's own id, for the process's first thread may have ended, and its memory
/// be gone with it (mm/process_vm_access.c, mm_access).
static ssize_t process_vm(Direction direction, const Local::Parts& local, std::byte* guest) {
  const iovec remote{.iov_base = guest, .iov_len = local.bytes};
  return direction == Direction::from_guest
             ? process_vm_readv(gettid(), local.vectors.data(), local.count, &remote, 1, 0)
             : process_vm_writev(gettid(), local.vectors.data(), local.count, &remote, 1, 0);
}

/// Copies by a pipe of its own: slower, but the kernel accesses memory then as any system call accesses its arguments.
/// For what process_vm_readv cannot reach (device memory), and where a filter of system calls forbids it.
class PipeCopy {
public:
  /// 0, or what errno says. At most the rest of a page of the guest.
  int copy(Direction direction, const Local::Parts& local, std::byte* guest) {
    if (!out_.is_open()) {
      int ends[2];
      if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return errno;
      out_ = Descriptor(ends[0]);
      in_ = Descriptor(ends[1]);
    }
    const iovec guest_part{.iov_base = guest, .iov_len = local.bytes};
    const bool is_read = direction == Direction::from_guest;
    const iovec* const ours = local.vectors.data();
    const int count = static_cast<int>(local.count);
    const auto wanted = static_cast<ssize_t>(local.bytes);
    if (const ssize_t written = is_read ? writev(in_.number(), &guest_part, 1) : writev(in_.number(), ours, count);
        written != wanted)
      return written < 0 ? errno : EFAULT;
    if (const ssize_t read = is_read ? readv(out_.number(), ours, count) : readv(out_.number(), &guest_part, 1);
        read != wanted) {
      const int error = read < 0 ? errno : EFAULT;
      // What is in it must not come first when the copy is tried again.
      out_ = Descriptor();
      in_ = Descriptor();
      return error;
    }
    return 0;
  }

private:
  Descriptor out_;
  Descriptor in_;
};

static GuestAccess copy_by_kernel(Direction direction, const Local& local, std::byte* guest, std::uint64_t bytes) {
  PipeCopy pipe;
  bool by_pipe = false;
  bool by_page = false;
  for (std::uint64_t done = 0; done < bytes;) {
    std::byte* const at = guest + done;
    const std::uint64_t in_page = std::min(bytes - done, left_in_page(at));
    int refused = 0;
    if (!by_pipe) {
      const Local::Parts parts = local.parts(done, by_page ? in_page : bytes - done);
      const ssize_t copied = process_vm(direction, parts, at);
      if (copied > 0) {
        const auto count = static_cast<std::uint64_t>(copied);
        // The kernel pins pages and writes through its own mapping: memory that is write-protected in between (a write
        // watch that is armed just then) would not tell that it was written. A store through ours is what it sees.
        if (direction == Direction::to_guest && local.bytes != nullptr)
          if (const GuestAccess stored = probe_guest(at, count); stored.error != 0)
            return {.done = done + stored.done, .error = stored.error};
        done += count;
        continue;
      }
      refused = copied < 0 ? errno : EFAULT;
      if (refused == EINTR) continue;
      if (parts.bytes > in_page) {
        // The pages before the one that cannot be had count, whether or not the kernel went as far as to them.
        by_page = true;
        continue;
      }
    }
    int error = pipe.copy(direction, local.parts(done, in_page), at);
    if (error == EINTR) continue;
    if (error != 0 && refused == EFAULT) error = EFAULT; // whatever kept the pipe from being made
    if (error != 0) return {.done = done, .error = error == EFAULT ? why(at, direction) : error};
    by_pipe = true;
    done += in_page;
  }
  return {.done = bytes};
}

GuestAccess copy_from_guest(GuestReach reach, std::byte* into, const std::byte* guest, std::uint64_t bytes) {
  if (reach == GuestReach::plain)
    return plain_result(load_from_guest(into, guest, bytes), bytes, guest, Direction::from_guest);
  // Only read: system calls' vectors know no const.
  return copy_by_kernel(Direction::from_guest, {.bytes = into}, const_cast<std::byte*>(guest), bytes);
}

GuestAccess copy_to_guest(GuestReach reach, std::byte* guest, const std::byte* from, std::uint64_t bytes) {
  if (reach == GuestReach::plain)
    return plain_result(store_to_guest(guest, from, bytes), bytes, guest, Direction::to_guest);
  return copy_by_kernel(Direction::to_guest, {.bytes = const_cast<std::byte*>(from)}, guest, bytes);
}

GuestAccess clear_guest(GuestReach reach, std::byte* guest, std::uint64_t bytes) {
  if (reach == GuestReach::plain) return plain_result(store_zeros(guest, bytes), bytes, guest, Direction::to_guest);
  return copy_by_kernel(Direction::to_guest, {}, guest, bytes);
}

GuestAccess probe_guest(std::byte* guest, std::uint64_t bytes) {
  std::uint32_t nobody = 0;
  for (std::uint64_t done = 0; done < bytes;) {
    std::byte* const at = guest + done;
    auto* const word = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(at) & ~std::uintptr_t{3});
    // *word |= 0, with the fault handled by the kernel (kernel/futex/waitwake.c, futex_wake_op). It has no other use
    // here: nobody waits for either address.
    const long result = syscall(SYS_futex, &nobody, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, nullptr, word,
                                FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_EQ, 0));
    if (result < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (result < 0) return {.done = done, .error = errno == EFAULT ? why(at, Direction::to_guest) : errno};
    done += std::min(bytes - done, left_in_page(at));
  }
  return {.done = bytes};
}

} // namespace cppvmm
