#!/usr/bin/env bash
# lab.sh [OPTIONS] [-- PROGRAM [ARG...]]: the tests in an emulated machine on each kernel of the distribution, or PROGRAM
# in it (tests/lab/README.md). What a person gives is in ./dev help; the rest of the tree gives also:
#   --get              only get what a machine is made of
#   --label REGEX      only the tests with a ctest label that fits
#   --ctest ARG        choose among them by a ctest argument; may be repeated
#   --stdin            what is typed reaches PROGRAM
#   --fetch PATH:FILE  a file that PROGRAM leaves at PATH comes to FILE here; may be repeated
# shellcheck disable=SC2317 # Traps and steps call functions.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

lab=$root/tests/lab
kernels=$root/build/lab/kernels

# What --kernel all stands for, the one to prefer first.
versions_to_have() {
  case $distribution in
    ubuntu*) echo 6.8 6.12 6.1 ;;
    *) echo 6.12 6.1 ;;
  esac
}

updated=
update() {
  ask_for_root lab
  must "asking apt for kernels" lab-update apt_get update
  updated=yes
}

# get_kernel VERSION: gets it, if it is not here; fails, saying so, where the distribution has none.
get_kernel() {
  local version=$1 folder=$kernels/$1 what="getting Linux $1 for the lab"
  if "$lab/kernel.sh" --made "$folder"; then
    if [[ -z $updated ]]; then return; fi
    what="looking for a newer Linux $version"
  fi
  if ! "$lab/kernel.sh" --find "$version" >/dev/null; then
    if [[ -z $updated ]]; then update; fi
    if ! "$lab/kernel.sh" --find "$version" >/dev/null; then
      if [[ $distribution == "debian 12" && $version == 6.12 ]]; then
        add_backports "Linux 6.12"
        update
      fi
      if ! "$lab/kernel.sh" --find "$version" >/dev/null; then
        say "apt has no Linux $version for $distribution: nothing runs on it here"
        return 1
      fi
    fi
  fi
  must "$what" "lab-kernel-$version" "$lab/kernel.sh" "$version" "$folder"
}

# build_modules VERSION: the modules that the tests load in guests of that kernel, when they are not built.
build_modules() {
  if "$lab/modules.sh" --made "$kernels/$1"; then return; fi
  need guests
  must "building modules for guests of Linux $1" "lab-modules-$1" "$lab/modules.sh" "$kernels/$1"
}

