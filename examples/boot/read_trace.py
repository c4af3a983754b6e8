#!/usr/bin/env python3
"""read_trace.py [FILE]: prints what cppvmm-boot --trace wrote, a line for each event, with the names of the Hyper-V
specification (TLFS). Without FILE, or with -, standard input.

The exit status is 1 when a line is none of a trace.
"""

import json
import signal
import sys

CALLS = {
    0x5C: "HvCallPostMessage",
    0x5D: "HvCallSignalEvent",
    0x8001: "HvExtCallQueryCapabilities",
    0x8002: "HvExtCallGetBootZeroedMemory",
    0x8003: "HvExtCallMemoryHeatHint",
}
STATUSES = {
    0x0: "SUCCESS",
    0x2: "INVALID_HYPERCALL_CODE",
    0x3: "INVALID_HYPERCALL_INPUT",
    0x4: "INVALID_ALIGNMENT",
    0x5: "INVALID_PARAMETER",
    0x6: "ACCESS_DENIED",
    0x8: "OPERATION_DENIED",
    0xB: "INSUFFICIENT_MEMORY",
}
MSRS = {
    0x40000000: "GUEST_OS_ID",
    0x40000001: "HYPERCALL",
    0x40000002: "VP_INDEX",
    0x40000003: "RESET",
    0x40000010: "VP_RUNTIME",
    0x40000020: "TIME_REF_COUNT",
    0x40000021: "REFERENCE_TSC",
    0x40000022: "TSC_FREQUENCY",
    0x40000023: "APIC_FREQUENCY",
    0x40000070: "EOI",
    0x40000071: "ICR",
    0x40000072: "TPR",
    0x40000073: "VP_ASSIST_PAGE",
    0x40000080: "SCONTROL",
    0x40000081: "SVERSION",
    0x40000082: "SIEFP",
    0x40000083: "SIMP",
    0x40000084: "EOM",
    **{0x40000090 + i: f"SINT{i}" for i in range(16)},
    **{0x400000B0 + 2 * i: f"STIMER{i}_CONFIG" for i in range(4)},
    **{0x400000B1 + 2 * i: f"STIMER{i}_COUNT" for i in range(4)},
    **{0x40000100 + i: f"CRASH_P{i}" for i in range(5)},
    0x40000105: "CRASH_CTL",
    0x40000106: "REENLIGHTENMENT_CONTROL",
    0x40000107: "TSC_EMULATION_CONTROL",
    0x40000108: "TSC_EMULATION_STATUS",
    0x40000118: "TSC_INVARIANT_CONTROL",
}
LEAVES = {
    0x40000000: "vendor",
    0x40000001: "interface",
    0x40000002: "version",
    0x40000003: "features",
    0x40000004: "recommendations",
    0x40000005: "limits",
    0x40000006: "hardware",
}
FEATURES = {
    "eax": {
        0: "VP_RUNTIME",
        1: "TIME_REF_COUNT",
        2: "SynIC",
        3: "synthetic timers",
        4: "APIC MSRs",
        5: "hypercall MSRs",
        6: "VP_INDEX",
        7: "RESET",
        9: "reference TSC",
        11: "frequencies",
        13: "reenlightenment",
        15: "TSC invariant",
    },
    "ebx": {
        0: "CreatePartitions",
        4: "PostMessages",
        5: "SignalEvents",
        12: "CpuManagement",
        20: "extended hypercalls",
    },
    "edx": {
        4: "XMM input",
        8: "frequencies",
        10: "crash MSRs",
        15: "XMM output",
        19: "direct synthetic timers",
    },
}
RECOMMENDATIONS = {
    "eax": {
        1: "local TLB flush",
        2: "remote TLB flush",
        3: "APIC MSRs",
        5: "relaxed timing",
        9: "deprecated AutoEOI",
        10: "cluster IPIs",
        11: "ExProcessorMasks",
        14: "enlightened VMCS",
    },
}
PAGE = 4096


def number(text):
    return int(text, 0)


def mebibytes(pages):
    return f"{pages * PAGE / 2**20:,.1f} MiB"


def of(names, value, digits):
    return names.get(value, f"{value:#0{digits + 2}x}")


def bits(names, registers):
    """What the bits of a leaf are called; those without a name by register and number."""
    words = []
    for register, known in names.items():
        value = registers[register]
        words += [known.get(bit, f"{register}[{bit}]") for bit in range(32) if value >> bit & 1]
    return ", ".join(words) or "nothing"


def text_of(values):
    """The characters of registers, as vendor and interface have them."""
    return "".join(chr(c) if 32 <= c < 127 else "." for value in values for c in value.to_bytes(4, "little"))


