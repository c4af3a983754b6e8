#!/usr/bin/env bash
# setup.sh [GROUP...]: installs what is missing of the packages that each group needs; all of them by default. Sourced, it
# brings `need GROUP...`, which does that, and what else has to do with apt.
#   build  the library and the examples      test  the tests and benchmarks     instrumented  sanitizers, coverage
#   lint   the linters                       lab   the emulated machine         guests        modules for Linux guests
#   bench  the peers of benchmarks              plot  plots
# shellcheck disable=SC2034 # Who sources this uses what it sets.
# shellcheck source=tools/say.sh
source "$(dirname "${BASH_SOURCE[0]}")/say.sh"

groups=(build test instrumented lint lab guests bench plot)

packages_of() {
  case $1 in
    build) echo clang-19 clang-tools-19 lld-19 ninja-build libcli11-dev nlohmann-json3-dev python3 ;;
    test) echo libgtest-dev libgmock-dev libbenchmark-dev librapidcheck-dev btrfs-progs erofs-utils squashfs-tools ;;
    instrumented) echo libclang-rt-19-dev llvm-19 ;;
    lint) echo clang-tidy-19 clang-format-19 libclang-19-dev llvm-19-dev shellcheck ;;
    lab) echo qemu-system-x86 cpio util-linux xz-utils zstd ;;
    guests) echo gcc libc6-dev make xz-utils ;;
    bench) echo cargo rustc librust-vm-memory-dev ;;
    plot) echo gnuplot-nox ;;
  esac
}

