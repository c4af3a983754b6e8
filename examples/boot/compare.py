#!/usr/bin/env python3
"""compare.py OFF.json ASKED.json: two runs of cppvmm-boot side by side, one without the hypercalls and one with them.

The exit status is 1 when the second run's answer was unsound, or when there was none.
"""

import json
import sys


def share(part, whole):
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)"


def seconds(run, vcpu, which):
    ticks = run["vcpu_ticks"][vcpu]
    return "unknown" if ticks is None else f"{ticks[which] / run['ticks_per_second']:.2f} s"


def column(run):
    """{row: text} of one run."""
    asked = ", ".join(f"{call} {times}x" for call, times in run["calls"].items() if times)
    rows = {"hypercalls": run["hypercalls"] + (f" ({asked})" if asked else "")}
    for vcpu in range(run["cpus"]):
        rows[f"vCPU {vcpu}: user time"] = seconds(run, vcpu, 0)
        rows[f"vCPU {vcpu}: system time"] = seconds(run, vcpu, 1)
    rows["pages the guest zeroed itself"] = share(run["guest_zeroed_pages"], run["ram_pages"])
    rows["host memory at the end"] = f"{run['host_resident_bytes'] / 2**20:.1f} MiB"
    return rows


def main():
    off, asked = (json.load(open(path, encoding="utf-8")) for path in sys.argv[1:3])
    titles = ("", "zeroes everything", "asks first")
    columns = [column(off), column(asked)]
    table = [titles] + [(row, columns[0].get(row, ""), text) for row, text in columns[1].items()]
    widths = [max(len(line[i]) for line in table) for i in range(3)]
    print(f"\nA guest with {asked['memory_bytes'] // 2**20} MiB that wants its memory zeroed:\n")
    for number, line in enumerate(table):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))

    if not asked["ranges"] or asked["unsound_pages"] is None:
        print("\nThe guest got no answer that could be audited.")
        return 1
    unsound, missed, ranges = asked["unsound_pages"], asked["missed_zero_pages"], len(asked["ranges"])
    print(
        f"\nThe answer: {share(asked['reported_pages'], asked['ram_pages'])} pages of RAM are zero already, in "
        f"{ranges} range{'' if ranges == 1 else 's'}, found in {asked['survey_us']:,.0f} us."
        f"\nIts audit, which read every page again: {unsound} unsound (reported, but hold data), {missed} missed (zero, "
        "but not reported)."
    )
    return 0 if unsound == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
