"""readme_test.py ROOT: the README's C++ is a part of examples/embed, which is compiled and run; its links lead somewhere."""

import pathlib
import re
import sys
import textwrap
import unittest

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
README = (ROOT / "README.md").read_text()


class Readme(unittest.TestCase):
    def test_cpp_is_that_of_the_example(self):
        blocks = re.findall(r"^```cpp\n(.*?)^```$", README, flags=re.M | re.S)
        self.assertTrue(blocks, "the README shows no C++")
        lines = (ROOT / "examples/embed/embed.cpp").read_text().splitlines()
        for block in blocks:
            block = block.splitlines()
            with self.subTest(block[0]):
                parts = (lines[i : i + len(block)] for i in range(len(lines)))
                self.assertTrue(any(textwrap.dedent("\n".join(part)).splitlines() == block for part in parts), block)

    def test_links_lead_somewhere(self):
        links = re.findall(r"\]\(([^):#]+)\)", README)
        self.assertTrue(links)
        for link in links:
            self.assertTrue((ROOT / link).exists(), link)

    def test_commands_are_those_of_dev(self):
        known = re.findall(r"^\./dev (\w+)", (ROOT / "dev").read_text(), flags=re.M)
        for command in re.findall(r"\./dev (\w+)", README):
            self.assertIn(command, known + ["help"])


unittest.main()
