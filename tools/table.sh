#!/usr/bin/env bash
# table.sh [--lab|--linux|--heat]: what each kind of memory's answer is worth after each writer, on this kernel, as Markdown;
# --lab: and on each kernel of the lab; --linux: instead, how much of what an unmodified Linux of 2 GiB has free is in its
# answer, on each kernel of the lab; --heat: how much of what such a guest frees the host has back, and the plot of it.
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
  --heat)
    need plot
    versions=$("$tools/lab.sh" --get --kernel all)
    newest=${versions%% *}
    folder=$root/build/heat
    rm -rf "$folder"
    mkdir -p "$folder"
    for version in $versions; do
      kernel=$root/build/lab/kernels/$version
      fetches=()
      for log in {kernel,split,user}-{anonymous,memfd,hugetlb}; do
        fetches+=(--fetch "/tmp/heat-$log.log:$folder/$version-$log.log")
      done
      "$tools/lab.sh" --kernel "$version" --memory 4G --timeout 3600 "${fetches[@]}" \
        --include "$root/build/release/examples/boot/cppvmm-boot" --include "$kernel/vmlinuz" \
        --include "$kernel/guests" --include "$root/tests/lab/linux_heat.sh" -- sh /linux_heat.sh 2G 256 512 512 || status=$?
    done
    python3 "$tools/heat_plot.py" "$folder/heat.svg" "A Linux guest of 2 GiB fills 1 GiB of its memory and frees it" \
      anonymous="$folder/$newest-kernel-anonymous.log" memfd="$folder/$newest-kernel-memfd.log" || exit
    say "the plot: build/heat/heat.svg"
    ;;
  *) die "table: no option $1 (./dev help)" ;;
esac
exit "$status"
