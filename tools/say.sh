# shellcheck shell=bash
# What is said while work is done, and the log of each step; sourced by what is beside it, and in the folder `root`.
# All progress goes to standard error: standard output is for what was asked for.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
# shellcheck disable=SC2034 # Where each part of the tree's commands is.
tools=$root/tools
logs=$root/build/logs

say() { printf '%s\n' "$*" >&2; }

die() {
  say "dev: $*"
  exit 1
}

elapsed() {
  if (($1 < 60)); then printf '%d s' "$1"; else printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); fi
}

ticker=
end_ticker() {
  if [[ -n $ticker ]]; then
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    ticker=
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
  fi
}
trap end_ticker EXIT
trap 'exit 130' INT

# How far a log has come: ninja's [n/m], ctest's n/m, what apt unpacks and sets up, what cppvmm-boot says, the test
# that runs in the lab, whose machines have logs of their own, or the benchmark that has run.
progress() {
  local log
  log=$(sed -nE 's/^lab: the log is (.*)/\1/p' "$1" 2>/dev/null | tail -n 1 || true)
  tail -c 4096 "${log:-$1}" 2>/dev/null | tr '\r' '\n' |
    sed -nE 's/^(\[[0-9]+\/[0-9]+\]).*/\1/p; s/^ *([0-9]+\/[0-9]+) Test +#[0-9]+: ([^ ]+).*/\1 \2/p;
             s/^(Get:[0-9]+|Unpacking|Setting up) .*/&/p; s/^cppvmm-boot: (.*)/\1/p
             s/^\[ RUN      \] //p; s/^lab: (begin |passed )//p
             s/^(beside|against)\/(.*)\/iterations:1\/.*/\2/p' | tail -n 1 | cut -c 1-60 || true
}

tick() {
  local what=$1 log=$2 start=$3 never
  # Waits in the shell itself: a sleep would outlive it, and hold our standard error open.
  exec {never}<> <(:)
  while ! read -r -t "$([[ -t 2 ]] && echo 1 || echo 30)" -u "$never" && kill -0 $$; do
    if [[ -t 2 ]]; then
      printf '\r\033[K%s ... %s  %s' "$what" "$(elapsed $((SECONDS - start)))" "$(progress "$log")" >&2
    else
      say "$what ... $(elapsed $((SECONDS - start)))  $(progress "$log")"
    fi
  done
}

# step WHAT LOG COMMAND...: runs COMMAND with its output in build/logs/LOG.log; says what runs and how long it took.
# The command is in the foreground, so that Ctrl-C reaches it.
step() {
  local what=$1 log=$logs/$2.log start=$SECONDS status=0
  shift 2
  mkdir -p "$logs"
  if [[ -t 2 ]]; then printf '%s ...' "$what" >&2; else say "$what ..."; fi
  : >"$log"
  tick "$what" "$log" "$start" &
  ticker=$!
  "$@" >"$log" 2>&1 </dev/null || status=$?
  end_ticker
  if ((status == 0)); then
    say "$what: $(elapsed $((SECONDS - start)))"
  else
    say "$what: failed after $(elapsed $((SECONDS - start)))"
  fi
  return "$status"
}

# must WHAT LOG COMMAND...: a step that the rest needs.
must() {
  step "$@" || {
    tail_of "$2"
    exit 1
  }
}

# tail_of LOG: what of a failed step's output a person wants to see first, and where the rest is.
tail_of() {
  local log=$logs/$1.log first
  first=$(grep -nm 1 -E '^FAILED:|^CMake Error|error:' "$log" | cut -d : -f 1 || true)
  if [[ -n $first ]]; then
    sed -n "$first,$((first + 39))p" "$log" | cut -c 1-400 >&2
  else
    tail -n 30 "$log" | cut -c 1-400 >&2
  fi
  say "the full log: ${log#"$root"/}"
}
