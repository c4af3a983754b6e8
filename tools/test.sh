#!/usr/bin/env bash
# test.sh [PRESET] [CTEST ARG...]: builds the tests and runs them.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

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
  run=("$(dirname "$cmake")/ctest" --preset "$preset" -j "$(nproc)" --no-tests=error --output-junit "$junit" "$@")
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
  [[ -e $junit ]] || exit "$((status == 0 ? 1 : status))"
  counts_of "$junit" >"$logs/$preset.counts"
  return "$status"
}

build "$preset"
mkdir -p "$logs"
"$root/build/$preset/tests/support/cppvmm-machine-facts"
trouble=$(python3 "$tools/kvm.py") || say "tests of KVM are skipped: $trouble"
given=$# status=0
test_here "$@" || status=$?
awk -v preset="$preset" '{ passed += $1; failed += $2; skipped += $3; kvm += $4 }
  END {
    printf "%s: %d passed, %d failed, %d skipped; %d ran against a real KVM\n", preset, passed, failed, skipped, kvm
  }' "$logs/$preset.counts"
exit "$status"
