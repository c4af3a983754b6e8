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
  local junit=$root/build/$preset/test-results.xml log=test-$preset status=0 run
  run=("$(dirname "$cmake")/ctest" --preset "$preset" -j "$(nproc)" --no-tests=ignore --output-junit "$junit" "$@")
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

build "$preset"
mkdir -p "$logs"
"$root/build/$preset/tests/support/cppvmm-machine-facts"
if [[ $asked == --host ]] && ! trouble=$(python3 "$tools/kvm.py"); then
  say "no test of KVM is run here: $trouble"
  place=none
else
  choose_place "the tests of KVM run in" "$asked"
fi

given=$# status=0 counts=("$logs/$preset.counts")
case $place in
  host) test_here "$@" || status=$? ;;
  none) test_here -LE kvm "$@" || status=$? ;;
  lab)
    version=$("$tools/lab.sh" --get)
    test_here -LE kvm "$@" || status=$?
    chosen=()
    for argument in "$@"; do chosen+=(--ctest "$argument"); done
    "$tools/lab.sh" --kernel "$version" --preset "$preset" --label '^kvm$' "${chosen[@]}" || status=$?
    counts+=("$logs/lab-$version.counts")
    ;;
esac
awk -v preset="$preset" '{ passed += $1; failed += $2; skipped += $3; kvm += $4 }
  END {
    printf "%s: %d passed, %d failed, %d skipped; %d ran against a real KVM\n", preset, passed, failed, skipped, kvm
    # A pattern that fits nothing is a mistake.
    exit !(passed + failed + skipped)
  }' "${counts[@]}" || status=1
exit "$status"
