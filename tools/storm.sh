#!/usr/bin/env bash
# storm.sh [--guests N] [--memory SIZE]: many guests at once on this machine's KVM, which zero all their memory, and again
# such as ask first, as a table.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"
# shellcheck source=tools/place.sh
source "$tools/place.sh"

need build
# An emulated machine has no memory for a storm.
choose_place "" --host
build_example cppvmm-boot
exec python3 -B "$tools/storm.py" "$root/build/release/examples/boot/cppvmm-boot" "$@"
