//! See vm_memory_peer.h.

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

const PAGE: usize = 4096;

pub struct Peer {
    start: u64,
    map: GuestMemoryMmap<()>,
    current: GuestMemoryAtomic<GuestMemoryMmap<()>>,
    bitmap: AtomicBitmap,
}

fn make(region_bytes: u64, pages: u64) -> Option<Peer> {
    let size = usize::try_from(region_bytes).ok()?;
    let ranges = [(GuestAddress(0), size), (GuestAddress(region_bytes), size)];
    let map = GuestMemoryMmap::<()>::from_ranges(&ranges).ok()?;
    Some(Peer {
        start: region_bytes,
        current: GuestMemoryAtomic::new(map.clone()),
        map,
        // The size of a page is a usize in some versions, and a NonZeroUsize in others.
        #[allow(clippy::useless_conversion)]
        bitmap: AtomicBitmap::new(usize::try_from(pages).ok()? * PAGE, PAGE.try_into().ok()?),
    })
}

/// Which bytes are accessed: see vm_memory_peer.h.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Accesses {
    first: u64,
    span: u64,
    count: u64,
}

impl Accesses {
    fn at(&self, peer: &Peer, i: u64) -> GuestAddress {
        GuestAddress(peer.start + self.first + (i * 8 & (self.span - 1)))
    }
}

#[no_mangle]
pub extern "C" fn vm_memory_peer_new(region_bytes: u64, pages: u64) -> *mut Peer {
    match make(region_bytes, pages) {
        Some(peer) => Box::into_raw(Box::new(peer)),
        None => std::ptr::null_mut(),
    }
}

/// # Safety
/// `peer` is one of vm_memory_peer_new, or null, and is used no more.
#[no_mangle]
pub unsafe extern "C" fn vm_memory_peer_free(peer: *mut Peer) {
    if !peer.is_null() {
        drop(Box::from_raw(peer));
    }
}

#[no_mangle]
pub extern "C" fn vm_memory_peer_read(peer: &Peer, accesses: Accesses) -> u64 {
    (0..accesses.count).fold(0, |sum: u64, i| sum.wrapping_add(peer.map.read_obj(accesses.at(peer, i)).unwrap()))
}

#[no_mangle]
pub extern "C" fn vm_memory_peer_write(peer: &Peer, accesses: Accesses) {
    for i in 0..accesses.count {
        peer.map.write_obj(i, accesses.at(peer, i)).unwrap();
    }
}

#[no_mangle]
pub extern "C" fn vm_memory_peer_read_current(peer: &Peer, accesses: Accesses) -> u64 {
    (0..accesses.count).fold(0, |sum: u64, i| sum.wrapping_add(peer.current.memory().read_obj(accesses.at(peer, i)).unwrap()))
}

#[no_mangle]
pub extern "C" fn vm_memory_peer_write_current(peer: &Peer, accesses: Accesses) {
    for i in 0..accesses.count {
        peer.current.memory().write_obj(i, accesses.at(peer, i)).unwrap();
    }
}

/// # Safety
/// `pages` are `count` numbers.
#[no_mangle]
pub unsafe extern "C" fn vm_memory_peer_mark(peer: &Peer, pages: *const u64, count: u64) {
    for page in std::slice::from_raw_parts(pages, count as usize) {
        peer.bitmap.mark_dirty(*page as usize * PAGE, PAGE);
    }
}

/// # Safety
/// `pages` are `count` numbers.
#[no_mangle]
pub unsafe extern "C" fn vm_memory_peer_marked(peer: &Peer, pages: *const u64, count: u64) -> u64 {
    let pages = std::slice::from_raw_parts(pages, count as usize);
    pages.iter().filter(|page| peer.bitmap.dirty_at(**page as usize * PAGE)).count() as u64
}