# build_path PATH: builds it, if it lies where something is built.
build_path() {
  local path preset
  path=$(realpath -m "$1")
  if [[ $path == "$kernels"/*/guests ]]; then
    path=$(basename "$(dirname "$path")")
    get_kernel "$path" && build_modules "$path"
    return
  fi
  if [[ $path != "$root"/build/*/* || -d $path ]]; then return; fi
  path=${path#"$root/build/"}
  preset=${path%%/*}
  path=${path#*/}
  if [[ $preset == release && $path == examples/* ]]; then
    build_example "$path"
  elif known_preset "$preset"; then
    build "$preset" "$path"
  fi
}

# ------------------------------------------------------------------------------------------------------------- options

kernel='' preset=release host='' get='' wants_update='' label='kvm|kernel'
versions=() options=() includes=() chosen=()
while (($# > 0)); do
  case $1 in
    --kernel | --memory | --cpus | --numa | --timeout | --include | --fetch | --preset | --label | --ctest)
      (($# > 1)) || die "$1 needs a value"
      case $1 in
        --kernel) kernel=$2 ;;
        --preset) preset=$2 ;;
        --label) label=$2 ;;
        --ctest) chosen+=("$2") ;;
        --include)
          includes+=("${2%:*}")
          options+=("$1" "$2")
          ;;
        *) options+=("$1" "$2") ;;
      esac
      shift 2
      ;;
    --stdin)
      options+=("$1")
      shift
      ;;
    --update)
      wants_update=yes
      shift
      ;;
    --get)
      get=yes
      shift
      ;;
    --host)
      host=yes
      shift
      ;;
    --)
      shift
      (($# > 0)) || die "no program after --"
      break
      ;;
    *) die "lab: no option $1 (./dev help)" ;;
  esac
done

need build lab
if [[ -n $host ]]; then
  (($# == 0 && ${#options[@]} == 0)) || die "--host runs the tests alone: with --kernel, --preset or --update"
fi

# --------------------------------------------------------------------------------------------------------- preparation

if [[ -n $wants_update ]]; then update; fi
if [[ -n $kernel && $kernel != all ]]; then
  get_kernel "$kernel" || exit 1
  versions=("$kernel")
else
  for version in $(versions_to_have); do
    if get_kernel "$version"; then versions+=("$version"); fi
    # A program runs on one kernel, unless all are asked for; so does what is chosen for the newest.
    if ((${#versions[@]} > 0)) && [[ $kernel != all && (-n $get || $# -gt 0) ]]; then break; fi
  done
  ((${#versions[@]} > 0)) || die "there is no kernel for the lab"
fi
if [[ -n $get ]]; then
  echo "${versions[@]}"
  exit
fi

for one in "${includes[@]}"; do build_path "$one"; done
if (($# > 0)) && [[ $1 == */* ]]; then build_path "$1"; fi
mkdir -p "$logs"

# ------------------------------------------------------------------------------------------------------------ a program

if (($# > 0)); then
  # run_in VERSION COMMAND...: in this process's place, so that who ends it ends the machine.
  run_in() {
    exec env LAB_CONSOLE="$logs/lab-$1.console" "$lab/machine.sh" --kernel "$kernels/$1" "${options[@]}" -- "${@:2}"
  }
  if ((${#versions[@]} == 1)); then run_in "${versions[0]}" "$@"; fi
  status=0
  for version in "${versions[@]}"; do
    one=0
    (run_in "$version" "$@") || one=$?
    if ((status == 0)); then status=$one; fi
  done
  exit "$status"
fi

# ------------------------------------------------------------------------------------- the tests, on the host's own KVM

if [[ -n $host ]]; then
  for version in "${versions[@]}"; do build_modules "$version"; done
  status=0
  for version in "${versions[@]}"; do
    say "guests of the tests: Linux $version"
    CPPVMM_LINUX=$kernels/$version/vmlinuz CPPVMM_LINUX_FLAT=$kernels/$version/flat \
      CPPVMM_BUSYBOX=$kernels/$version/busybox CPPVMM_GUEST_MODULES=$kernels/$version/guests "$tools/test.sh" --host "$preset" -L kvm || status=$?
  done
  exit "$status"
fi

# ------------------------------------------------------------------------------------------------ the tests, in machines

build "$preset" lab_tests
dir=$root/build/$preset
# Which tests, and what they need: a line each, as selection.py says.
selection=$dir/lab-selection
"$(dirname "$cmake")/ctest" --test-dir "$dir" --show-only=json-v1 -L "$label" "${chosen[@]}" |
  python3 "$lab/selection.py" "$( ((${#chosen[@]} == 0)) && echo --whole || echo --chosen)" >"$selection"
if [[ ! -s $selection ]]; then
  # What was chosen may all be elsewhere.
  for version in "${versions[@]}"; do echo 0 0 0 0 >"$logs/lab-$version.counts"; done
  exit
fi
for version in "${versions[@]}"; do build_modules "$version"; done
programs=$(awk -F '\t' '$1 == "test" { sub(".*/", "", $4); printf " %s", $4 }' "$selection")

facts=$dir/tests/support/cppvmm-machine-facts
# Tests that make file systems skip those that this host cannot make.
tools_of_tests=()
for tool in mkfs.erofs mksquashfs; do
  if path=$(command -v "$tool"); then tools_of_tests+=(--include "$path:usr/bin/$tool"); fi
done

# log_of VERSION LABEL PART: what the machine for these tests says.
log_of() { echo "$logs/lab-$1-${2/#-/memory}-$3"; }

# run_tests PROCESSOR VERSION LABEL PART PARTS: that part of those with the label, in a machine of their own.
run_tests() {
  local own=$selection-$2-$3-$4 path needs=() nodes=() guests=()
  awk -F '\t' -v label="$3" '$1 == "file" || $2 == label' "$selection" >"$own"
  if ! grep -q '^test' "$own"; then return; fi
  while IFS=$'\t' read -r _ _ _ path; do needs+=(--include "$path:$path"); done <"$own"
  # Memory moves between two nodes. Guests have a machine of one CPU: on an emulated one of two, some crash
  # (tests/lab/README.md).
  if [[ $3 == - ]]; then
    nodes=(--numa 2)
  else
    for path in vmlinuz flat guests; do guests+=(--include "$kernels/$2/$path"); done
  fi
  exec env LAB_PROCESSOR="$1" LAB_CONSOLE="$(log_of "${@:2:3}").console" "$lab/machine.sh" --kernel "$kernels/$2" \
    --timeout 3600 "${nodes[@]}" "${options[@]}" "${tools_of_tests[@]}" "${needs[@]}" "${guests[@]}" \
    --include "$facts" --include "$own:selection" --include "$lab/tests.sh" -- sh /tests.sh "${@:3}"
}

# A machine takes one processor, so as many run at once as there are.
declare -A machines=()
stop_machines() {
  end_ticker
  if ((${#machines[@]} > 0)); then kill "${!machines[@]}" 2>/dev/null || true; fi
}
trap stop_machines EXIT

# run_machines: each says what it does in a log of its own.
run_machines() {
  local status=0 ended one processors=() version label part parts
  for ((one = $(nproc) - 1; one >= 0; one--)); do processors+=("$one"); done
  for label in kvm -; do
    # Guests take long: in two machines, none of which is left to end alone.
    parts=1
    if [[ $label == kvm ]] && ((${#chosen[@]} == 0)); then parts=2; fi
    for version in "${versions[@]}"; do
      for ((part = 1; part <= parts; part++)); do
        if ((${#processors[@]} == 0)); then
          one=0
          wait -n -p ended "${!machines[@]}" || one=$?
          if ((one != 0)); then status=$one; fi
          processors+=("${machines[$ended]}")
          unset "machines[$ended]"
        fi
        one=${processors[-1]}
        unset 'processors[-1]'
        echo "lab: the log is $(log_of "$version" "$label" "$part").log"
        run_tests "$one" "$version" "$label" "$part" "$parts" >"$(log_of "$version" "$label" "$part").log" 2>&1 &
        machines[$!]=$one
      done
    done
  done
  for one in "${!machines[@]}"; do wait "$one" || status=$?; done
  machines=()
  return "$status"
}

status=0
for version in "${versions[@]}"; do rm -f "$logs/lab-$version"{,-*}.{counts,log}; done
names=${versions[*]}
step "the tests on Linux ${names// / and }" lab run_machines || status=$?
for version in "${versions[@]}"; do cat "$logs/lab-$version"-*.log >"$logs/lab-$version.log" 2>/dev/null || true; done
for version in "${versions[@]}"; do
  log=$logs/lab-$version.log
  awk -v name="$version" -v whole=$((${#chosen[@]} == 0)) -v expected="$programs" -v counts="$logs/lab-$version.counts" -f "$lab/summary.awk" "$log" ||
    status=1
  grep '^lab: the machine stopped\|^lab: stopped\|^lab: there is no' "$log" >&2 || true
  say "the full log: ${log#"$root"/}"
done
exit "$status"
