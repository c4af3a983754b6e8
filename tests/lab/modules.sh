#!/usr/bin/env bash
# modules.sh FOLDER: builds tests/guests/linux, modules for Linux guests, for the kernel in FOLDER (see kernel.sh), with
# the distribution's gcc and make:
#   guests/*.ko, guests/heat_load, a program for such guests, and guests/made: what they were made of
#   headers/: the kernel's header packages, downloaded with apt and unpacked; nothing is installed from them
# FOLDER/guests is left as it is when neither the sources nor the kernel changed.
# modules.sh --made FOLDER: only says, by its status, whether that is so.
set -euo pipefail

die() {
  echo "modules.sh: $*" >&2
  exit 1
}

made_only=
if [[ $1 == --made ]]; then
  made_only=yes
  shift
fi
folder=$(realpath "$1")
sources=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../guests/linux")
[[ -e $folder/package ]] || die "there is no kernel in $folder"
read -r image version < <(grep '^linux-image-' "$folder/package")
name=${image#linux-image-}
name=${name#unsigned-}
name=${name%-unsigned}

identity=$(cat "$folder/package" && sha256sum <"${BASH_SOURCE[0]}" && cd "$sources" && sha256sum Makefile ./*.[ch])
if [[ -e $folder/guests/made && $(<"$folder/guests/made") == "$identity" ]]; then exit 0; fi
if [[ -n $made_only ]]; then exit 1; fi

work=$(mktemp -d "$folder/modules.XXXXXX")
trap 'rm -rf "$work"' EXIT

if [[ ! -e $folder/headers ]]; then
  wanted=("linux-headers-$name=$version")
  [[ -n $(apt-cache show "${wanted[0]}" 2>/dev/null) ]] ||
    die "apt has no ${wanted[0]}, the headers of the lab's kernel; ./dev lab --update gets the kernel that it has now"
  # What all flavours share, and the programs that build modules, are in packages of their own.
  while read -r other; do
    if [[ -n $(apt-cache show "$other=$version" 2>/dev/null) ]]; then other="$other=$version"; fi
    wanted+=("$other")
  done < <(apt-cache depends "${wanted[0]}" | sed -nE 's/^ *Depends: *(linux-(headers|kbuild)-.*)/\1/p')
  mkdir "$work/debs" "$work/headers"
  (cd "$work/debs" && apt-get download "${wanted[@]}") || die "apt cannot download ${wanted[*]}"
  for deb in "$work"/debs/*.deb; do
    dpkg-deb -x "$deb" "$work/headers" || die "$(basename "$deb") cannot be unpacked"
  done
  # Debian's points to where the other package would be installed.
  # shellcheck disable=SC2016 # The variable is make's.
  sed -i 's|^include /usr/src/|include $(dir $(realpath $(lastword $(MAKEFILE_LIST))))../|' \
    "$work/headers/usr/src/linux-headers-$name/Makefile"
  # With it, each module would get type information, by a program of another package.
  rm -f "$work/headers/usr/src/linux-headers-$name/vmlinux"
  mv -T "$work/headers" "$folder/headers"
fi

mkdir "$work/guests"
cp "$sources"/Makefile "$sources"/*.[ch] "$work/guests/"
make -C "$folder/headers/usr/src/linux-headers-$name" M="$work/guests" modules
mkdir "$work/made"
mv "$work"/guests/*.ko "$work/made/"
gcc -std=gnu17 -O2 -Wall -Wextra -Werror -static -s -o "$work/made/heat_load" "$work/guests/heat_load.c"
# Debug information is most of a module, and all of it would go through the guest's memory.
strip --strip-debug "$work"/made/*.ko
echo "$identity" >"$work/made/made"
rm -rf "$folder/guests"
mv -T "$work/made" "$folder/guests"
