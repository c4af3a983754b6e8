#!/usr/bin/env bash
# fuzz.sh [TARGET] [--seconds N]: builds the fuzzers of tests/fuzz with sanitizers, and runs each, or TARGET, for N
# seconds (60). Each begins with the inputs in tests/fuzz/corpus, and with those that it has found before, which are in
# build/fuzz/corpus. What makes one fail is kept in build/fuzz/finds.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

mapfile -t known < <(sed -nE 's/^cppvmm_add_fuzzer\((\w+)\)$/\1/p' "$root/tests/fuzz/CMakeLists.txt")
chosen=() seconds=60
while (($# > 0)); do
  case $1 in
    --seconds)
      [[ ${2:-} =~ ^[1-9][0-9]{0,6}$ ]] || die "fuzz: --seconds takes a number of seconds"
      seconds=$2
      shift
      ;;
    *)
      [[ " ${known[*]} " == *" $1 "* ]] || die "fuzz: no target '$1': ${known[*]}"
      chosen+=("$1")
      ;;
  esac
  shift
done
if ((${#chosen[@]} == 0)); then chosen=("${known[@]}"); fi

build fuzz "${chosen[@]/#/cppvmm-fuzz-}"
symbolizer=external_symbolizer_path=/usr/bin/llvm-symbolizer-19
# What was freed is kept for a while; much of it would slow down the kernel's looks at this process.
export ASAN_OPTIONS=quarantine_size_mb=16:detect_stack_use_after_return=1:strict_string_checks=1:$symbolizer
export UBSAN_OPTIONS=print_stacktrace=1:$symbolizer
finds=$root/build/fuzz/finds
status=0
for name in "${chosen[@]}"; do
  program=$root/build/fuzz/tests/fuzz/cppvmm-fuzz-$name
  corpus=$root/build/fuzz/corpus/$name
  log=$logs/fuzz-$name.log
  mkdir -p "$corpus" "$finds"
  folders=("$corpus")
  if [[ -d $root/tests/fuzz/corpus/$name ]]; then folders+=("$root/tests/fuzz/corpus/$name"); fi
  # No input takes long, or much memory: what a guest does is bounded.
  if step "fuzz $name" "fuzz-$name" "$program" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 \
    -malloc_limit_mb=256 -max_len=1024 -len_control=10 -artifact_prefix="$finds/$name-" -print_final_stats=1 "${folders[@]}"; then
    sed -nE 's/^stat::number_of_executed_units: +//p' "$log" |
      while read -r runs; do
        edges=$(grep -oE ' cov: [0-9]+' "$log" | tail -n 1 | tr -dc '0-9')
        echo "$name: $runs inputs, $edges edges, nothing found"
      done
  else
    status=1
    grep -nE 'does not hold|ERROR: |runtime error: |SUMMARY: ' "$log" | head -n 5 >&2 || true
    find=$(sed -nE 's/^.*Test unit written to //p' "$log" | tail -n 1)
    if [[ -n $find ]]; then
      echo "$name: found ${find#"$root"/}"
      say "again: build/fuzz/tests/fuzz/cppvmm-fuzz-$name ${find#"$root"/}"
    fi
    say "the full log: ${log#"$root"/}"
  fi
done
exit "$status"
