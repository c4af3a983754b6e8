#!/usr/bin/env bash
# boot.sh ARG...: cppvmm-boot with these.
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

build_example cppvmm-boot
exec "$root/build/release/examples/boot/cppvmm-boot" "$@"
