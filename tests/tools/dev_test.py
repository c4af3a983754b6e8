"""dev_test.py ROOT TEST [PROGRAM...]: what the commands do on a machine without KVM, which is made of this one by
without_kvm.sh. TEST is a class below; PROGRAMs are the tests with the label kvm. Status 77: skipped."""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(sys.argv[1]).resolve()
TEST = sys.argv[2]
PROGRAMS = sys.argv[3:]
WITHOUT_KVM = ROOT / "tests/tools/without_kvm.sh"
KERNELS = ROOT / "build/lab/kernels"
BUSYBOX_INIT = """#!/bin/busybox sh
echo what is typed?
read line
echo "typed: $line"
/bin/busybox reboot -f
"""


def without_kvm(*command):
    """What came of it: no regular file in /dev, for one."""
    done = subprocess.run([WITHOUT_KVM, *command], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == 77:
        raise unittest.SkipTest(done.stderr.strip())
    if done.returncode == 99:
        raise AssertionError(done.stderr)
    return done


def kernel():
    """A kernel of the lab's, which is not fetched for a test."""
    for version in ("6.12", "6.8"):
        if (KERNELS / version / "package").exists():
            return KERNELS / version
    raise unittest.SkipTest("the lab has no kernel here yet: ./dev lab gets it")


class NothingIsMadeInDev(unittest.TestCase):
    def test_is_seen(self):
        with self.assertRaises(AssertionError):
            without_kvm("sh", "-c", "echo 1 >/dev/kvm")

    def test_by_the_probe(self):
        done = without_kvm(ROOT / "tools/kvm.py")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"\Athere is no /dev/kvm: [^\n]*\n\Z")

    def test_by_what_runs_on_the_host_alone(self):
        for command in ("demo", "boot"):
            done = without_kvm(ROOT / "dev", command, "--host")
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertRegex(done.stderr, r"(?m)^dev: there is no /dev/kvm: ")

    def test_by_a_storm(self):
        done = without_kvm(ROOT / "dev", "storm")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stderr, r"(?m)^dev: there is no /dev/kvm: ")


