/// cppvmm.guest_memory: what memory the guest has, who may read and write it, which of its pages may hold data.
///
///     auto ram = cppvmm::Region::memfd(cppvmm::GuestAddress(0), 64 << 20);
///     auto map = cppvmm::MemoryMap::make({*ram});
///     cppvmm::GuestMemory memory(*map);
///     if (auto done = memory.write_value(cppvmm::GuestAddress(0x1000), std::uint64_t{42}); !done)
///       report(done.error());
///     for (const cppvmm::PageRange& zeroed : memory.survey().largest_zeroed(255)) use(zeroed);
export module cppvmm.guest_memory;
export import :address;
export import :backing;
export import :content_check;
export import :error;
export import :evidence;
export import :fault_guard;
export import :guest_memory;
export import :kernel_books;
export import :memory_map;
export import :page_set;
export import :region;
export import :region_use;
export import :survey;
export import :touched_map;
export import :touched_runs;
export import :toucher;
export import :write_watch;
export import :zero_scan;
