#!/usr/bin/env bash
# machine.sh --kernel FOLDER [--memory 3G] [--cpus 1] [--numa 1] [--timeout 600] [--include PATH[:DEST]]...
#   [--fetch PATH:FILE]... [--stdin] -- PROGRAM [ARG...]
#
# Runs PROGRAM as root in an emulated machine: QEMU's software CPU with AMD's SVM and nested paging, and the kernel of
# FOLDER (see kernel.sh), whose KVM then runs guests on that CPU. Standard output and error come out here as they are,
# and so does the exit status. Of its own:
#   124  it ran longer than --timeout seconds (0: as long as it likes)
#   125  the machine stopped, and PROGRAM had not ended; twice, for it is tried once more
#   126  the machine cannot be made
# PROGRAM with a slash is a file of this host; without one it is a busybox applet (sh), else found through PATH. It and
# each --include (a file or a folder) are in the machine at /NAME, or /DEST, with the shared libraries they need.
# What PROGRAM leaves at the PATH of a --fetch comes to FILE here, if it is there. Its standard input is empty, or, with
# --stdin, what comes in here; then a machine that stopped is not tried again.
# --numa N has that many NUMA nodes: each has an equal part of the memory, and a CPU of its own at least.
# PROGRAM starts in /tmp. All files are a tmpfs's; /proc, /sys, /dev, /dev/shm and the control groups are mounted; there
# is no network.
# LAB_CONSOLE names a file for what the machine's kernel says; LAB_PROCESSOR which of the processors the machine takes,
# from 0 on (any one by default).
set -euo pipefail

fail() {
  echo "lab: $*" >&2
  exit 126
}

kernel='' memory=3G cpus=1 nodes=1 limit=600 includes=() fetches=() input=''
while (($# > 0)); do
  case $1 in
    --stdin)
      input=yes
      shift
      ;;
    --kernel | --memory | --cpus | --numa | --timeout | --include | --fetch)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --kernel) kernel=$2 ;;
        --memory) memory=$2 ;;
        --cpus) cpus=$2 ;;
        --numa) nodes=$2 ;;
        --timeout) limit=$2 ;;
        --include) includes+=("$2") ;;
        --fetch) fetches+=("$2") ;;
      esac
      shift 2
      ;;
    --)
      shift
      break
      ;;
    *) fail "no option $1" ;;
  esac
