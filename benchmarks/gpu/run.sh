#!/usr/bin/env bash
# Measures the kernels, the steps and the engine on this machine's GPU: benchmarks/gpu/run.sh [--part NAME] [--output DIR]
# Needs python3 with jax, flax and numpy, and no network. PYTHON chooses another interpreter.
set -euo pipefail
here="$(cd "$(dirname "$0")/../.." && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
