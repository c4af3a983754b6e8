#!/usr/bin/env bash
# demo.sh [--host|--lab]: a guest that zeroes all its memory beside one that asks first, as a table; and what host memory
# the two take where a balloon gives most of it back.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"
# shellcheck source=tools/place.sh
source "$tools/place.sh"

program=$root/build/release/examples/boot/cppvmm-boot
out=$root/build/demo

case ${1:-} in
  '' | --host | --lab) (($# < 2)) || die "demo: one option at most" ;;
  *) die "demo: no option $1 (--host, --lab)" ;;
esac

need build
choose_place "the guests run in" "${1:-}"
# What takes a person's password or a download comes first.
if [[ $place == lab ]]; then "$tools/lab.sh" --get >/dev/null; fi
build_example cppvmm-boot
mkdir -p "$out"
rm -f "$out"/*.json

balloon=(--memory 64M --balloon-target 16M)
if [[ $place == host ]]; then
  must "a guest with 64 MiB zeroes all of it" demo-off \
    "$program" --memory 64M --hypercalls off --json "$out/off.json"
  must "the same guest asks first; every page of the answer is audited" demo-auto \
    "$program" --memory 64M --hypercalls auto --audit --json "$out/auto.json"
  must "with a balloon target of 16 MiB, a guest zeroes all of it" demo-untold \
    "$program" "${balloon[@]}" --enlightenments hv-memory-hint --json "$out/untold.json"
  must "the same guest asks first" demo-told \
    "$program" "${balloon[@]}" --json "$out/told.json"
  python3 "$root/examples/boot/compare.py" --balloon "$out/untold.json" "$out/told.json" "$out/off.json" "$out/auto.json"
  exit
fi

# One machine for all of them. A kernel whose KVM does not forward the calls has one way for them less.
fetch=()
for run in off kernel split user untold told; do fetch+=(--fetch "/tmp/$run.json:$out/$run.json"); done
# shellcheck disable=SC2016 # The machine's shell expands it.
must "a guest with 64 MiB zeroes all of it, then asks first, in each way there is; all answers are audited; then with a \
balloon target" demo-lab "$tools/lab.sh" --include "$program" "${fetch[@]}" -- sh -c '
    /cppvmm-boot --memory 64M --hypercalls off --json off.json || exit
    for way in kernel split user; do
      /cppvmm-boot --memory 64M --hypercalls $way --audit --json $way.json 2>why && continue
      cat why >&2
      grep -qE "KVM does not forward|KVM has no Hyper-V" why || exit 1
    done
    /cppvmm-boot "$@" --enlightenments hv-memory-hint --json untold.json && /cppvmm-boot "$@" --json told.json
  ' demo "${balloon[@]}"
asked=()
for run in kernel split user; do
  if [[ -e $out/$run.json ]]; then asked+=("$out/$run.json"); fi
done
python3 "$root/examples/boot/compare.py" --emulated --balloon "$out/untold.json" "$out/told.json" "$out/off.json" \
  "${asked[@]}"
