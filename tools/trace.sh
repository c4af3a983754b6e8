#!/usr/bin/env bash
# trace.sh [FILE]: prints what cppvmm-boot --trace wrote.
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if ! command -v python3 >/dev/null; then need build; fi
exec python3 "$root/examples/boot/read_trace.py" "$@"