at_least() { [[ $(printf '%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

# Modules need CMake 3.28; 4.3 changed what they are built with.
cmake_version_fits() { [[ -n $1 ]] && at_least "$1" 3.28 && ! at_least "$1" 4.3; }

# The first CMake that fits: the one on PATH, else the distribution's.
cmake=
find_cmake() {
  local candidate
  for candidate in "$(command -v cmake || true)" /usr/bin/cmake; do
    if [[ -n $candidate ]] &&
      cmake_version_fits "$("$candidate" --version 2>/dev/null | sed -nE '1s/^cmake version ([0-9.]+).*/\1/p')"; then
      cmake=$candidate
      return 0
    fi
  done
  return 1
}

# shellcheck source=/dev/null
distribution=$(. /etc/os-release && echo "$ID ${VERSION_ID:-}")
# shellcheck source=/dev/null
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")

boost_fits() {
  local version
  version=$(sed -nE 's/^#define BOOST_VERSION ([0-9]+).*/\1/p' /usr/include/boost/version.hpp 2>/dev/null) || return 1
  ((${version:-0} >= 108100))
}

# missing_packages GROUP...
missing_packages() {
  local group package packages=() installed
  for group in "$@"; do
    # shellcheck disable=SC2207 # Names of packages have no spaces.
    packages+=($(packages_of "$group"))
  done
  installed=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "${packages[@]}" 2>/dev/null |
    sed -n 's/^ii *//p') || true
  for package in "${packages[@]}"; do
    grep -qx "$package" <<<"$installed" || echo "$package"
  done
  if [[ " $* " == *' build '* ]]; then
    if ! boost_fits; then
      # Debian 12's libboost-dev is 1.74.
      if [[ $distribution == "debian 12" ]]; then echo libboost1.81-dev; else echo libboost-dev; fi
    fi
    find_cmake || echo cmake
  fi
}

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

# ask_for_root COMMAND: what ./dev COMMAND does next needs root. Asks for it while the terminal is free.
ask_for_root() {
  if ((EUID == 0)); then return; fi
  command -v sudo >/dev/null || die "that needs root and there is no sudo: run ./dev $1 as root once"
  sudo -n true 2>/dev/null || sudo -v || die "that needs root: run ./dev $1 as root once"
}

apt_get() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -y "$@"
}

# The newest version of cmake that apt can install and that fits; nothing when there is none.
cmake_candidate() {
  local version versions
  versions=$(apt-cache madison cmake | cut -d '|' -f 2 | tr -d ' ')
  for version in $versions; do
    if cmake_version_fits "${version#*:}"; then
      echo "$version"
      return
    fi
  done
}

# add_backports WHAT: Debian 12's CMake is too old for modules, and its kernel for Hyper-V: those that fit are in its
# backports suite. The suite is taken from where the machine takes Debian from, trusted as that is.
add_backports() {
  local uri entry file line options key list=/etc/apt/sources.list.d/$codename-backports.list
  # shellcheck disable=SC2016 # $(REPO_URI) is apt's, not the shell's.
  IFS='|' read -r uri entry < <(apt-get indextargets --format '$(CODENAME)|$(COMPONENT)|$(REPO_URI)|$(SOURCESENTRY)' \
    'Identifier: Packages' | sed -n "s/^$codename|main|//p" | head -n 1) || true
  if [[ -z ${uri:-} ]]; then
    die "apt has no source of $codename's main, so there is none to take $codename-backports from: get $1 by hand"
  fi
  file=${entry%:*}
  line=${entry##*:}
  options=
  if [[ $file == *.sources ]]; then
    key=$(sed -nE 's/^Signed-By: *(\/[^ ]+) *$/\1/ip' "$file" | head -n 1)
    if [[ -n $key ]]; then options="signed-by=$key"; fi
  else
    options=$(sed -nE "${line}s/^deb +\[([^]]*)\].*/\1/p" "$file")
  fi
  say "adding $codename-backports for $1: $list"
  echo "deb ${options:+[$options] }$uri $codename-backports main" | as_root tee "$list" >/dev/null
}

# need GROUP...
need() {
  local group
  for group in "$@"; do
    [[ " ${groups[*]} " == *" $group "* ]] || die "setup: no group '$group': ${groups[*]}"
  done
  install_missing "$@"
  if [[ " $* " == *' build '* ]]; then find_cmake || die "no CMake from 3.28 to 4.2"; fi
}

install_missing() {
  local missing package version wanted=()
  if ! command -v dpkg-query >/dev/null; then
    if find_cmake && command -v clang++-19 >/dev/null && command -v ninja >/dev/null; then return; fi
    die "this is no Debian or Ubuntu: install clang-19 (with clang-scan-deps), CMake 3.28 to 3.31, Ninja, Boost 1.81," \
      "GoogleTest, CLI11 and nlohmann-json by hand"
  fi
  missing=$(missing_packages "$@")
  if [[ -z $missing ]]; then return; fi

  say "to install: ${missing//$'\n'/ }"
  ask_for_root setup
  must "asking apt for what there is" setup-update apt_get update
  if grep -qx cmake <<<"$missing" && [[ -z $(cmake_candidate) && $distribution == debian* ]]; then
    add_backports "CMake 3.28 to 3.31"
    must "asking apt for what there is now" setup-update apt_get update
  fi
  while read -r package; do
    if [[ $package == cmake ]]; then
      version=$(cmake_candidate)
      [[ -n $version ]] || die "apt has no CMake from 3.28 to 3.31: install one by hand"
      wanted+=("cmake=$version" "cmake-data=$version")
    else
      apt-cache show "$package" >/dev/null 2>&1 ||
        die "apt has no package $package: it is in Debian 12 and 13, and in Ubuntu 24.04's 'universe'"
      wanted+=("$package")
    fi
  done <<<"$missing"
  # Nothing that someone uses may go for it: then apt stops, and says what is in the way.
  must "installing that" setup-install \
    apt_get install --no-install-recommends --no-remove "${wanted[@]}"
  hash -r
  missing=$(missing_packages "$@")
  [[ -z $missing ]] || die "apt installed without an error, and these are still missing: ${missing//$'\n'/ }"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  if (($# == 0)); then set -- "${groups[@]}"; fi
  need "$@"
  say "all that is needed is installed"
fi
