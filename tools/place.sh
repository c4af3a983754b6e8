# shellcheck shell=bash
# Where what needs KVM runs: here, or in the lab. Sourced; brings `choose_place`.
# shellcheck disable=SC2034 # Who sources this uses it.
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# choose_place WHAT [--host|--lab]: sets `place` to host or lab: what was asked for, else the host where KVM can be used.
# Says in one line why, when it is the lab that was not asked for. Needs the packages of `build`.
place=
choose_place() {
  local trouble=''
  place=lab
  if [[ ${2:-} == --lab ]]; then return; fi
  if trouble=$(python3 "$tools/kvm.py"); then
    place=host
  elif [[ ${2:-} == --host ]]; then
    die "$trouble"
  else
    say "no KVM on this machine, so $1 the lab, an emulated machine that has it ($trouble)"
  fi
}
