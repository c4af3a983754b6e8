#!/usr/bin/env bash
# soak.sh [BOUND] [--seed S]: the oracle's random cases; --moving [TIME]: memory that moves (cppvmm-soak --help).
# shellcheck source=tools/build.sh
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

build release cppvmm-soak
exec "$root/build/release/tests/oracle/cppvmm-soak" "$@"
