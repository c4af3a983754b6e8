#!/usr/bin/env python3
"""storm.py PROGRAM [--guests N] [--memory SIZE]: starts N of cppvmm-boot's zeroing guests at once and waits until all are
up, first such as zero all their memory, then such as ask first; prints what the two took side by side.

Without --guests, as many as fit into nine tenths of the machine's available memory when they zero all of theirs.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time

MIB = 2**20
# What a process takes beside the guest's memory.
BESIDE = 16 * MIB
SAMPLE_SECONDS = 0.02
KINDS = {"zeroes everything": ["--hypercalls", "off"], "asks first": []}


def size(text):
    """Bytes of 64M, 1GiB, 4096: as cppvmm-boot takes them."""
    match = re.fullmatch(r"([0-9]+)(?:([KMGT])(?:i?B)?)?", text, re.I)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 64M or 1G")
    return int(match[1]) << (10 * ("KMGT".index(match[2].upper()) + 1) if match[2] else 0)


def number(text):
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of guests")
    return int(text)


def fitting(free, memory):
    """How many guests that zero all their memory are no more than the machine has room for."""
    return free * 9 // 10 // (memory + BESIDE)


def available():
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(re.search(r"^MemAvailable: +([0-9]+) kB$", file.read(), re.M)[1]) * 1024


class LeastAvailable(threading.Thread):
    """Looks at the machine's available memory until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.least = available()
        self.over = threading.Event()

    def run(self):
        while not self.over.wait(SAMPLE_SECONDS):
            self.least = min(self.least, available())


def own_seconds():
    """Processor time of the processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def storm(program, guests, memory, options, folder):
    """{row: text}; a line for a person when a guest fails."""
    before, watch, seconds = available(), LeastAvailable(), own_seconds()
    command = [program, "--memory", str(memory), *options, "--json"]
    running = []
    watch.start()
    start = time.monotonic()
    try:
        for guest in range(guests):
            with open(folder / f"{guest}.log", "wb") as log:
                running.append(subprocess.Popen([*command, folder / f"{guest}.json"], stdin=subprocess.DEVNULL,
                                                stdout=subprocess.DEVNULL, stderr=log))
        for guest, process in enumerate(running):
            if process.wait() != 0:
                why = (folder / f"{guest}.log").read_text(errors="replace").strip().splitlines() or ["no word"]
                sys.exit(f"storm: guest {guest + 1} of {guests} ended with status {process.returncode}: {why[-1]}")
        wall = time.monotonic() - start
    finally:
        watch.over.set()
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
        watch.join()
    figures = [json.loads((folder / f"{guest}.json").read_text()) for guest in range(guests)]
    peaks = [one["host_peak_bytes"] for one in figures]
    return {
        "host memory, the guests' peaks added up": "unknown" if None in peaks else f"{sum(peaks) / MIB:,.1f} MiB",
        "least available memory, below that before": f"{(before - watch.least) / MIB:,.1f} MiB",
        "processor time of the vCPUs": f"{sum(sum(one['vcpu_us']) for one in figures) / 1e6:,.2f} s",
        "processor time of the processes": f"{own_seconds() - seconds:,.2f} s",
        "until the last guest was up and gone": f"{wall:,.2f} s",
    }


def main():
    parser = argparse.ArgumentParser(prog="storm")
    parser.add_argument("program")
    parser.add_argument("--guests", type=number, metavar="N")
    parser.add_argument("--memory", type=size, default=512 * MIB, metavar="SIZE")
    arguments = parser.parse_args()
    guests = arguments.guests or fitting(available(), arguments.memory)
    if guests == 0:
        sys.exit(f"storm: not one guest of {arguments.memory // MIB} MiB fits into the {available() // MIB} MiB available")
    columns = []
    for kind, options in KINDS.items():
        print(f"{guests} x {arguments.memory / MIB:g} MiB: {kind} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="storm-") as folder:
            columns.append(storm(arguments.program, guests, arguments.memory, options, pathlib.Path(folder)))
    table = [("", *KINDS)] + [(row, *(column[row] for column in columns)) for row in columns[0]]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    print(f"\n{guests} x {arguments.memory / MIB:g} MiB at once, {os.cpu_count()} processors, Linux {os.uname().release}:\n")
    for line_number, line in enumerate(table):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
        if line_number == 0:
            print("  ".join("-" * width for width in widths))


if __name__ == "__main__":
    main()
