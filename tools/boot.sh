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
# Help and mistakes need no KVM: where there is none, nothing but its options is looked at before that is said.
if [[ " $*" != *' --kvm-device'* ]]; then
  status=0
  "$program" --kvm-device /dev/null "$@" >/dev/null 2>&1 </dev/null || status=$?
  if ((status != 1)); then exec "$program" "$@"; fi
fi
choose_place "the guest runs in" "$asked"
if [[ $place == host ]]; then exec "$program" "$@"; fi

# ------------------------------------------------------------------------------------------------------- into the lab

# mebibytes SIZE, as cppvmm-boot takes it.
mebibytes() {
  local bytes
  bytes=$(sed -E 's/iB$|B$//' <<<"${1^^}" | numfmt --from=iec 2>/dev/null) || bytes=0
  echo $(((bytes + 1048575) / 1048576))
}

arguments=() options=() memory=128 huge='' console=''
while (($# > 0)); do
  option=${1%%=*}
  case $option in
    --json | --map | --kernel | --initrd | --memory | --backing)
      if [[ $1 == *=* ]]; then
        value=${1#*=}
        shift
      elif (($# > 1)); then
        value=$2
        shift 2
      else
        break
      fi
      path=$(realpath -m -- "$value")
      case $option in
        --memory) memory=$(mebibytes "$value") ;;
        --backing) [[ $value != hugetlb* ]] || huge=yes ;;
        --kernel | --initrd)
          console=yes
          # What is not there is for cppvmm-boot to say.
          if [[ -f $path ]]; then
            options+=(--include "$path:/host$path")
            value=/host$path
          fi
          ;;
        --json | --map)
          if [[ $value != - || $option == --map ]]; then
            options+=(--fetch "/host$path:$path")
            value=/host$path
          fi
          ;;
      esac
      arguments+=("$option" "$value")
      ;;
    *)
      arguments+=("$1")
      shift
      ;;
  esac
done
arguments+=("$@")

# The machine's other files and programs take little.
machine_memory=$((memory + 1024 < 3072 ? 3072 : memory + 1024))M
settings=()
if [[ -n $huge ]]; then settings+=("echo $((memory / 2)) >/proc/sys/vm/nr_hugepages;"); fi
# What the program would find out of a terminal.
variables=()
if [[ -t 1 ]]; then variables+=(COLUMNS="$(tput cols 2>/dev/null || echo 80)" CLICOLOR_FORCE=1); fi
for variable in NO_COLOR TERM; do
  if [[ -n ${!variable:-} ]]; then variables+=("$variable=${!variable}"); fi
done

"$tools/lab.sh" --get >/dev/null
before=
restore_terminal() {
  end_ticker
  if [[ -n $before ]]; then stty "$before" || true; fi
}
trap restore_terminal EXIT
if [[ -n $console && -t 0 ]]; then
  before=$(stty -g)
  stty -icanon -echo -iexten -icrnl -inlcr
fi
# shellcheck disable=SC2016 # The machine's shell expands it.
"$tools/lab.sh" --memory "$machine_memory" --timeout 0 --stdin --include "$program" "${options[@]}" -- \
  sh -c "${settings[*]} "'exec "$@"' boot env "${variables[@]}" /cppvmm-boot "${arguments[@]}"
