#!/usr/bin/env bash
# test.sh [--host|--lab] [PRESET] [CTEST ARG...]: builds the tests and runs them: all here, where KVM can be used; else
# those that need KVM in the lab, on the newest kernel there is. --host: only here, and without KVM only those that need
# none. --lab: those that need KVM in the lab, whatever this machine has.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"
# shellcheck source=tools/place.sh
source "$tools/place.sh"

asked=''
if [[ ${1:-} == --host || ${1:-} == --lab ]]; then
  asked=$1
  shift
fi
preset=release
if (($# > 0)) && [[ $1 != -* ]]; then
  preset=$1
  shift
fi

# counts_of JUNIT: "passed failed skipped kvm" of a ctest run; kvm: how many that are labelled so did run.
counts_of() {
  awk '
    /^\t<testcase / {
      status = $0
      sub(/.* status="/, "", status)
      sub(/".*/, "", status)
      count[status]++
    }
    /^\t*<property name="cmake_labels" value="([^"]*;)?kvm(;[^"]*)?"/ && status ~ /^(run|fail)$/ { kvm++ }
    END { print count["run"] + 0, count["fail"] + 0, count["notrun"] + count["disabled"] + 0, kvm + 0 }' "$1"
}

# test_here CTEST ARG...: with the arguments of the person's, all that it prints is shown.
test_here() {
  local junit=$root/build/$preset/test-results.xml log=test-$preset status=0 run jobs
  # Some take hundreds of MiB.
  jobs=$(nproc)
  if ((jobs > 8)); then jobs=8; fi
  run=("$(dirname "$cmake")/ctest" --preset "$preset" -j "$jobs" --no-tests=ignore --output-junit "$junit" "$@")
  rm -f "$junit" "$logs/$preset.counts"
  cd "$root"
  if ((given)); then
    "${run[@]}" 2>&1 | tee "$logs/$log.log" || status=$?
  else
    step "test $preset" "$log" "${run[@]}" || status=$?
    if ((status != 0)); then
      # What passed is of no interest now; the output of what failed is.
      grep -vE '^ +Start +[0-9]+: |  Passed +[0-9.]+ sec$' "$logs/$log.log" | head -n 400 >&2 || true
      say "the full log: build/logs/$log.log"
    fi
  fi
  if [[ -e $junit ]]; then
    counts_of "$junit" >"$logs/$preset.counts"
  elif ((status != 0)); then
    exit "$status"
  else
    echo 0 0 0 0 >"$logs/$preset.counts"
  fi
  return "$status"
}

known_preset "$preset" || die "no tests of a preset '$preset': debug, release, asan-ubsan, tsan, coverage"
need build test
trouble=''
if [[ $asked == --host ]] && ! trouble=$(python3 "$tools/kvm.py"); then
  place=none
else
  choose_place "the tests of KVM run in" "$asked"
fi
# What takes a person's password or a download comes first.
if [[ $place == lab ]]; then
  need lab guests
  version=$("$tools/lab.sh" --get)
fi
build "$preset"
mkdir -p "$logs"
"$root/build/$preset/tests/support/cppvmm-machine-facts"

# The person's choice, and what is left out of it here: ctest leaves out what fits all of several -LE.
chosen=() without=''
while (($# > 0)); do
  if [[ $1 == -LE || $1 == --label-exclude ]] && (($# > 1)); then
    without+="${without:+|}$2"
    shift
  else
    chosen+=("$1")
  fi
  shift
done
here=("${chosen[@]}")
if [[ $place != host ]]; then
  here+=(-LE "^kvm\$${without:+|$without}")
elif [[ -n $without ]]; then
  here+=(-LE "$without")
fi
given=$((${#chosen[@]} > 0 || ${#without} > 0))

if [[ $place == none ]]; then say "no test of KVM is run here: $trouble"; fi
status=0 counts=("$logs/$preset.counts")
test_here "${here[@]}" || status=$?
if [[ $place == lab ]]; then
  in_lab=()
  for argument in "${chosen[@]}" ${without:+-LE "$without"}; do in_lab+=(--ctest "$argument"); done
  rm -f "$logs/lab-$version.counts"
  "$tools/lab.sh" --kernel "$version" --preset "$preset" --label '^kvm$' "${in_lab[@]}" || status=$?
  if [[ -e $logs/lab-$version.counts ]]; then
    counts+=("$logs/lab-$version.counts")
  else
    status=1
    say "the lab's tests did not run"
  fi
fi
awk -v preset="$preset" '{ passed += $1; failed += $2; skipped += $3; kvm += $4 }
  END {
    printf "%s: %d passed, %d failed, %d skipped; %d ran against a real KVM\n", preset, passed, failed, skipped, kvm
    # A pattern that fits nothing is a mistake.
    exit !(passed + failed + skipped)
  }' "${counts[@]}" || status=1
exit "$status"
