/* rust-vmm's vm-memory, for what is measured beside it. The loops are in Rust, so that its accesses are inlined as they
   are in a VMM that is written in Rust. */
#ifndef VM_MEMORY_PEER_H
#define VM_MEMORY_PEER_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct vm_memory_peer;

/* `count` accesses of 8 bytes to `span` bytes from byte `first` of the second region on, ascending and then from the
   start again; `span` is a power of two. */
struct vm_memory_peer_accesses {
  uint64_t first;
  uint64_t span;
  uint64_t count;
};

/* Two regions of so many bytes each, one behind the other from address 0 on, and a bitmap of `pages` pages; null where
   there is no memory for it. */
struct vm_memory_peer* vm_memory_peer_new(uint64_t region_bytes, uint64_t pages);
void vm_memory_peer_free(struct vm_memory_peer* peer);

/* With the map held: the sum of what was read. */
uint64_t vm_memory_peer_read(const struct vm_memory_peer* peer, struct vm_memory_peer_accesses accesses);
void vm_memory_peer_write(const struct vm_memory_peer* peer, struct vm_memory_peer_accesses accesses);
/* Through GuestMemoryAtomic, which is asked for the map at each access. */
uint64_t vm_memory_peer_read_current(const struct vm_memory_peer* peer, struct vm_memory_peer_accesses accesses);
void vm_memory_peer_write_current(const struct vm_memory_peer* peer, struct vm_memory_peer_accesses accesses);

/* AtomicBitmap: marks one page after the other; how many of them are marked then. */
void vm_memory_peer_mark(const struct vm_memory_peer* peer, const uint64_t* pages, uint64_t count);
uint64_t vm_memory_peer_marked(const struct vm_memory_peer* peer, const uint64_t* pages, uint64_t count);

#ifdef __cplusplus
}
#endif

#endif
