#!/usr/bin/env bash
# graph.sh [--check]: draws docs/house.svg from the sources.
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

need build
exec python3 "$root/docs/house.py" "$@"
