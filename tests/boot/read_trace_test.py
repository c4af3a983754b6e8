"""read_trace_test.py READER: what read_trace.py prints."""

import json
import pathlib
import subprocess
import sys
import unittest

READER = pathlib.Path(sys.argv[1])


def read(*events):
    text = "".join((event if isinstance(event, str) else json.dumps(event)) + "\n" for event in events)
    return subprocess.run([sys.executable, "-B", READER], input=text, capture_output=True, text=True, check=False)


def cpuid(leaf, **registers):
    zero = {name: "0x0" for name in ("eax", "ebx", "ecx", "edx")}
    return {"event": "cpuid", "vp": 0, "leaf": leaf, "at_us": 1.0} | zero | registers


def msr(index, value, access="write", refused=False):
    return {"event": "msr", "vp": 2, "access": access, "msr": index, "value": value, "refused": refused, "at_us": 2e6}


def call(control, result):
    return {
        "event": "call", "vp": 1, "control": control, "input": "0x0", "output": "0x5000", "cpl": 0, "result": result,
        "us": 1234.5, "at_us": 3.0,
    }


class Reader(unittest.TestCase):
    def shows(self, event, *texts):
        done = read(event)
        self.assertEqual(done.returncode, 0, done.stderr)
        for text in texts:
            self.assertIn(text, done.stdout)

    def test_leaves(self):
        vendor = cpuid("0x40000000", eax="0x40000006", ebx="0x7263694d", ecx="0x666f736f", edx="0x76482074")
        self.shows(vendor, '"Microsoft Hv"', "0x40000006")
        self.shows(cpuid("0x40000001", eax="0x31237648"), '"Hv#1"')
        self.shows(cpuid("0x40000003", eax="0x60", ebx="0x100000", edx="0x80000000"),
                   "hypercall MSRs, VP_INDEX, extended hypercalls, edx[31]")
        self.shows(cpuid("0x40000004", eax="0x20"), "relaxed timing")

    def test_msrs(self):
        self.shows(msr("0x40000000", "0x810000060c000000"), "    2.000000 vp 2  WRMSR GUEST_OS_ID", "(Linux 6.12)")
        self.shows(msr("0x40000000", "0x1040a00004a65"), "(Windows NT 10.0, build 19045)")
        self.shows(msr("0x400001ff", None, "read", True), "RDMSR 0x400001ff: #GP")
        self.shows(msr("0x40000092", "0x10000", "held"), "KVM holds SINT2 = 0x10000")

    def test_calls(self):
        self.shows(call("0x8002", "0x0"), "HvExtCallGetBootZeroedMemory", "output=0x5000: SUCCESS in 1,234 us")
        self.shows(call("0x8003", "0x300000005"), "HvExtCallMemoryHeatHint", "INVALID_PARAMETER, 3 reps")
        self.shows(call("0x8003", "goes_on"), "HvExtCallMemoryHeatHint", "goes on, after 1,234 us")
        self.shows(call("0x1005d", "not_ours"), "HvCallSignalEvent", "the VMM's own")
        self.shows(call("0x8001", "undefined_opcode"), "#UD")

    def test_ranges(self):
        answer = {
            "event": "ranges", "output": "0x5000", "ram_pages": 1024, "zeroed_pages": 770, "zeroed_ranges": 300,
            "ranges": [["0x200", 512], ["0x0", 256]], "at_us": 1.0,
        }
        self.shows(answer, "zeroed: 3.0 MiB of 4.0 MiB in 2 ranges, of 3.0 MiB in 300, to 0x5000", "0x000000200000  2.0 MiB")

    def test_the_rest(self):
        first = {
            "event": "trace", "version": 1, "kernel": "6.12.0", "guest": "zeroing", "memory_bytes": 1 << 27,
            "backing": "anonymous", "cpus": 2, "at_us": 0.0,
        }
        self.shows(first, "on Linux 6.12.0: guest zeroing, 128 MiB of anonymous, 2 vCPUs")
        self.shows({"event": "boot", "number": 2, "hypercalls": "split", "at_us": 0.0}, "boot 2, hypercalls split")
        self.shows({"event": "full", "left_out": 1000}, "1,000 more were left out")
        done = read(first | {"version": 2})
        self.assertEqual(done.returncode, 1)

    def test_what_is_no_trace(self):
        wide = json.dumps(cpuid("0x40000001", eax="0x1ffffffff"))
        for bad in ("{", "3", "{}", '{"event": "nothing"}', wide, "[" * 100000):
            done = read({"event": "full", "left_out": 1}, bad)
            self.assertEqual(done.returncode, 1, bad)
            self.assertRegex(done.stderr, r"\Aread_trace: line 2: [^\n]*\n\Z")

    def test_what_is_not_there(self):
        done = subprocess.run([sys.executable, "-B", READER, "/nowhere"], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Aread_trace: [^\n]*/nowhere[^\n]*\n\Z")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
