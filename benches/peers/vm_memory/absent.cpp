// For programs that are built without the peer: there is none to be made.
#include "vm_memory_peer.h"

vm_memory_peer* vm_memory_peer_new(uint64_t, uint64_t) { return nullptr; }
void vm_memory_peer_free(vm_memory_peer*) {}
uint64_t vm_memory_peer_read(const vm_memory_peer*, vm_memory_peer_accesses) { return 0; }
void vm_memory_peer_write(const vm_memory_peer*, vm_memory_peer_accesses) {}
uint64_t vm_memory_peer_read_current(const vm_memory_peer*, vm_memory_peer_accesses) { return 0; }
void vm_memory_peer_write_current(const vm_memory_peer*, vm_memory_peer_accesses) {}
void vm_memory_peer_mark(const vm_memory_peer*, const uint64_t*, uint64_t) {}
uint64_t vm_memory_peer_marked(const vm_memory_peer*, const uint64_t*, uint64_t) { return 0; }
