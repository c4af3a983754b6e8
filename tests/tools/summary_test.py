"""summary_test.py ROOT: what the lab says of its tests (tests/lab/summary.awk)."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

SUMMARY = pathlib.Path(sys.argv.pop(1)).resolve() / "tests/lab/summary.awk"
ENDED = {"OK": "[       OK ]", "FAILED": "[  FAILED  ]", "SKIPPED": "[  SKIPPED ]"}


def program(name, label, *tests, status=0, part="1/1"):
    """What a part of a program of the label prints whose tests ended so."""
    lines = [f"lab: begin {name} {label} {part}"]
    for number, ended in enumerate(tests):
        lines += [f"[ RUN      ] One.Test{number}", f"said by {number}", f"{ENDED[ended]} One.Test{number} (1 ms)"]
    return [*lines, "", f"lab: end {name} {status} 3"]


class Summary(unittest.TestCase):
    def summed(self, *programs, expected=None, whole=1):
        log, names, machine = [], [], None
        for lines in programs:
            name, label, part = lines[0].split()[2:]
            log += [f"lab: kernel 6.12, 1 CPUs, label {label} part {part}"] if (label, part) != machine else []
            machine = label, part
            log += lines
            if name not in names:
                names.append(name)
        with tempfile.TemporaryDirectory() as folder:
            counts = pathlib.Path(folder, "counts")
            done = subprocess.run(
                ["awk", "-v", "name=6.12", "-v", f"whole={whole}", "-v", f"expected={' '.join(expected or names)}",
                 "-v", f"counts={counts}", "-f", SUMMARY],
                input="\n".join(log) + "\n", capture_output=True, text=True, check=False)
            self.assertEqual(done.stderr, "")
            return done.returncode, done.stdout.splitlines(), counts.read_text().strip()

    def test_counts_what_passed_and_was_skipped(self):
        status, said, counts = self.summed(program("a", "-", "OK", "SKIPPED"), program("b", "kvm", "OK", "OK"))
        self.assertEqual(said, ["6.12 a: 1 passed, 0 failed, 1 skipped; 3 s", "6.12 b: 2 passed, 0 failed, 0 skipped; 3 s"])
        self.assertEqual((status, counts), (0, "3 0 1 2"))

    def test_says_what_failed_and_its_words(self):
        status, said, counts = self.summed(program("a", "kvm", "OK", "FAILED", status=1))
        self.assertEqual(
            said, ["6.12 a: 1 passed, 1 failed, 0 skipped; 3 s", "  failed: One.Test1", "    said by 1"])
        self.assertEqual((status, counts), (1, "1 1 0 2"))

    def test_passes_a_program_whose_tests_no_kernel_here_can_run(self):
        status, said, counts = self.summed(program("a", "kvm", "SKIPPED"), program("b", "kvm", "OK"))
        self.assertEqual(said[0], "6.12 a: 0 passed, 0 failed, 1 skipped; 3 s")
        self.assertEqual((status, counts), (0, "1 0 1 1"))

    def test_fails_where_all_of_a_machine_was_skipped(self):
        skipped = program("a", "kvm", "SKIPPED"), program("b", "-", "OK")
        status, said, _ = self.summed(*skipped)
        self.assertEqual((status, said[-1]), (1, "6.12: every test of the machine for kvm was skipped"))
        # Of what a person chose, all may need something else.
        self.assertEqual(self.summed(*skipped, whole=0)[0], 0)

    def test_fails_where_a_program_ran_nothing(self):
        status, said, _ = self.summed(program("a", "kvm"), program("b", "kvm", "OK"))
        self.assertEqual((status, said[1]), (1, "  it ran no test"))

    def test_fails_where_a_program_did_not_come_to_its_end(self):
        status, said, _ = self.summed(program("a", "kvm", "OK"), expected=["a", "b"])
        self.assertEqual((status, said[2]), (1, "  failed: did not come to its end"))

    def test_adds_the_parts_that_ran_in_machines_of_their_own(self):
        status, said, counts = self.summed(
            program("a", "kvm", "OK", "SKIPPED", part="1/2"), program("b", "kvm", part="1/2"),
            program("a", "kvm", "OK", "OK", part="2/2"), program("b", "kvm", "OK", part="2/2"))
        self.assertEqual(said, ["6.12 a: 3 passed, 0 failed, 1 skipped; 6 s", "6.12 b: 1 passed, 0 failed, 0 skipped; 6 s"])
        self.assertEqual((status, counts), (0, "4 0 1 4"))

    def test_fails_where_a_part_did_not_come_to_its_end(self):
        for parts in (program("a", "kvm", "OK", part="1/2"),), (
                program("a", "kvm", "OK", part="1/2"), program("a", "kvm", "OK", part="2/2")[:-1]):
            status, said, _ = self.summed(*parts)
            self.assertEqual((status, said[1]), (1, "  failed: part 2/2 did not come to its end"))

    def test_counts_of_a_machine_that_stopped_only_what_ran_when_it_was_started_again(self):
        again = program("a", "kvm", "OK", "OK", part="2/2")
        stopped = [*program("a", "kvm", "OK", "OK", part="2/2")[:-1], "lab: kernel 6.12, 1 CPUs, label kvm part 2/2"]
        status, said, counts = self.summed(program("a", "kvm", "OK", part="1/2"), [*stopped, *again])
        self.assertEqual((status, said, counts), (0, ["6.12 a: 3 passed, 0 failed, 0 skipped; 6 s"], "3 0 0 3"))

    def test_fails_where_a_program_ended_badly_after_its_tests(self):
        status, said, _ = self.summed(program("a", "kvm", "OK", status=139))
        self.assertEqual((status, said[1]), (1, "  failed: it ended with status 139"))


unittest.main(verbosity=2)
