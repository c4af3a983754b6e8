#!/usr/bin/env python3
"""flat_kernel.py VMLINUZ FLAT: makes FLAT a bzImage of the same kernel that has nothing to decompress, for guests.

An emulated processor takes seconds to decompress a kernel, in each guest anew. FLAT has VMLINUZ's setup header, and for
its kernel the segments of the vmlinux in it, as they lie in memory, behind a jump to their entry. It is larger, is
started by the 64-bit boot protocol alone, is loaded where the vmlinux belongs and nowhere else, and nothing moves it at
random.

Sources: Linux Documentation/arch/x86/boot.rst (the header; the payload; the entry), scripts/Makefile.lib (the payload's
last 4 bytes are its size, but for gzip, whose own end is that).
"""

import gzip
import lzma
import struct
import subprocess
import sys
from pathlib import Path

SECTOR = 512
PARAGRAPH = 16
PAGE = 4096
ENTRY = 0x200  # of the 64-bit entry in what a bzImage loads
LOAD = 1
ROOM = 0x200000  # before the vmlinux, for the jump: what is loaded is aligned to that

# Offsets in the file.
SETUP_SECTS, SYSSIZE, RELOCATABLE = 0x1F1, 0x1F4, 0x234
PAYLOAD_OFFSET, PAYLOAD_LENGTH, PREF_ADDRESS, INIT_SIZE, KERNEL_INFO = 0x248, 0x24C, 0x258, 0x260, 0x268


def decompress(payload):
    """The vmlinux that is compressed in that."""
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload)
    if payload.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return subprocess.run(["zstd", "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
    sys.exit(f"flat_kernel.py: a kernel that is compressed in a way that is not known: {payload[:6].hex()}")


def segments(vmlinux):
    """The entry's address, and of each segment its address, its bytes and its size in memory."""
    if vmlinux[:5] != b"\x7fELF\x02":
        sys.exit("flat_kernel.py: what is compressed is no ELF file of 64 bits")
    entry, table = struct.unpack_from("<QQ", vmlinux, 24)
    size, count = struct.unpack_from("<HH", vmlinux, 54)
    found = []
    for each in range(count):
        header = struct.unpack_from("<IIQQQQQQ", vmlinux, table + each * size)
        kind, _, offset, _, address, in_file, in_memory, _ = header
        if kind != LOAD:
            continue
        if offset + in_file > len(vmlinux):
            sys.exit("flat_kernel.py: what is compressed ends too soon")
        found.append((address, vmlinux[offset : offset + in_file], in_memory))
    if not found:
        sys.exit("flat_kernel.py: what is compressed has nothing to load")
    return entry, sorted(found, key=lambda one: one[0])


def main(source, target):
    image = Path(source).read_bytes()
    setup_bytes = (image[SETUP_SECTS] or 4) * SECTOR + SECTOR
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    start = setup_bytes + offset
    entry, parts = segments(decompress(image[start : start + length]))

    base = parts[0][0] - ROOM
    end = max(address + in_memory for address, _, in_memory in parts)
    kernel = bytearray(-(-(max(a + len(b) for a, b, _ in parts) - base) // PARAGRAPH) * PARAGRAPH)
    kernel[ENTRY : ENTRY + 7] = struct.pack("<BI", 0xB8, entry) + b"\xff\xe0"  # mov $entry, %eax; jmp *%rax
    for address, content, _ in parts:
        kernel[address - base : address - base + len(content)] = content

    setup = bytearray(image[:setup_bytes])
    struct.pack_into("<I", setup, SYSSIZE, len(kernel) // PARAGRAPH)
    struct.pack_into("<B", setup, RELOCATABLE, 0)
    struct.pack_into("<II", setup, PAYLOAD_OFFSET, 0, 0)
    struct.pack_into("<Q", setup, PREF_ADDRESS, base)
    struct.pack_into("<I", setup, INIT_SIZE, -(-(end - base) // PAGE) * PAGE)
    struct.pack_into("<I", setup, KERNEL_INFO, 0)
    Path(target).write_bytes(setup + kernel)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.splitlines()[0])
    main(sys.argv[1], sys.argv[2])
