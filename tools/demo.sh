#!/usr/bin/env bash
# demo.sh: a guest that zeroes all its memory beside one that asks first, as a table.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

program=$root/build/release/examples/boot/cppvmm-boot
out=$root/build/demo

need build
trouble=$(python3 "$tools/kvm.py") || die "$trouble"
build_example cppvmm-boot
mkdir -p "$out"
rm -f "$out"/*.json
must "a guest with 64 MiB zeroes all of it" demo-off \
  "$program" --memory 64M --hypercalls off --json "$out/off.json"
must "the same guest asks first; every page of the answer is audited" demo-auto \
  "$program" --memory 64M --hypercalls auto --audit --json "$out/auto.json"
python3 "$root/examples/boot/compare.py" "$out/off.json" "$out/auto.json"
