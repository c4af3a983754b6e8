#!/usr/bin/env bash
# kernel.sh VERSION FOLDER: makes FOLDER hold what machine.sh boots: the distribution's own Linux VERSION (such as 6.12)
#   vmlinuz, config; `flat`, the same kernel for guests (flat_kernel.py); modules/, uncompressed; their order in `load`,
#   and in `asked` what it was made by; a static busybox; `package`: the names and versions of the packages that all
#   this is from
# They are downloaded with apt and unpacked; nothing is installed. FOLDER is left as it is when it holds them already.
# Status 3: apt knows no such kernel, here and now.
# kernel.sh --find VERSION: only says which package it would be.
# kernel.sh --made FOLDER: only says, by its status, whether FOLDER holds a kernel with all the modules that it would now.
set -euo pipefail

# Loaded in the machine, with what they depend on: KVM on SVM; and, where they are not built in, the ports that its
# output comes through, what swap is made of, and file systems: for disks, with the sums that they ask for without
# depending on them, read-only ones on devices, and one that is stacked on others.
needed=(kvm-amd)
optional=(virtio_pci virtio_console zram loop crc32c_generic ext4 erofs squashfs overlay)

die() {
  echo "kernel.sh: $*" >&2
  exit 1
}

flat_kernel=$(dirname "$0")/flat_kernel.py
# What a folder is made by, beside the packages.
asked() { echo "${needed[*]} ${optional[*]}; $(sha256sum <"$flat_kernel")"; }

depends_of() {
  apt-cache depends --no-recommends --no-suggests "$1" 2>/dev/null | sed -nE 's/^ *\|?(Pre)?Depends: *//p'
}

# Whether apt can download it: a package that is only named by others has no version.
can_have() { [[ -n $(apt-cache show --no-all-versions "$1" 2>/dev/null) ]]; }

# The package of the newest kernel of that version, by what the distribution's meta packages stand for.
find_package() {
  local meta candidate real name
  for meta in linux-image-amd64 linux-image-generic; do
    while read -r candidate; do
      while read -r real; do
        [[ $real =~ ^linux-image-(unsigned-)?[0-9] ]] || continue
        name=${real#linux-image-}
        name=${name#unsigned-}
        [[ $name == "$version"[.-]* ]] || continue
        for real in "linux-image-$name" "linux-image-$name-unsigned" "linux-image-unsigned-$name"; do
          if can_have "$real"; then
            echo "$real"
            return
          fi
        done
      done < <(depends_of "$meta=$candidate")
    done < <(apt-cache madison "$meta" 2>/dev/null | cut -d '|' -f 2 | tr -d ' ')
  done
}

if [[ $1 == --made ]]; then
  [[ -e $2/package && -e $2/flat && -e $2/asked && $(<"$2/asked") == "$(asked)" ]]
  exit
fi
find_only=
if [[ $1 == --find ]]; then
  find_only=yes
  shift
fi
version=$1
package=$(find_package)
[[ -n $package ]] || exit 3
if [[ -n $find_only ]]; then
  echo "$package"
  exit 0
fi
folder=$2

wanted=("$package" busybox-static)
# Ubuntu's modules are in a package of their own.
while read -r other; do
  if [[ $other =~ ^linux-modules-[0-9] ]]; then wanted+=("$other"); fi
done < <(depends_of "$package")
identity=$(apt-cache show --no-all-versions "${wanted[@]}" | awk '
  $1 == "Package:" { name = $2 }
  $1 == "Version:" { print name, $2 }')
if [[ -e $folder/package && $(<"$folder/package") == "$identity" ]] && "$0" --made "$folder"; then exit 0; fi

mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/debs" "$work/tree" "$work/kernel" "$work/kernel/modules"

(cd "$work/debs" && apt-get download "${wanted[@]}") || die "apt cannot download ${wanted[*]}"
for deb in "$work"/debs/*.deb; do
  dpkg-deb -x "$deb" "$work/tree" || die "$(basename "$deb") cannot be unpacked"
  rm "$deb"
done

shopt -s nullglob
images=("$work"/tree/boot/vmlinuz-*)
configs=("$work"/tree/boot/config-*)
((${#images[@]} == 1)) || die "$package holds ${#images[@]} kernels"
mv "${images[0]}" "$work/kernel/vmlinuz"
python3 "$flat_kernel" "$work/kernel/vmlinuz" "$work/kernel/flat" || die "$package: no flat kernel can be made of it"
if ((${#configs[@]} > 0)); then mv "${configs[0]}" "$work/kernel/config"; fi

# module_file NAME: the module's file; nothing when the packages have none of that name. In names - and _ are the same.
module_file() {
  local pattern=${1//[-_]/[-_]}
  find "$work/tree" -type f \( -name "$pattern.ko" -o -name "$pattern.ko.*" \) -print -quit
}

unpack_module() {
  case $1 in
    *.ko) cat "$1" ;;
    *.xz) xz -dc "$1" ;;
    *.zst) zstd -dcq "$1" ;;
    *.gz) gzip -dc "$1" ;;
    *) die "a module in a form that is not known: $1" ;;
  esac
}

# take_module NAME: puts it, and before it what it depends on, into the kernel's folder and the order.
declare -A taken=()
take_module() {
  local name=${1//-/_} file dependency dependencies
  if [[ -n ${taken[$name]:-} ]]; then return; fi
  taken[$name]=1
  file=$(module_file "$name")
  # Built into the kernel, or not to be had.
  if [[ -z $file ]]; then return; fi
  unpack_module "$file" >"$work/kernel/modules/$name.ko" || die "$file cannot be unpacked"
  # What a module says of itself is a list of NAME=VALUE strings, each ended by a zero byte.
  IFS=, read -r -a dependencies < <(tr '\0' '\n' <"$work/kernel/modules/$name.ko" | sed -n 's/^depends=//p') || true
  for dependency in "${dependencies[@]}"; do take_module "$dependency"; done
  echo "$name" >>"$work/kernel/load"
}

find "$work/tree" -path '*/bin/busybox' -type f -exec mv {} "$work/kernel/busybox" \;
[[ -x $work/kernel/busybox ]] || die "busybox-static holds no busybox"

for module in "${needed[@]}"; do
  take_module "$module"
  [[ -e $work/kernel/modules/${module//-/_}.ko ]] || die "${wanted[*]}: no module $module in there"
done
for module in "${optional[@]}"; do take_module "$module"; done
asked >"$work/kernel/asked"
echo "$identity" >"$work/kernel/package"
rm -rf "$folder"
mv -T "$work/kernel" "$folder"
