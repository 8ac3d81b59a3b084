#!/usr/bin/env bash
# Install what the tests need and run them all; words are passed on to pytest:
#
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh -m "not server"      without a real TorchServe
#
# Tests on real pictures want MARTEN_DATA to name their folder, and say so where they are skipped. MARTEN_VENV names an
# environment to use instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

enter_environment requirements-dev.txt
exec python -m pytest "$@"
