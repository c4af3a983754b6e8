"""bench_report_test.py ROOT: what ./dev bench says of what was measured (tools/bench_report.py)."""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

REPORT = pathlib.Path(sys.argv.pop(1)).resolve() / "tools/bench_report.py"


def measured(name, value, goal, label="a loop", **more):
    return {"name": f"beside/{name}/iterations:1/manual_time", "value": value, "goal": goal, "label": label, **more}


def without(name, why):
    return {"name": f"beside/{name}/iterations:1/manual_time", "error_occurred": True, "error_message": why}


class Report(unittest.TestCase):
    def reported(self, *benchmarks):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            (folder / "some_benches.json").write_text(json.dumps({"benchmarks": benchmarks}))
            # Of a program that had none to run.
            (folder / "other_benches.json").write_text("")
            done = subprocess.run(
                [sys.executable, "-B", REPORT, folder], capture_output=True, text=True, check=False)
            summary = folder / "summary.json"
            return done, json.loads(summary.read_text()) if summary.exists() else None

    def test_rows(self):
        done, summary = self.reported(
            measured("fast", 1.05, 1.1, ours=1.05e6, floor=1e6), measured("slow", 3, 0.8, ours=30, floor=10),
            measured("small", 16, 24, "bytes an extent"), without("lacking", "skipped: no memory"))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.splitlines()[2:], [
            "| fast | 1.05 ms | a loop: 1 ms | 1.05 | 1.1 | yes |", "| slow | 30 ns | a loop: 10 ns | 3 | 0.8 | no |",
            "| small |  | bytes an extent | 16 | 24 | yes |", "lacking: skipped: no memory",
            "2 of 3 goals met, 1 not measured"])
        self.assertEqual(summary, {
            "fast": {"value": 1.05, "goal": 1.1, "unit": "times the time of a loop"},
            "slow": {"value": 3, "goal": 0.8, "unit": "times the time of a loop"},
            "small": {"value": 16, "goal": 24, "unit": "bytes an extent"}})

    def test_benchmarks_without_a_row(self):
        done, summary = self.reported({"name": "subtract/1000", "real_time": 1.5, "time_unit": "us"})
        self.assertEqual((done.returncode, done.stdout, summary), (0, "subtract/1000: 1.5 us\n", None))

    def test_what_failed_is_a_failure(self):
        done, summary = self.reported(measured("fast", 1, 2, ours=1, floor=1), without("wrong", "failed: not the same"))
        self.assertEqual(done.returncode, 1)
        self.assertIn("wrong: failed: not the same", done.stdout.splitlines())
        self.assertEqual(list(summary), ["fast"])

    def test_nothing_measured_is_a_failure(self):
        self.assertEqual(self.reported()[0].returncode, 1)


unittest.main()