done
(($# > 0)) || fail "no program given"
[[ $memory =~ ^[0-9]+[MG]$ ]] || fail "--memory: $memory is not a size such as 3G"
[[ $cpus =~ ^[1-9][0-9]*$ ]] || fail "--cpus: $cpus is not a number"
[[ $nodes =~ ^[1-9]$ ]] || fail "--numa: $nodes is not a number of nodes"
if ((cpus < nodes)); then cpus=$nodes; fi
[[ $limit =~ ^(0|[1-9][0-9]*)$ ]] || fail "--timeout: $limit is not a number of seconds"
[[ -e $kernel/vmlinuz ]] || fail "no kernel in '$kernel'"
for tool in qemu-system-x86_64 cpio taskset; do
  command -v "$tool" >/dev/null || fail "$tool is missing"
done

work=$(mktemp -d)
machine='' writer=''
# shellcheck disable=SC2317 # The traps call it.
clean_up() {
  if [[ -n $machine ]]; then kill "$machine" 2>/dev/null || true; fi
  if [[ -n $writer ]]; then kill "$writer" 2>/dev/null || true; fi
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ------------------------------------------------------------------------------------------------------------- packing

root=$work/root
mkdir -p "$root"/{bin,modules,proc,sys,dev,tmp,var/tmp,root,etc}
cp "$kernel/busybox" "$root/bin/busybox"
while read -r applet; do ln -sf busybox "$root/bin/$applet"; done < <("$root/bin/busybox" --list | grep -vx busybox)
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
cp "$kernel"/modules/*.ko "$root/modules/"
cp "$kernel/load" "$root/modules/load"

# Debug information is most of a binary, and all of it would go through the machine's memory.
strip=$(command -v llvm-strip-19 || command -v strip || true)

# add FILE PATH: puts it at PATH of the machine, with the libraries it needs where its loader looks for them.
add() {
  local libraries
  mkdir -p "$(dirname "$root/$2")"
  cp -L --preserve=mode "$1" "$root/$2"
  if [[ $(head -c 4 "$1" | tr -d '\0') != $'\177ELF' ]]; then return; fi
  if [[ -n $strip ]]; then "$strip" --strip-debug "$root/$2" 2>/dev/null || true; fi
  libraries=$(LC_ALL=C ldd "$1" 2>/dev/null) || return 0
  if [[ $libraries == *"not found"* ]]; then
    fail "$1 needs $(sed -n 's/^\t*\([^ ]*\) => not found.*/\1/p' <<<"$libraries" | tr '\n' ' ')which this host lacks"
  fi
  while read -r libraries; do
    if [[ -e $root$libraries ]]; then continue; fi
    mkdir -p "$(dirname "$root$libraries")"
    cp -L "$libraries" "$root$libraries"
  done < <(grep -oE '/[^ ]+' <<<"$libraries")
}

# free_name PATH: a place in the machine that nothing is at.
free_name() {
  [[ ! -e $root/$1 ]] || fail "the machine has a /$1 of its own: give it another name with --include PATH:DEST"
}

for entry in "${includes[@]}"; do
  # A path may have colons; a DEST has none.
  if [[ -e $entry || $entry != *:* ]]; then
    source=$entry
    target=$(basename "$entry")
  else
    source=${entry%:*}
    target=${entry##*:}
  fi
  target=${target#/}
  free_name "$target"
  if [[ -f $source ]]; then
    add "$source" "$target"
  elif [[ -d $source ]]; then
    mkdir -p "$(dirname "$root/$target")"
    cp -rL "$source" "$root/$target"
  else
    fail "--include: there is no $source"
  fi
done

program=$1
if [[ $program == */* ]]; then
  [[ -f $program && -x $program ]] || fail "$program is no program"
  name=/$(basename "$program")
elif [[ -e $root/bin/$program ]]; then
  name=$program
else
  name=/$program
  program=$(type -P -- "$program") || fail "there is no program $1"
fi
if [[ $name == /* ]] && ! cmp -s "$program" "$root$name"; then
  free_name "${name#/}"
  add "$program" "${name#/}"
fi

# What is fetched is packed into an archive when the program has ended, by its names in here.
: >"$root/fetch"
for entry in "${fetches[@]}"; do
  mkdir -p "$root/$(dirname "${entry%%:*}")"
  echo "${entry%%:*}" >>"$root/fetch"
done

quoted() {
  local word
  for word in "$@"; do printf "'%s' " "${word//\'/\'\\\'\'}"; done
}
printf 'exec %s\n' "$(quoted "$name" "${@:2}")" >"$root/command"

# The ports are told apart by the names that QEMU gives them. What the program writes does not go over the console,
# where the kernel would talk into it.
cat >"$root/init" <<'INIT'
#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
# What these kernels do is known, and nothing is lost with this machine.
export CPPVMM_LAB=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t cgroup2 cgroup /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr

in= files=
while read -r module; do
  insmod "/modules/$module.ko" || echo "$module" >>/unloaded
done </modules/load
for port in /sys/class/virtio-ports/*; do
  case $(cat "$port/name") in
    lab.out) out=/dev/${port##*/} ;;
    lab.err) err=/dev/${port##*/} ;;
    lab.status) status=/dev/${port##*/} ;;
    lab.files) files=/dev/${port##*/} ;;
    lab.in) in=/dev/${port##*/} ;;
  esac
done
if [ ! -c /dev/kvm ]; then
  echo "lab: this kernel's KVM does not start here$(sed 's/^/, no /' /unloaded 2>/dev/null | tr -d '\n')" >"$err"
fi
cd /tmp
# A port can be opened once; what the program reads from it may open anew.
if [ -n "$in" ]; then
  mkfifo /input
  cat "$in" >/input &
  sh /command </input >"$out" 2>"$err"
else
  sh /command </dev/null >"$out" 2>"$err"
fi
echo $? >/ended
set --
while read -r file; do
  if [ -e "$file" ]; then set -- "$@" "$file"; fi
done </fetch
if [ $# != 0 ]; then tar -cf "$files" "$@" 2>/dev/null; fi
cat /ended >"$status"
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . -print0 | cpio --null --create --format=newc --quiet --owner=0:0) >"$work/initramfs"

# ------------------------------------------------------------------------------------------------------------- running

# The processor of that number among those that this may run on, or any.
processor() {
  local list part processors=()
  list=$(taskset --cpu-list --pid $$)
  IFS=, read -r -a list <<<"${list##*: }"
  for part in "${list[@]}"; do
    mapfile -t -O "${#processors[@]}" processors < <(seq "${part%-*}" "${part#*-}")
  done
  echo "${processors[${LAB_PROCESSOR:-RANDOM} % ${#processors[@]}]}"
}

# What QEMU is told of the nodes; nothing for one.
numa=()
if ((nodes > 1)); then
  mib=${memory%[MG]}
  if [[ $memory == *G ]]; then mib=$((mib * 1024)); fi
  ((mib % nodes == 0)) || fail "--memory: $memory is not made of $nodes equal parts"
  for ((node = 0; node < nodes; node++)); do
    numa+=(-object "memory-backend-ram,id=node$node,size=$((mib / nodes))M")
    numa+=(-numa "node,nodeid=$node,memdev=node$node,cpus=$((cpus * node / nodes))-$((cpus * (node + 1) / nodes - 1))")
  done
fi

# run_machine: one run from power on to off; the status of `timeout`.
run_machine() {
  local status=0 out err keys readers=() devices=()
  rm -f "$work"/{out,err,status,files}
  mkfifo "$work/out" "$work/err"
  : >"$work/status"
  cat "$work/out" &
  readers+=($!)
  cat "$work/err" >&2 &
  readers+=($!)
  # They read until this end is closed too: QEMU may end before it has opened its own.
  exec {out}>"$work/out" {err}>"$work/err"
  if ((${#fetches[@]} > 0)); then
    devices+=(-chardev "file,id=files,path=$work/files" -device 'virtserialport,chardev=files,name=lab.files')
  fi
  if [[ -n $input ]]; then
    # Through a pipe of its own: QEMU makes it non-blocking, which a terminal that others use must not become.
    exec {keys}< <(exec cat <&"$stdin")
    writer=$!
    devices+=(-chardev 'stdio,id=in,signal=off' -device 'virtserialport,chardev=in,name=lab.in')
  else
    exec {keys}</dev/null
  fi
  # The CPUs take turns in one thread. In threads of their own one of them sooner or later traps on an int3 that the
  # kernel's patching of itself has taken away again, which is a panic. KVM has the scheduler patched whenever the first
  # VM is made or the last one ends: some hundred VMs were enough (QEMU 7.2, Linux 6.12).
  # And all of QEMU on one processor: when a guest of KVM's exits, QEMU clears a bit among the pending interrupts in an
  # instruction that is not locked, and if its other thread sets the timer's bit meanwhile, that is lost. Then the machine
  # waits for ever, idle (QEMU 7.2, do_vmexit; 2 of some 50 boots of Linux guests).
  # A panic ends the machine, by a restart that QEMU does not make.
  timeout --foreground "$limit" taskset --cpu-list "$(processor)" qemu-system-x86_64 \
    -accel tcg,thread=single -cpu EPYC,+svm,+npt -smp "$cpus" -m "$memory" "${numa[@]}" \
    -kernel "$kernel/vmlinuz" -initrd "$work/initramfs" -append 'console=ttyS0 quiet panic=-1 mitigations=off' \
    -display none -monitor none -nic none -no-reboot -serial "file:$work/console" \
    -chardev "file,id=out,path=$work/out" -chardev "file,id=err,path=$work/err" \
    -chardev "file,id=status,path=$work/status" -device virtio-serial-pci \
    -device virtserialport,chardev=out,name=lab.out -device virtserialport,chardev=err,name=lab.err \
    -device virtserialport,chardev=status,name=lab.status "${devices[@]}" \
    <&"$keys" >"$work/qemu" 2>&1 &
  machine=$!
  exec {keys}<&-
  wait "$machine" || status=$?
  machine=
  if [[ -n $writer ]]; then kill "$writer" 2>/dev/null || true; fi
  writer=
  exec {out}>&- {err}>&-
  wait "${readers[@]}" || true
  if [[ -n ${LAB_CONSOLE:-} ]]; then cat "$work"/{console,qemu} 2>/dev/null >>"$LAB_CONSOLE" || true; fi
  return "$status"
}

# The last thing of note that the machine's kernel said, or QEMU when it was not that far.
last_words() {
  local words
  words=$(tr -d '\r' 2>/dev/null <"$work/console" | grep -E 'Kernel panic|BUG:|Oops|RIP:|Out of memory' | head -n 1) ||
    words=$(tr -d '\r' 2>/dev/null <"$work/console" | grep . | tail -n 1) ||
    words=$(grep -v 'warning: TCG' "$work/qemu" | tail -n 1) || words='nothing was said'
  echo "${words#\[*\] }"
}

# take_files: brings what was fetched to where it belongs.
take_files() {
  local entry file
  for entry in "${fetches[@]}"; do
    file=${entry%%:*}
    file=${file#/}
    if ! tar -tf "$work/files" "$file" >/dev/null 2>&1; then continue; fi
    tar -xOf "$work/files" "$file" >"${entry#*:}" || {
      echo "lab: ${entry#*:} cannot be written" >&2
      return 1
    }
  done
}

exec {stdin}<&0
if [[ -n ${LAB_CONSOLE:-} ]]; then : >"$LAB_CONSOLE"; fi
for attempt in 1 2; do
  status=0
  run_machine || status=$?
  if [[ -s $work/status ]]; then
    status=$(<"$work/status")
    take_files || ((status != 0)) || status=1
    exit "$status"
  fi
  if ((status == 124)); then
    echo "lab: stopped, for it had run for $limit s" >&2
    exit 124
  fi
  echo "lab: the machine stopped without a status: $(last_words)$( ((attempt == 2)) || [[ -n $input ]] || echo '; once more')" >&2
  if [[ -n $input ]]; then break; fi
done
exit 125
