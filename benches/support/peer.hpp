#pragma once
#include "peers/vm_memory/vm_memory_peer.h"
#include <cstdint>
#include <memory>

namespace cppvmm::bench {

struct FreePeer {
  void operator()(vm_memory_peer* peer) const { vm_memory_peer_free(peer); }
};
using Peer = std::unique_ptr<vm_memory_peer, FreePeer>;

/// Null where the program was built without it.
inline Peer make_peer(std::uint64_t region_bytes, std::uint64_t pages) {
  return Peer(vm_memory_peer_new(region_bytes, pages));
}

inline constexpr const char* no_peer = "built without vm-memory, which ./dev bench builds";

} // namespace cppvmm::bench
