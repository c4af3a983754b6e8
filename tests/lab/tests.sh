#!/bin/sh
# tests.sh PROGRAM...: runs the tests inside the machine; its shell is busybox's. Each PROGRAM is a GoogleTest binary;
# after them cppvmm-boot boots its guest in every way. summary.awk reads what this prints.
set -u

# run NAME COMMAND...
run() {
  name=$1
  shift
  echo "lab: begin $name"
  start=$(cut -d . -f 1 /proc/uptime)
  "$@" 2>&1
  status=$?
  echo
  echo "lab: end $name $status $(($(cut -d . -f 1 /proc/uptime) - start))"
}

echo "lab: kernel $(uname -r), $(nproc) CPUs"
if [ ! -c /dev/kvm ]; then
  echo "lab: there is no /dev/kvm, which nothing here may be skipped for"
  exit 1
fi

# The kernel that guests boot is the machine's own; the modules that they load are built for it.
if [ -e /vmlinuz ]; then export CPPVMM_LINUX=/vmlinuz; fi
if [ -e /guests ]; then export CPPVMM_GUEST_MODULES=/guests; fi

# Several thousand, on a processor that is emulated, would take longer than all the rest.
export CPPVMM_ORACLE_CASES=400

# How long a guest calls without a pause.
export CPPVMM_HOSTILE_SECONDS=60

# The pool that hugetlb memory is taken from: 256 MiB and some.
echo 160 >/proc/sys/vm/nr_hugepages
for program in "$@"; do run "$program" timeout 3000 "/$program" --gtest_color=no; done

# scenario BACKING TRANSPORT CPUS
scenario() {
  what="--backing $1 --hypercalls $2 --cpus $3"
  if [ "$2" = kernel ] && [ "$forwarded" = no ]; then
    echo "lab: skipped $what: this KVM forwards no extended hypercalls"
    return
  fi
  # shellcheck disable=SC2086 # They are words.
  timeout 1000 /cppvmm-boot --memory 256M --audit --json - $what >/tmp/figures
  status=$?
  cat /tmp/figures
  field() { sed -n "s/^  \"$1\": \(.*[^,]\),*$/\1/p" /tmp/figures; }
  verdict=failed
  if [ $status = 0 ] && [ "$(field unsound_pages)" = 0 ] && [ "$(field nonzero_pages_at_end)" = 0 ] &&
    [ "$(field hypercalls)" = "\"$2\"" ]; then
    verdict=passed
  fi
  echo "lab: $verdict $what: status $status, $(field unsound_pages) unsound pages, $(field missed_zero_pages) missed," \
    "$(field wall_ms | cut -d . -f 1) ms"
}

boot() {
  # By the VMM's own choice: `auto` takes the kernel's way where there is one.
  forwarded=no
  if /cppvmm-boot --memory 16M --json - | grep -q '"hypercalls": "kernel"'; then forwarded=yes; fi
  # Linux 6.3 and later do (README.md): what is skipped for want of it would hide that they are not asked.
  first=$(printf '6.3\n%s\n' "$(uname -r)" | sort -V | head -n 1)
  if [ "$first" = 6.3 ] && [ $forwarded = no ]; then echo "lab: failed that Linux $(uname -r) forwards extended hypercalls"; fi
  for backing in anonymous memfd hugetlb; do
    for transport in kernel user; do
      for cpus in 1 2; do scenario $backing $transport $cpus; done
    done
  done
}

run cppvmm-boot boot
