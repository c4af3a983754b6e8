#!/usr/bin/env python3
"""compare.py [--emulated] [--balloon UNTOLD.json TOLD.json] OFF.json ASKED.json...: runs of cppvmm-boot side by side,
one without the hypercalls and one for each way that they take; and two with a balloon target, of which one was not told
of zeroed memory. With --emulated it says that the times are those of an emulated processor.

The exit status is 1 when an answer was unsound, or when there was none.
"""

import argparse
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
    rows |= host_memory(run)
    return rows


def host_memory(run):
    """The rows of the host's memory."""
    peak = run["host_peak_bytes"]
    return {
        "host memory at its peak": "unknown" if peak is None else f"{peak / 2**20:.1f} MiB",
        "host memory at the end": f"{run['host_resident_bytes'] / 2**20:.1f} MiB",
    }


def answer(run):
    """What is said of its answer, and whether that is as it must be."""
    if not run["ranges"] or run["unsound_pages"] is None:
        return f"The guest got no answer that could be audited ({run['hypercalls']}).", False
    unsound, missed, ranges = run["unsound_pages"], run["missed_zero_pages"], len(run["ranges"])
    return (
        f"The answer ({run['hypercalls']}): {share(run['reported_pages'], run['ram_pages'])} pages of RAM are zero "
        f"already, in {ranges} range{'' if ranges == 1 else 's'}, found in {run['survey_us']:,.0f} us."
        f"\nIts audit, which read every page again: {unsound} unsound (reported, but hold data), {missed} missed (zero, "
        "but not reported)."
    ), unsound == 0


def print_table(columns):
    """Of a run that zeroes everything and of those that ask."""
    table = [("", "zeroes everything") + ("asks first",) * (len(columns) - 1)]
    table += [(row, *(one.get(row, "") for one in columns)) for row in columns[-1]]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for number, line in enumerate(table):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--balloon", nargs=2, metavar=("UNTOLD", "TOLD"), default=[])
    parser.add_argument("runs", nargs="+")
    arguments = parser.parse_args()
    runs = [load(path) for path in arguments.runs]
    print(f"\nA guest with {runs[0]['memory_bytes'] // 2**20} MiB that wants its memory zeroed:\n")
    print_table([column(run) for run in runs])
    if arguments.emulated:
        print("\nThe times are those of an emulated processor: only how they compare says something.")

    answers = [answer(run) for run in runs[1:]]
    for text, _ in answers:
        print(f"\n{text}")
    if arguments.balloon:
        balloons = [load(path) for path in arguments.balloon]
        target = balloons[-1]["balloon_target_bytes"] // 2**20
        print(f"\nThe same guest that keeps {target} MiB, and gives the rest back once it is up (0x8003):\n")
        print_table([host_memory(run) for run in balloons])
    return 0 if answers and all(good for _, good in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
