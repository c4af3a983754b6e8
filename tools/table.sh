#!/usr/bin/env bash
# table.sh [--lab|--linux]: what each kind of memory's answer is worth after each writer, on this kernel, as Markdown;
# --lab: and on each kernel of the lab; --linux: instead, how much of what an unmodified Linux of 2 GiB has free is in its
# answer, on each kernel of the lab.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

(($# < 2)) || die "table: one option at most (./dev help)"
program=$root/build/release/tests/oracle/cppvmm-evidence-table
status=0
case ${1:-} in
  '' | --lab)
    build release cppvmm-evidence-table
    "$program" || status=$?
    if [[ ${1:-} == --lab ]]; then "$tools/lab.sh" --kernel all --numa 2 --timeout 3000 -- "$program" || status=$?; fi
    ;;
  --linux)
    # A kernel's own image and modules are its guest's.
    versions=$("$tools/lab.sh" --get --kernel all)
    for version in $versions; do
      folder=$root/build/lab/kernels/$version
      "$tools/lab.sh" --kernel "$version" --memory 4G --timeout 1800 \
        --include "$root/build/release/examples/boot/cppvmm-boot" --include "$folder/vmlinuz" \
        --include "$folder/guests" --include "$root/tests/lab/linux_table.sh" -- sh /linux_table.sh || status=$?
    done
    ;;
  *) die "table: no option $1 (./dev help)" ;;
esac
exit "$status"
