#!/usr/bin/env bash
# boot.sh [--host|--lab] ARG...: cppvmm-boot with these, here or in the lab. There, the files that they name go into the
# machine and come back, and what is typed reaches the guest's console.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"
# shellcheck source=tools/place.sh
source "$tools/place.sh"

program=$root/build/release/examples/boot/cppvmm-boot
asked=
if [[ ${1:-} == --host || ${1:-} == --lab ]]; then
  asked=$1
  shift
fi

build_example cppvmm-boot
# A device that is named is this machine's. Help and mistakes need none: with another that is no KVM, the program says
# these and does nothing else.
if [[ " $*" == *' --kvm-device'* ]]; then exec "$program" "$@"; fi
status=0
"$program" --kvm-device /dev/null "$@" >/dev/null 2>&1 </dev/null || status=$?
if ((status != 1)); then exec "$program" "$@"; fi
choose_place "the guest runs in" "$asked"
if [[ $place == host ]]; then exec "$program" "$@"; fi

# ------------------------------------------------------------------------------------------------------- into the lab

# mebibytes SIZE, as cppvmm-boot takes it.
mebibytes() {
  local digits=${1%%[!0-9]*} number unit
  number=$((10#${digits:-0}))
  unit=${1:${#digits}:1}
  case ${unit^^} in
    '') echo $((number / 1048576)) ;;
    K) echo $((number / 1024)) ;;
    M) echo "$number" ;;
    G) echo $((number * 1024)) ;;
    *) echo $((number * 1024 * 1024)) ;;
  esac
}

arguments=() options=() memory=128 huge='' console=''
while (($# > 0)); do
  option=${1%%=*}
  case $option in
    --json | --map | --kernel | --initrd | --memory | --backing)
      value=${1#*=}
      if [[ $1 != *=* ]]; then
        value=$2
        shift
      fi
      path=$(realpath -m -- "$value")
      # In the machine, files have names of their own.
      inside=/host/${option#--}
      case $option in
        --memory) memory=$(mebibytes "$value") ;;
        --backing) if [[ $value == hugetlb* ]]; then huge=yes; fi ;;
        --kernel | --initrd)
          console=yes
          # What is not there is for cppvmm-boot to say.
          if [[ -f $path ]]; then
            options+=(--include "$path:$inside")
            value=$inside
          fi
          ;;
        --json | --map)
          if [[ $option$value != --json- ]]; then
            options+=(--fetch "$inside:$path")
            value=$inside
          fi
          ;;
      esac
      arguments+=("$option" "$value")
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

# The machine's other files and programs take little.
options+=(--memory $((memory + 1024 < 3072 ? 3072 : memory + 1024))M --timeout 0 --include "$program")
settings=''
if [[ -n $huge ]]; then settings="echo $((memory / 2)) >/proc/sys/vm/nr_hugepages;"; fi
# What the program would find out of a terminal.
variables=()
if [[ -t 1 ]]; then
  variables+=(COLUMNS="$(tput cols 2>/dev/null || echo 80)")
  if [[ ${TERM:-dumb} != dumb ]]; then variables+=(CLICOLOR_FORCE=1); fi
fi
if [[ -n ${NO_COLOR:-} ]]; then variables+=(NO_COLOR="$NO_COLOR"); fi

"$tools/lab.sh" --get >/dev/null
before=
if [[ -n $console ]]; then
  # Only a Linux guest reads what is typed.
  options+=(--stdin)
  if [[ -t 0 ]]; then
    before=$(stty -g)
    stty -icanon -echo -iexten -icrnl -inlcr
  fi
fi

# In the background, so that a signal ends it at once, and with it the machine.
# shellcheck disable=SC2016 # The machine's shell expands it.
"$tools/lab.sh" "${options[@]}" -- sh -c "$settings"' exec "$@"' boot \
  env "${variables[@]}" /cppvmm-boot "${arguments[@]}" <&0 &
machine=$!
# shellcheck disable=SC2317 # Traps call it.
stop() {
  kill "$machine" 2>/dev/null || true
  wait "$machine" || true
  exit "$1"
}
# shellcheck disable=SC2317
restore_terminal() {
  if [[ -n $before ]]; then stty "$before" || true; fi
}
trap restore_terminal EXIT
trap 'stop 130' INT
trap 'stop 143' TERM
status=0
wait "$machine" || status=$?
exit "$status"
