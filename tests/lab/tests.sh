#!/bin/sh
# tests.sh LABEL PART PARTS: runs the tests inside the machine, whose shell is busybox's: what /selection lists
# (selection.py), all of the label, and of each program's tests every PARTS-th from the PART-th on. summary.awk reads
# what this prints.
set -u

echo
echo "lab: kernel $(uname -r), $(nproc) CPUs, label $1 part $2/$3"
export GTEST_SHARD_INDEX=$(($2 - 1)) GTEST_TOTAL_SHARDS="$3"
if [ ! -c /dev/kvm ]; then
  echo "lab: there is no /dev/kvm, which nothing here may be skipped for"
  exit 1
fi

# The pool that hugetlb memory is taken from: 256 MiB and some.
echo 160 >/proc/sys/vm/nr_hugepages

# The kernel that guests boot is the machine's own, most of them in the form that has nothing to decompress; the modules
# that they load are built for it.
export CPPVMM_LINUX=/vmlinuz
export CPPVMM_LINUX_FLAT=/flat
export CPPVMM_GUEST_MODULES=/guests

# What the kernel does that the tests depend on.
/cppvmm-machine-facts | sed 's/^/lab: fact: /'

# Several thousand, on a processor that is emulated, would take longer than all the rest.
export CPPVMM_ORACLE_CASES=120

# Nor more of memory that moves than so many rounds of each kind.
export CPPVMM_MOVING_ROUNDS=2

# How long a guest calls without a pause.
export CPPVMM_HOSTILE_SECONDS=15

tab=$(printf '\t')
while IFS=$tab read -r kind label filter program; do
  if [ "$kind" != test ]; then continue; fi
  name=${program##*/}
  echo "lab: begin $name $label $2/$3"
  start=$(cut -d . -f 1 /proc/uptime)
  timeout 3000 "$program" --gtest_color=no --gtest_filter="$filter" </dev/null 2>&1
  status=$?
  echo
  echo "lab: end $name $status $(($(cut -d . -f 1 /proc/uptime) - start))"
done </selection
