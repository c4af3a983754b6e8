"""house_test.py ROOT: plants violations in a small made-up tree, and sees that docs/house.py names each."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
sys.path.insert(0, str(ROOT / "docs"))
import house

# A tree that breaks no rule, with the folders and modules that the rules speak of. What is allowed in one place and
# not in others is in it: a kernel header in an implementation, KVM in vcpu, Asio in the group, hv_ext above the others.
TREE = {
    "modules/cppvmm.guest_memory.cppm": "export module cppvmm.guest_memory;\nexport import :error;\n",
    "modules/cppvmm.vcpu.cppm": "/// Its example.\nexport module cppvmm.vcpu;\nexport import :error;\n",
    "modules/cppvmm.vcpu_group.cppm": "export module cppvmm.vcpu_group;\nexport import :group;\n",
    "modules/cppvmm.hv_calls.cppm": "export module cppvmm.hv_calls;\nexport import :tlfs;\n",
    "modules/cppvmm.hv_ext.cppm": "export module cppvmm.hv_ext;\nexport import :hyperv;\nexport import cppvmm.hv_calls;\n",
    "guest_memory/CMakeLists.txt": """\
cppvmm_add_module(guest_memory
  INTERFACE
    modules/cppvmm.guest_memory.cppm
    guest_memory/error.cppm
  INTERNAL
    guest_memory/error.cpp
    guest_memory/extents.cppm
  NEEDS Boost::headers
)
""",
    "guest_memory/error.cppm": "module;\n#include <string>\nexport module cppvmm.guest_memory:error;\n",
    "guest_memory/error.cpp": """\
module;
#include <linux/userfaultfd.h>
module cppvmm.guest_memory:error.impl;
import :error;
import :extents;
""",
    "guest_memory/extents.cppm": "module;\n#include <boost/icl/interval_set.hpp>\nmodule cppvmm.guest_memory:extents;\n",
    "vcpu/CMakeLists.txt": """\
cppvmm_add_module(vcpu
  INTERFACE
    modules/cppvmm.vcpu.cppm
    vcpu/error.cppm
  INTERNAL
    vcpu/error.cpp
)
add_subdirectory(group)
""",
    "vcpu/error.cppm": "module;\n#include <string>\nexport module cppvmm.vcpu:error;\n",
    "vcpu/error.cpp": "module;\n#include <linux/kvm.h>\nmodule cppvmm.vcpu:error.impl;\nimport :error;\n",
    "vcpu/group/CMakeLists.txt": """\
cppvmm_add_module(vcpu_group COMPONENT
  INTERFACE
    modules/cppvmm.vcpu_group.cppm
    vcpu/group/group.cppm
  LINKS cppvmm_vcpu Boost::headers
)
""",
    "vcpu/group/group.cppm": """\
module;
#include <boost/asio/post.hpp>
export module cppvmm.vcpu_group:group;
import cppvmm.vcpu;
""",
    "hv_ext/CMakeLists.txt": "add_subdirectory(calls)\nadd_subdirectory(kvm)\n",
    "hv_ext/calls/CMakeLists.txt": """\
cppvmm_add_module(hv_calls
  INTERFACE
    modules/cppvmm.hv_calls.cppm
    hv_ext/calls/tlfs.cppm
  LINKS cppvmm_guest_memory
)
""",
    "hv_ext/calls/tlfs.cppm": "export module cppvmm.hv_calls:tlfs;\nimport cppvmm.guest_memory;\n",
    "hv_ext/kvm/CMakeLists.txt": """\
