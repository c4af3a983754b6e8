"""storm_test.py ROOT PROGRAM TEST: what ./dev storm does (tools/storm.py). TEST is a class below; PROGRAM is cppvmm-boot.
Status 77: skipped."""

import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import unittest
from unittest import mock

ROOT = pathlib.Path(sys.argv[1]).resolve()
PROGRAM = pathlib.Path(sys.argv[2])
TEST = sys.argv[3]
sys.path.insert(0, str(ROOT / "tools"))
import storm as storm_tool

# Stands in for cppvmm-boot: figures that depend on whether the guest asks.
FIGURES = """#!/bin/sh
for last; do :; done
case "$*" in
  *"--hypercalls off"*) echo '{"host_peak_bytes": 104857600, "vcpu_us": [1500000, 500000]}' >"$last" ;;
  *) echo '{"host_peak_bytes": 1048576, "vcpu_us": [100000]}' >"$last" ;;
esac
"""


def storm(program, *arguments):
    return subprocess.run([sys.executable, "-B", ROOT / "tools/storm.py", program, *arguments], capture_output=True,
                          text=True, check=False)


def rows(text):
    """{row: [the two columns]}"""
    table = (re.split(r"  +", line.strip()) for line in text.splitlines())
    return {line[0]: line[1:] for line in table if len(line) == 3}


def mebibytes(text):
    return float(re.fullmatch(r"(-?[0-9,.]+) MiB", text)[1].replace(",", ""))


class AStormOfGuests(unittest.TestCase):
    def test_that_ask_takes_less(self):
        trouble = subprocess.run([ROOT / "tools/kvm.py"], capture_output=True, text=True, check=False)
        if trouble.returncode != 0:
            print(trouble.stdout.strip())
            sys.exit(77)
        done = storm(PROGRAM, "--guests", "3", "--memory", "16M")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("3 x 16 MiB at once", done.stdout)
        found = rows(done.stdout)
        everything, first = (mebibytes(text) for text in found["host memory, the guests' peaks added up"])
        self.assertGreater(everything, 3 * 15)
        self.assertLess(first, 3 * 8)


class AStormIsTold(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.program = pathlib.Path(folder.name, "program")

    def stand_in(self, script):
        self.program.write_text(script)
        self.program.chmod(0o755)

    def test_as_sums_over_the_guests(self):
        self.stand_in(FIGURES)
        done = storm(self.program, "--guests", "12", "--memory", "1G")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("12 x 1024 MiB at once", done.stdout)
        found = rows(done.stdout)
        self.assertEqual(found["host memory, the guests' peaks added up"], ["1,200.0 MiB", "12.0 MiB"])
        self.assertEqual(found["processor time of the vCPUs"], ["24.00 s", "1.20 s"])
        self.assertRegex(found["until the last guest was up and gone"][0], r"^[0-9.]+ s$")

    def test_a_peak_that_one_guest_does_not_know_is_unknown(self):
        self.stand_in(FIGURES.replace(": 1048576,", ": null,"))
        done = storm(self.program, "--guests", "2")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(rows(done.stdout)["host memory, the guests' peaks added up"], ["200.0 MiB", "unknown"])

    def test_with_the_least_memory_that_was_available(self):
        over = threading.Event()
        seen = iter([1000, 700, 300])

        def available():
            value = next(seen, None)
            if value is None:
                over.set()
            return value or 900

        with mock.patch.object(storm_tool, "available", available):
            watch = storm_tool.LeastAvailable()
            watch.start()
            self.assertTrue(over.wait(60))
            watch.over.set()
            watch.join()
        self.assertEqual(watch.least, 300)

    def test_a_guest_that_fails_fails_it(self):
        self.stand_in("#!/bin/sh\necho first >&2\necho why it failed >&2\nexit 3\n")
        done = storm(self.program, "--guests", "2")
        self.assertEqual(done.returncode, 1)
        self.assertIn("storm: guest 1 of 2 ended with status 3: why it failed\n", done.stderr)
        self.assertEqual(done.stdout, "")

    def test_as_many_as_fit(self):
        self.stand_in(FIGURES)
        done = storm(self.program, "--memory", "1T")
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("not one guest of 1048576 MiB fits", done.stderr)
        mib = 2**20
        self.assertEqual(storm_tool.fitting(100 * 528 * mib, 512 * mib), 90)
        self.assertEqual(storm_tool.fitting(528 * mib, 512 * mib), 0)

    def test_mistakes_are_told(self):
        for mistake in (["--guests", "0"], ["--guests", "many"], ["--memory", "lots"], ["--memory", "0"], ["stray"]):
            with self.subTest(mistake):
                done = storm(self.program, *mistake)
                self.assertEqual(done.returncode, 2)
                self.assertIn("storm: error: ", done.stderr)


unittest.main(argv=[sys.argv[0], TEST])
