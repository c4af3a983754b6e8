#!/usr/bin/env python3
"""selection.py --whole|--chosen: reads what `ctest --show-only=json-v1` says of the tests that the lab shall run, and
writes a line for each program and for each file that one needs, of four fields with tabs between:

    test  LABEL  FILTER  PATH    LABEL: `kvm`, or `-`; FILTER: for GoogleTest; with --whole, all of a program's tests
    file  -      -       PATH
"""

import json
import sys


def main():
    whole = sys.argv[1] == "--whole"
    names, labels, files = {}, {}, set()
    for test in json.load(sys.stdin)["tests"]:
        program, *arguments = test["command"]
        properties = {entry["name"]: entry["value"] for entry in test.get("properties", [])}
        labels[program] = "kvm" if "kvm" in properties.get("LABELS", []) else "-"
        files.update(properties.get("REQUIRED_FILES", []))
        names.setdefault(program, []).extend(
            argument.removeprefix("--gtest_filter=") for argument in arguments if argument.startswith("--gtest_filter="))
    for program, chosen in names.items():
        print("test", labels[program], "*" if whole else ":".join(chosen), program, sep="\t")
    for path in sorted(files - names.keys()):
        print("file", "-", "-", path, sep="\t")


if __name__ == "__main__":
    main()
