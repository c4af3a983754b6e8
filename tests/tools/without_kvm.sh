#!/bin/sh
# without_kvm.sh COMMAND...: runs it where /dev has all that it has here but kvm, and names each regular file that came
# into /dev meanwhile: status 99. Status 77, saying why: no mount namespace of its own can be had.
set -eu

if [ "${1:-}" != --inside ]; then
  mapped=
  if [ "$(id -u)" != 0 ]; then mapped=--map-root-user; fi
  # shellcheck disable=SC2086 # Nothing, or one word.
  if ! unshare --mount $mapped true 2>/dev/null; then
    echo "no mount namespace can be had: needs root, or user namespaces" >&2
    exit 77
  fi
  # shellcheck disable=SC2086
  exec unshare --mount $mapped "$0" --inside "$@"
fi
shift

dev=$(mktemp -d)
mount -t tmpfs dev "$dev"
for entry in /dev/*; do
  name=$(basename "$entry")
  if [ "$name" = kvm ]; then continue; fi
  if [ -L "$entry" ]; then
    cp -P "$entry" "$dev/$name"
  elif [ -d "$entry" ]; then
    mkdir "$dev/$name"
    mount --rbind "$entry" "$dev/$name"
  else
    : >"$dev/$name"
    mount --bind "$entry" "$dev/$name"
  fi
done
mount --move "$dev" /dev
rmdir "$dev"

regular_files() {
  for entry in /dev/*; do
    if [ -f "$entry" ] && [ ! -L "$entry" ]; then echo "$entry"; fi
  done
}

before=$(regular_files)
status=0
"$@" || status=$?
after=$(regular_files)
if [ "$after" != "$before" ] || [ -e /dev/kvm ]; then
  echo "made: $after" >&2
  exit 99
fi
exit "$status"
