#!/usr/bin/env bash
# bench.sh [--host|--lab] [FILTER]: measures what cppvmm costs beside its floors and peers (docs/performance.md): prints
# the table, and writes build/bench/summary.json and the plots. FILTER is a regular expression over the names of all
# benchmarks. What needs KVM is measured here, where KVM can be used, else in the lab; --host: only here; --lab: there,
# whatever this machine has.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"
# shellcheck source=tools/place.sh
source "$tools/place.sh"

asked=''
if [[ ${1:-} == --host || ${1:-} == --lab ]]; then
  asked=$1
  shift
fi
if (($# > 1)) || [[ ${1:-} == --* ]]; then die "bench: one filter at most, behind --host or --lab (./dev help)"; fi
filter=${1:-^(beside|against)/}
folder=$root/build/bench
benches=$root/build/release/benches
programs=(guest_memory_benches hv_ext_benches)
of_kvm=vcpu_benches

# shellcheck disable=SC2317 # A step calls it.
# The peer that is written in Rust, as a static library: by the distribution's compiler and from its sources alone. A
# build of it writes beside its manifest, so that it is one of a copy.
make_peer() {
  local peer=$1
  rm -rf "$peer"
  mkdir -p "$peer/.cargo"
  cp -r "$root/benches/peers/vm_memory/." "$peer"
  printf '%s\n' '[source.crates-io]' 'replace-with = "distribution"' \
    '[source.distribution]' 'directory = "/usr/share/cargo/registry"' >"$peer/.cargo/config.toml"
  cd "$peer"
  env -u RUSTC -u RUSTFLAGS -u RUSTUP_TOOLCHAIN PATH=/usr/bin:/bin CARGO_HOME="$peer/.cargo" \
    cargo build --offline --release
}

# Without it, what is measured beside it is skipped.
build_peer() {
  local peer=$root/build/release/peers/vm_memory library is_linked=0
  library=$peer/target/release/libvm_memory_peer.a
  if [[ ! -e $library || -n $(find "$root/benches/peers/vm_memory" -newer "$library" -print -quit) ]]; then
    step "build the peer vm-memory" bench-peer make_peer "$peer" || {
      tail_of bench-peer
      say "so what is measured beside vm-memory is skipped"
    }
  fi
  # The build takes up what there is when it is configured.
  if grep -qs libvm_memory_peer.a "$root/build/release/build.ninja"; then is_linked=1; fi
  if [[ $([[ -e $library ]] && echo 1 || echo 0) != "$is_linked" ]]; then rm -f "$root/build/release/configured"; fi
}

# Without KVM they skip themselves, and say so.
needs_lab() {
  if [[ $asked == --host ]]; then return 1; fi
  # What no filter fits needs no machine.
  "$benches/$of_kvm" --benchmark_list_tests "--benchmark_filter=$filter" 2>/dev/null | grep -q / || return 1
  choose_place "what needs KVM is measured in" "$asked"
  [[ $place == lab ]]
}

need build test bench plot
build_peer
build release "${programs[@]}" "$of_kvm"
if needs_lab; then
  need lab
  "$tools/lab.sh" --get >/dev/null
else
  programs+=("$of_kvm")
fi

rm -rf "$folder"
mkdir -p "$folder"
status=0
for program in "${programs[@]}"; do
  step "run $program" "bench-$program" "$benches/$program" "--benchmark_filter=$filter" \
    "--benchmark_out=$folder/$program.json" --benchmark_out_format=json || {
    status=1
    tail_of "bench-$program"
  }
done
if [[ $place == lab ]]; then
  step "run $of_kvm in the lab" "bench-$of_kvm" "$tools/lab.sh" --fetch "/tmp/benches.json:$folder/$of_kvm.json" -- \
    "$benches/$of_kvm" "--benchmark_filter=$filter" --benchmark_out=benches.json --benchmark_out_format=json || {
    status=1
    tail_of "bench-$of_kvm"
  }
fi
python3 -B "$tools/bench_report.py" "$folder" || status=1
exit "$status"
