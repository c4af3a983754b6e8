#!/usr/bin/env bash
# build.sh [PRESET [TARGET...]]: configures when needed, and builds the targets or all. Sourced, it brings `build`.
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Those that have tests.
known_preset() { [[ $1 =~ ^(debug|release|asan-ubsan|tsan|coverage)$ ]]; }

# configure PRESET FOLDER, which the preset configures.
configure() {
  must "configure $1" "configure-$1" "$cmake" -S "$root" --preset "$1"
  # The preset that was used, once it was.
  echo "$1" >"$2/configured"
}

# lock FOLDER, unlock: two builds in one folder would break each other's files.
lock() {
  mkdir -p "$root/build"
  exec {lock_of_folder}>"$1.lock"
  if flock -n "$lock_of_folder"; then return; fi
  say "waiting for another build in ${1#"$root/"}"
  flock "$lock_of_folder"
}
unlock() { exec {lock_of_folder}>&-; }

# build PRESET [TARGET...]
build() {
  local preset=$1 dir=$root/build/$1 targets=("${@:2}") what='' configured=''
  known_preset "$preset" || [[ $preset == fuzz ]] || die "no preset '$preset': debug, release, asan-ubsan, tsan, coverage, fuzz"
  case $preset in
    fuzz) need build instrumented ;;
    *san | coverage) need build test instrumented ;;
    *) need build test ;;
  esac
  if ((${#targets[@]} == 0)); then targets=(all); fi
  if (($# == 2)); then what=": $2"; fi
  lock "$dir"
  if [[ -e $dir/configured ]]; then configured=$(<"$dir/configured"); fi
  if [[ $configured != "$preset" || ! -e $dir/build.ninja || $root/CMakePresets.json -nt $dir/configured ]]; then
    configure "$preset" "$dir"
  fi
  build_targets "$preset" "$what" "${targets[@]}"
  unlock
}

# build_example TARGET: in release's folder, of which no more is configured than that takes, if nothing is yet.
build_example() {
  local dir=$root/build/release
  need build
  lock "$dir"
  if [[ ! -e $dir/build.ninja ]]; then
    configure examples "$dir"
  elif [[ -s $dir/configured && $root/CMakePresets.json -nt $dir/configured ]]; then
    configure "$(<"$dir/configured")" "$dir"
  fi
  build_targets release ": $1" "$1"
  unlock
}

# build_targets PRESET WHAT TARGET...
build_targets() {
  local dir=$root/build/$1
  if [[ $(ninja -C "$dir" -n "${@:3}" 2>/dev/null | tail -n 1) == "ninja: no work to do." ]]; then return; fi
  must "build $1$2" "build-$1" "$cmake" --build "$dir" --target "${@:3}"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then build "${@:-release}"; fi