class FuzzersAreChosen(unittest.TestCase):
    """Without a build."""

    def mistake(self, *arguments):
        done = subprocess.run([ROOT / "dev", "fuzz", *arguments], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        return done.stderr

    def test_by_name(self):
        names = re.findall(r"^cppvmm_add_fuzzer\((\w+)\)$", (ROOT / "tests/fuzz/CMakeLists.txt").read_text(), re.M)
        self.assertTrue(names)
        self.assertEqual(self.mistake("nothing"), f"dev: fuzz: no target 'nothing': {' '.join(names)}\n")

    def test_for_a_time(self):
        for time in ((), ("0",), ("1m",)):
            self.assertEqual(self.mistake("--seconds", *time), "dev: fuzz: --seconds takes a number of seconds\n")


class TestsOfKvmNeedIt(unittest.TestCase):
    def test_each(self):
        self.assertTrue(PROGRAMS)
        for program in PROGRAMS:
            with self.subTest(program):
                done = without_kvm(program, "--gtest_color=no")
                self.assertEqual(done.returncode, 0, done.stdout)
                self.assertNotIn("[       OK ]", done.stdout, "a test that needs no KVM has the label kvm")
                self.assertIn("[  SKIPPED ]", done.stdout)


class BenchesOfKvmNeedIt(unittest.TestCase):
    def test_and_say_so(self):
        (program,) = PROGRAMS
        done = without_kvm(program, "--brief")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = [line for line in done.stdout.splitlines() if line.startswith("beside/exits/")]
        self.assertEqual(len(rows), 5, done.stdout)
        for row in rows:
            self.assertIn("skipped: no usable KVM", row)


class TestsAreChosen(unittest.TestCase):
    """Not among ctest's tests, for it runs ctest where these run: .ci/run calls it."""

    def counts(self, *arguments):
        done = without_kvm(ROOT / "dev", "test", "--host", "release", "-R", r"^(FileDescriptor|KvmTest)\.", *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.splitlines()[-1]

    def test_without_those_that_need_kvm(self):
        self.assertEqual(self.counts(), "release: 4 passed, 0 failed, 0 skipped; 0 ran against a real KVM")

    def test_and_without_what_a_person_leaves_out(self):
        self.assertEqual(
            self.counts("-LE", "kernel"), "release: 4 passed, 0 failed, 0 skipped; 0 ran against a real KVM")


class DemoRunsInTheLab(unittest.TestCase):
    def test_with_an_answer_each_way(self):
        kernel()
        done = without_kvm(ROOT / "dev", "demo")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r"(?m)^no KVM on this machine, so the guests run in the lab, .*there is no /dev/kvm")
        ways = "".join(rf" +{way} \(0x8001 1x, 0x8002 1x\)" for way in ("kernel", "split", "user"))
        self.assertRegex(done.stdout, "(?m)^hypercalls +off" + ways)
        self.assertEqual(done.stdout.count(": 0 unsound "), 3, done.stdout)
        # With a balloon target, the peaks of who was not told and of who was.
        untold, told = re.findall(r"^host memory at its peak +([0-9.]+) MiB +([0-9.]+) MiB$", done.stdout, re.M)[-1]
        self.assertGreater(float(untold), 60, done.stdout)
        self.assertLess(float(told), 24, done.stdout)


class BootRunsInTheLab(unittest.TestCase):
    def test_with_its_files(self):
        kernel()
        with tempfile.TemporaryDirectory(prefix="with a space ") as folder:
            figures, picture = pathlib.Path(folder, "a:b.json"), pathlib.Path(folder, "picture.svg")
            done = without_kvm(
                ROOT / "dev", "boot", "--memory", "16MiB", "--audit", "--json", figures, f"--map={picture}")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("reported as zeroed", done.stdout)
            self.assertEqual(json.loads(figures.read_text())["unsound_pages"], 0)
            self.assertTrue(picture.read_text().startswith("<svg "))

    def test_with_what_is_typed(self):
        image = kernel()
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder, "root")
            for name in ("bin", "dev", "proc"):
                (root / name).mkdir(parents=True)
            (root / "bin/busybox").write_bytes((image / "busybox").read_bytes())
            (root / "init").write_text(BUSYBOX_INIT)
            for name in ("init", "bin/busybox"):
                (root / name).chmod(0o755)
            initrd = pathlib.Path(folder, "initrd")
            subprocess.run(f"find . | cpio -o -H newc >'{initrd}'", cwd=root, shell=True, check=True, capture_output=True)
            command = [
                WITHOUT_KVM, ROOT / "dev", "boot", "--memory", "256M", "--kernel", image / "vmlinuz", "--initrd", initrd,
                "--append", "console=ttyS0 quiet panic=-1 clearcpuid=cx16 reboot=kbd"]
            said = ""
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
                for line in running.stdout:
                    said += line
                    # Before the guest has opened its console, what is typed is lost.
                    if line.startswith("what is typed?"):
                        running.stdin.write("a word\n")
                        running.stdin.flush()
            if running.returncode == 77:
                raise unittest.SkipTest(said.strip())
            self.assertEqual(running.returncode, 0, said)
            self.assertIn("typed: a word", said)

    def test_mistakes_are_told_without_a_machine(self):
        done = without_kvm(ROOT / "dev", "boot", "--memory", "lots")
        self.assertEqual(done.returncode, 2)
        self.assertRegex(done.stderr, r"\Acppvmm-boot: --memory: [^\n]*\n\Z")


result = unittest.TextTestRunner(verbosity=2).run(
    unittest.defaultTestLoader.loadTestsFromName(TEST, sys.modules[__name__]))
if not result.wasSuccessful():
    sys.exit(1)
sys.exit(77 if result.skipped else 0)