def cpuid(event):
    leaf = number(event["leaf"])
    registers = {name: number(event[name]) for name in ("eax", "ebx", "ecx", "edx")}
    line = f"CPUID {leaf:#010x} " + " ".join(f"{name}={value:#010x}" for name, value in registers.items())
    if leaf in (0x40000000, 0x40000100):
        return f'{line}  "{text_of([registers["ebx"], registers["ecx"], registers["edx"]])}", to {registers["eax"]:#x}'
    if leaf == 0x40000001:
        return f'{line}  "{text_of([registers["eax"]])}"'
    if leaf == 0x40000003:
        return f"{line}  {bits(FEATURES, registers)}"
    if leaf == 0x40000004:
        return f"{line}  {bits(RECOMMENDATIONS, registers)}"
    return f"{line}  {LEAVES[leaf]}" if leaf in LEAVES else line


def os_of(value):
    """Who an OS ID says that it is (TLFS "Reporting the Guest OS Identity")."""
    if value == 0:
        return "nobody"
    if value >> 63:
        kinds = {1: "Linux", 2: "FreeBSD", 3: "Xen", 4: "Illumos"}
        kind = kinds.get(value >> 56 & 0x7F, "open source")
        version = value >> 16 & 0xFFFFFFFF
        return f"{kind} {version >> 16}.{version >> 8 & 0xFF}" if kind == "Linux" else kind
    systems = {4: "Windows NT", 5: "Windows CE"}
    system = systems.get(value >> 40 & 0xFF, "another system")
    return f"{system} {value >> 32 & 0xFF}.{value >> 24 & 0xFF}, build {value & 0xFFFF}"


def msr(event):
    index = number(event["msr"])
    verb = {"read": "RDMSR", "write": "WRMSR", "held": "KVM holds"}[event["access"]]
    line = f"{verb} {of(MSRS, index, 8)}"
    if event["value"] is not None:
        line += f" = {number(event['value']):#x}"
        if index == 0x40000000:
            line += f" ({os_of(number(event['value']))})"
    return line + (": #GP" if event["refused"] else "")


def ranges(event):
    reported = sum(count for _, count in event["ranges"])
    lines = [
        f"zeroed: {mebibytes(reported)} of {mebibytes(event['ram_pages'])} in {len(event['ranges'])} ranges, of "
        f"{mebibytes(event['zeroed_pages'])} in {event['zeroed_ranges']:,}, to {event['output']}"
    ]
    for first, count in event["ranges"]:
        lines.append(f"                  {number(first) * PAGE:#014x}  {mebibytes(count)}")
    return "\n".join(lines)


def call(event):
    control = number(event["control"])
    line = f"{of(CALLS, control & 0xFFFF, 4)} control={control:#x} input={event['input']} output={event['output']}"
    if event["cpl"]:
        line += f" CPL {event['cpl']}"
    if event["result"] == "not_ours":
        return f"{line}: the VMM's own"
    if event["result"] == "goes_on":
        return f"{line}: goes on, after {event['us']:,.0f} us"
    if event["result"] == "undefined_opcode":
        return f"{line}: #UD"
    result = number(event["result"])
    reps = result >> 32 & 0xFFF
    done = f", {reps} reps" if reps else ""
    return f"{line}: {of(STATUSES, result & 0xFFFF, 4)}{done} in {event['us']:,.0f} us"


def trace(event):
    if event["version"] != 1:
        raise ValueError(f"a trace of version {event['version']}, and this reads version 1")
    return (
        f"on Linux {event['kernel']}: guest {event['guest']}, {event['memory_bytes'] / 2**20:,.0f} MiB of "
        f"{event['backing']}, {event['cpus']} vCPUs"
    )


def boot(event):
    return f"boot {event['number']}, hypercalls {event['hypercalls']}"


def full(event):
    return f"{event['left_out']:,} more were left out: the trace is full"


PRINTERS = {"trace": trace, "boot": boot, "cpuid": cpuid, "msr": msr, "ranges": ranges, "call": call, "full": full}


def printed(line):
    event = json.loads(line)
    at = f"{event['at_us'] / 1e6:12.6f}" if "at_us" in event else " " * 12
    who = f" vp {event['vp']}" if "vp" in event else ""
    return f"{at}{who}  {PRINTERS[event['event']](event)}"


def main():
    # Of `| head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    path = sys.argv[1] if len(sys.argv) > 1 else "-"
    count = 0
    try:
        with sys.stdin if path == "-" else open(path, encoding="utf-8") as file:
            for count, line in enumerate(file, 1):
                print(printed(line))
    except OSError as error:
        print(f"read_trace: {error}", file=sys.stderr)
        return 1
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        print(f"read_trace: line {count}: {error!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