cppvmm_add_module(hv_ext
  INTERFACE
    modules/cppvmm.hv_ext.cppm
    hv_ext/kvm/hyperv.cppm
  INTERNAL
    hv_ext/kvm/hyperv.cpp
  LINKS cppvmm_hv_calls cppvmm_vcpu
)
""",
    "hv_ext/kvm/hyperv.cppm": "export module cppvmm.hv_ext:hyperv;\nimport cppvmm.hv_calls;\n",
    "hv_ext/kvm/hyperv.cpp": "module cppvmm.hv_ext:hyperv.impl;\nimport :hyperv;\nimport cppvmm.vcpu;\n",
}


class PlantedViolations(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        for path, text in TREE.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text(text)
        (self.root / "docs").mkdir()
        # The picture as it is for this tree, so that nothing but what is planted can be wrong.
        self.assertEqual(self.run_house(), (0, "wrote docs/house.svg\n"))
        self.assertEqual(self.run_house("--check"), (0, ""))

    def run_house(self, *arguments):
        """Exit status and output; in this process, where it takes next to nothing."""
        output = io.StringIO()
        with mock.patch.object(sys, "argv", ["house.py", "--root", str(self.root), *arguments]):
            with contextlib.redirect_stdout(output):
                status = house.main()
        return status, output.getvalue()

    def assert_caught(self, place, *words):
        """A line begins with the place and holds the words; the exit status is 1, with and without --check."""
        for arguments in (["--check"], []):
            status, output = self.run_house(*arguments)
            self.assertEqual(status, 1, output)
            lines = [line for line in output.splitlines() if line.startswith(place)]
            self.assertTrue(any(all(word in line for word in words) for line in lines), output)

    def edit(self, path, pattern, replacement):
        file = self.root / path
        text, count = re.subn(pattern, replacement, file.read_text(), count=1, flags=re.M)
        self.assertEqual(count, 1, f"{pattern} in {path}")
        file.write_text(text)

    def add(self, path, text, section=None):
        """A new source; with a section, listed under it."""
        (self.root / path).parent.mkdir(exist_ok=True)
        (self.root / path).write_text(text)
        if section:
            self.edit(f"{pathlib.PurePosixPath(path).parent}/CMakeLists.txt", rf"^ *{section}$", rf"\g<0>\n    {path}")

    def after_module_line(self, path, line):
        self.edit(path, r"^(export )?module cppvmm[\w.:]*;$", rf"\g<0>\n{line}")

    def test_picture_out_of_date(self):
        self.add("hv_ext/kvm/extra.cppm", "export module cppvmm.hv_ext:extra;\nimport :hyperv;\n", "INTERFACE")
        self.edit("modules/cppvmm.hv_ext.cppm", r"\Z", "export import :extra;\n")
        status, output = self.run_house("--check")
        self.assertEqual((status, output), (1, "docs/house.svg:1: out of date: run ./dev graph\n"))
        self.assertEqual(self.run_house(), (0, "wrote docs/house.svg\n"))
        self.assertIn(">extra<", (self.root / "docs/house.svg").read_text())
        self.assertEqual(self.run_house("--check"), (0, ""))

    def test_picture_missing(self):
        (self.root / "docs/house.svg").unlink()
        self.assertEqual(self.run_house("--check")[0], 1)

    def test_same_sources_same_picture(self):
        """Whatever the order in which a process walks its sets."""
        picture = self.root / "docs/house.svg"
        pictures = {picture.read_bytes()}
        for seed in "123":
            picture.unlink()
            subprocess.run([sys.executable, ROOT / "docs/house.py", "--root", self.root], check=True,
                           stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONHASHSEED": seed})
            pictures.add(picture.read_bytes())
        self.assertEqual(len(pictures), 1)

    def test_cycle_of_partitions(self):
        self.add("vcpu/a.cppm", "export module cppvmm.vcpu:a;\nimport :b;\n", "INTERFACE")
        self.add("vcpu/b.cppm", "export module cppvmm.vcpu:b;\nexport import :a;\n", "INTERFACE")
        self.assert_caught("vcpu/", "cycle", "cppvmm.vcpu:a -> cppvmm.vcpu:b -> cppvmm.vcpu:a")

    def test_partition_that_imports_itself(self):
        self.add("vcpu/a.cppm", "export module cppvmm.vcpu:a;\nimport :a;\n", "INTERFACE")
        self.assert_caught("vcpu/a.cppm:1:", "cycle", "cppvmm.vcpu:a -> cppvmm.vcpu:a")

    def test_cycle_through_the_front_door(self):
        self.after_module_line("guest_memory/error.cppm", "import cppvmm.guest_memory;")
        self.assert_caught("guest_memory/error.cppm:", "imports the front door")

    def test_cycle_of_modules(self):
        self.after_module_line("vcpu/error.cpp", "import cppvmm.hv_ext;")
        self.assert_caught("modules/", "cycle", "cppvmm.hv_ext -> cppvmm.vcpu -> cppvmm.hv_ext")

    def test_guest_memory_imports_vcpu(self):
        self.after_module_line("guest_memory/error.cpp", "import cppvmm.vcpu;")
        self.assert_caught("guest_memory/error.cpp:", "cppvmm.guest_memory imports cppvmm.vcpu")

    def test_layer_imports_the_one_above(self):
        self.add("guest_memory/survey/a.cppm", "export module cppvmm.guest_memory:a;\n")
        self.add("guest_memory/evidence/b.cpp", "module cppvmm.guest_memory:b.impl;\nimport :a;\n")
        self.assert_caught("guest_memory/evidence/b.cpp:2:", "imports cppvmm.guest_memory:a from a layer above its own")

    def test_layer_imports_what_lies_beside_the_layers(self):
        self.add("guest_memory/memory/a.cpp", "module cppvmm.guest_memory:a.impl;\nimport :error;\n")
        self.assert_caught("guest_memory/memory/a.cpp:2:", "imports cppvmm.guest_memory:error from a layer above its own")

    def test_vcpu_imports_guest_memory(self):
        self.after_module_line("vcpu/error.cppm", "  import   cppvmm.guest_memory ;")
        self.assert_caught("vcpu/error.cppm:", "cppvmm.vcpu imports cppvmm.guest_memory")

    def test_hv_calls_imports_vcpu(self):
        self.after_module_line("hv_ext/calls/tlfs.cppm", "import cppvmm.vcpu;")
        self.assert_caught("hv_ext/calls/tlfs.cppm:", "cppvmm.hv_calls imports cppvmm.vcpu")

    def test_library_imports_hv_ext(self):
        self.after_module_line("vcpu/error.cpp", "export import cppvmm.hv_ext;")
        self.assert_caught("vcpu/error.cpp:", "imports cppvmm.hv_ext: nothing in the library may")

    def test_import_of_what_is_not_there(self):
        self.after_module_line("vcpu/error.cpp", "import :nothing;")
        self.assert_caught("vcpu/error.cpp:", "imports :nothing")
        self.edit("vcpu/error.cpp", "import :nothing;", "import nothing;")
        self.assert_caught("vcpu/error.cpp:", "imports nothing")

    def test_headers_in_an_interface(self):
        for header in ("boost/icl/interval_set.hpp", "linux/userfaultfd.h", "asm/unistd.h", "sys/ioctl.h"):
            with self.subTest(header):
                self.edit("guest_memory/error.cppm", r"^module;$", f"module;\n#include <{header}>")
                self.assert_caught("guest_memory/error.cppm:2:", header, "interface unit")
                self.edit("guest_memory/error.cppm", rf"^#include <{header}>\n", "")

    def test_header_that_another_header_brings(self):
        (self.root / "vcpu/raw.hpp").write_text("#pragma once\n#include <linux/kvm.h>\n")
        self.edit("vcpu/error.cppm", r"^module;$", 'module;\n  # include "raw.hpp"')
        self.assert_caught("vcpu/error.cppm:2:", "linux/kvm.h", "vcpu/raw.hpp")

    def test_headers_in_an_implementation(self):
        self.edit("vcpu/error.cpp", r"^module;$", "module;\n#include <linux/kvm.h>\n#include <boost/icl/interval.hpp>")
        self.assertEqual(self.run_house()[0], 0)

    def test_kvm_outside_vcpu(self):
        self.edit("guest_memory/error.cpp", r"^module;$", "module;\n#include <linux/kvm.h>")
        self.assert_caught("guest_memory/error.cpp:2:", "KVM belongs in cppvmm.vcpu")

    def test_asio_outside_the_group(self):
        self.edit("vcpu/error.cpp", r"^module;$", "module;\n#include <boost/asio/post.hpp>")
        self.assert_caught("vcpu/error.cpp:2:", "Asio belongs in cppvmm.vcpu_group")

    def test_code_in_a_front_door(self):
        self.edit("modules/cppvmm.vcpu.cppm", r"\Z", "export inline int answer = 42;\n")
        self.assert_caught("modules/cppvmm.vcpu.cppm:", "not: export inline int answer")

    def test_include_in_a_front_door(self):
        self.edit("modules/cppvmm.vcpu.cppm", r"^export module", "module;\n#include <cstdint>\nexport module")
        self.assert_caught("modules/cppvmm.vcpu.cppm:", "not: #include <cstdint>")

    def test_front_door_that_keeps_an_import_to_itself(self):
        self.edit("modules/cppvmm.vcpu.cppm", r"^export import :error;", "import :error;")
        self.assert_caught("modules/cppvmm.vcpu.cppm:", "does not export cppvmm.vcpu:error")

    def test_front_door_that_imports_another_module(self):
        self.edit("modules/cppvmm.hv_ext.cppm", r"\Z", "import cppvmm.guest_memory;\n")
        self.assert_caught("modules/cppvmm.hv_ext.cppm:4:", "a front door exports what it imports")

    def test_front_door_outside_modules(self):
        self.add("vcpu/extra.cppm", "export module cppvmm.extra;\n", "INTERFACE")
        self.assert_caught("vcpu/extra.cppm:1:", "belongs in modules/cppvmm.extra.cppm")

    def test_module_without_a_front_door(self):
        self.add("vcpu/extra.cppm", "export module cppvmm.extra:extra;\n", "INTERFACE")
        self.assert_caught("vcpu/extra.cppm:1:", "cppvmm.extra has no front door")

    def test_two_units_of_one_name(self):
        self.add("vcpu/twice.cpp", "module cppvmm.vcpu:error.impl;\n", "INTERNAL")
        self.assert_caught("vcpu/twice.cpp:1:", "cppvmm.vcpu:error.impl is also in vcpu/error.cpp")

    def test_anything_else_in_modules(self):
        self.add("modules/extra.cppm", "export module cppvmm.vcpu:extra;\n")
        self.assert_caught("modules/extra.cppm:1:", "front doors only")

    def test_source_that_cmake_does_not_list(self):
        self.add("guest_memory/stray.cpp", "module cppvmm.guest_memory:stray;\n")
        self.assert_caught("guest_memory/stray.cpp:1:", "no cppvmm_add_module() lists this file")

    def test_source_that_is_listed_as_a_comment(self):
        self.edit("guest_memory/CMakeLists.txt", r"guest_memory/error\.cppm", r"# \g<0>")
        self.assert_caught("guest_memory/error.cppm:", "no cppvmm_add_module() lists this file")

    def test_interface_that_is_listed_as_internal(self):
        self.add("vcpu/extra.cppm", "export module cppvmm.vcpu:extra;\n", "INTERNAL")
        self.assert_caught("vcpu/extra.cppm:1:", "listed under INTERNAL and belongs under INTERFACE")

    def test_interface_that_imports_an_internal_partition(self):
        self.add("vcpu/inner.cpp", "module cppvmm.vcpu:inner;\n", "INTERNAL")
        self.after_module_line("vcpu/error.cppm", "import :inner;")
        self.assert_caught("vcpu/error.cppm:", "imports the internal partition cppvmm.vcpu:inner")

    def test_source_of_another_module(self):
        self.add("vcpu/lost.cpp", "module cppvmm.guest_memory:lost;\n", "INTERNAL")
        self.assert_caught("vcpu/lost.cpp:1:", "belongs in guest_memory/")
        self.add("hv_ext/kvm/lost.cpp", "module cppvmm.hv_calls:lost;\n", "INTERNAL")
        self.assert_caught("hv_ext/kvm/lost.cpp:1:", "belongs in hv_ext/calls/")

    def test_source_of_no_module(self):
        self.add("vcpu/plain.cpp", "// import cppvmm.vcpu;\nint f() { return 1'000; }\n")
        self.assert_caught("vcpu/plain.cpp:1:", "belongs to no module")

    def test_what_a_comment_or_a_string_says_does_not_count(self):
        self.edit("vcpu/error.cpp", r"\Z", '/*\nimport cppvmm.hv_ext;\n*/ // import :none;\nauto s = "\\"//";\n')
        self.assertEqual(self.run_house("--check"), (0, ""))


unittest.main()
