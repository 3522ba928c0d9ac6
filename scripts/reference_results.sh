#!/usr/bin/env bash
# The reference results: FiRST and its rivals trained on SmolLM2-135M from configs/smollm2-mixture.yaml, then
# compared by `firstlm evaluate` on 300 test examples of each task.
#
#   bash scripts/reference_results.sh                      # skip rates 0.2667 and 0.5, one seed
#   RATES="0.5" SEEDS="0 1 2" bash scripts/reference_results.sh
#   NAME=short bash scripts/reference_results.sh warmup.steps=60 lora.steps=160    # settings of every training
#
# EVALUATE holds options of `firstlm evaluate` that replace those below. Runs are in runs/NAME/, the results in results/NAME/. Half an hour or more of one core a run of
# 800 steps; every step goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
firstlm_environment test # the metrics are in an extra

RATES=${RATES:-0.2667 0.5}
SEEDS=${SEEDS:-0}
NAME=${NAME:-reference}
runs=runs/$NAME
settings=("$@")

# train NAME OVERRIDE…: a finished run is read, not repeated.
train() {
  local name=$1
  shift
  firstlm train --config configs/smollm2-mixture.yaml output_dir="$runs/$name" "$@" "${settings[@]}"
}

arguments=()
folders() { # METHOD RATE -> its checkpoints, one a seed
  local found=()
  for seed in $SEEDS; do found+=("$runs/$1-$2-$seed/checkpoint"); done
  local IFS=,
  echo "${found[*]}"
}

for rate in $RATES; do
  for seed in $SEEDS; do
    at=(skip_rate="$rate" calibrate_rates="[$rate]" seed="$seed")
    train "static-$rate-$seed" "${at[@]}" control=static control_plan=search \
      plan_search_by=prompts plan_search_trials=32
    train "first-$rate-$seed" "${at[@]}" plan_search_common="$runs/static-$rate-$seed"
  done
  arguments+=(-c "$rate=$(folders first "$rate")" --trained "static=$rate=$(folders static "$rate")")
done

train lora control=lora_only seed="${SEEDS%% *}"
firstlm evaluate "${arguments[@]}" --trained lora_only="$runs/lora/checkpoint" \
  --data debian-synopsis --data debian-en-de --max-length 192 \
  --controls base,shuffled,shuffled_in_task,length,most_kept,random,uniform \
  --output "results/$NAME" ${EVALUATE:-}
