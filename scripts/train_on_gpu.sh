#!/usr/bin/env bash
# Trains the prior for a few minutes on a GPU node, measures it, checks the engine on that GPU and times one sample.
#   scripts/train_on_gpu.sh WORK OUT [MINUTES [DEVICE [STEPS]]]
# WORK    folder with the packs of `brainprior train prior` (docs/training.md); the checkpoint is written there
# OUT     folder for prior.safetensors, log.jsonl, train.log, quality.txt, checks.txt, timing.txt; each below 16 MB
# MINUTES duration of the training; a fifth is for the output that predicts the SD
# STEPS   maximum number of steps within MINUTES; the learning rate falls over the last two thirds
# Environment: PYTHON (python3), BATCH (64 crops), WORKERS (all processors but two), RATE (1e-3).
# A rehearsal without a GPU: BATCH=2 WORKERS=1 scripts/train_on_gpu.sh WORK OUT 3 cpu 20
set -euo pipefail
work=$(realpath "$1") out=$(realpath -m "$2") minutes=${3:-8} device=${4:-cuda} steps=${5:-200000}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} weights=brainprior_bids/data/weights/prior.safetensors
cores=$(nproc)
workers=${WORKERS:-$((cores > 3 ? cores - 2 : 1))}
mkdir -p "$out"
du -shc "$work"/*.npz

"$python" -m brainprior_bids train prior "$work" --begin-with "$weights" --device "$device" \
  --minutes "$(awk "BEGIN { print $minutes * 0.8 }")" --steps "$steps" --decay $((steps * 2 / 3)) --batch "${BATCH:-64}" \
  --learning-rate "${RATE:-1e-3}" --stacks 0.8 --holes 0.1 --blind 0.5 --inflation 1.05 --workers "$workers" \
  --checkpoint-every 1000 --validate-every 1000 --out "$out/mean.safetensors" 2>&1 | tee "$out/train.log"
"$python" -m brainprior_bids train prior "$work" --spread --begin-with "$out/mean.safetensors" --device "$device" \
  --minutes "$(awk "BEGIN { print $minutes * 0.2 }")" --steps "$steps" --decay $((steps * 2 / 3)) --batch "${BATCH:-64}" \
  --learning-rate "${RATE:-1e-3}" --stacks 0.9 --holes 0.1 --inflation 1.05 --workers "$workers" \
  --checkpoint-every 1000 --validate-every 1000 --out "$out/prior.safetensors" 2>&1 | tee -a "$out/train.log"
rm "$out/mean.safetensors"
cp "$work/log.jsonl" "$out/"

for weights in "$weights" "$out/prior.safetensors"; do
  echo "$weights"
  "$python" -m brainprior_bids train prior "$work" --evaluate --device "$device" --out "$weights"
done | tee "$out/quality.txt"

"$python" -m pytest -q tests/engine/test_device.py 2>&1 | tee "$out/checks.txt"
for sampler in conditional exact; do
  "$python" benchmarks/engine_inner_solve.py --device "$device" --sampler "$sampler"
done | tee "$out/timing.txt"
