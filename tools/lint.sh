#!/usr/bin/env bash
# lint.sh: clang-format, clang-tidy, shellcheck and the picture of the modules.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

sources() {
  find "$root"/{modules,guest_memory,vcpu,hv_ext,examples,tests,benches,tools} -type f \
    \( -name '*.cppm' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.c' -o -name '*.h' \) | sort
}

own=$root/build/lint/own_declarations.so
# shellcheck disable=SC2317 # A step calls it.
build_own() {
  mkdir -p "$root/build/lint"
  clang++-19 -std=c++17 -O1 -fPIC -fno-rtti -shared -isystem "$(llvm-config-19 --includedir)" \
    "$tools/clang_tidy/own_declarations.cpp" -o "$own"
}

# shellcheck disable=SC2317 # A step calls it.
# The library and the examples.
tidy() {
  local compiled=$root/build/release/compile_commands.json
  grep -oE '"file": "[^"]*\.(cppm|cpp|c)"' "$compiled" | cut -d '"' -f 4 | sort -u |
    grep -Fxf "$logs/lint.sources" | grep -E "^$root/(modules|guest_memory|vcpu|hv_ext|examples)/" |
    xargs -P "$(nproc)" -n 1 clang-tidy-19 --load "$own" -p "$root/build/release" --quiet --warnings-as-errors='*'
}

status=0
# check WHAT LOG COMMAND...: the others are run all the same.
check() {
  if ! step "$@"; then
    status=1
    tail_of "$2"
  fi
}

need build lint
build release
sources >"$logs/lint.sources"
check "clang-format" lint-format xargs -a "$logs/lint.sources" clang-format-19 --dry-run -Werror
check "shellcheck" lint-shell shellcheck -x -P "$root" "$root/dev" "$root/.ci/run" "$tools"/*.sh "$root"/tests/{lab,tools}/*.sh
check "graph" lint-graph python3 "$root/docs/house.py" --check
must "build a plugin of clang-tidy" lint-plugin build_own
check "clang-tidy" lint-tidy tidy
exit "$status"
