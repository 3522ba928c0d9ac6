#!/usr/bin/env bash
# The reference results: FiRST and its rivals trained on SmolLM2-135M from one config, then compared by
# `firstlm evaluate`, by default on 300 test examples of each task. The stored results/reference has 150 of each, and
# other settings too: docs/recipes.md has the commands of what is stored.
#
#   bash scripts/reference_results.sh                      # skip rates 0.2667 and 0.5, three seeds
#   RATES="0.5" SEEDS="0" bash scripts/reference_results.sh
#   CONFIG=smollm2-synopsis TASKS=debian-synopsis NAME=synopsis bash scripts/reference_results.sh
#   NAME=short bash scripts/reference_results.sh warmup.steps=60 lora.steps=160    # settings of every training
#
# FiRST and the searched static plan are trained with every seed, their rivals with the first one: plans by prompt
# length, uniform and random plans, LoRA without skipping, and FiRST as published (at the first rate). Runs of one
# seed and rate share their warm-up. PAPER holds settings of the last, whose phase 1 takes the steps of warm-up and
# routers. EVALUATE holds options of `firstlm evaluate` that replace those below. Runs are in runs/NAME/, the
# results in results/NAME/. A run of 800 steps takes 20 to 65 minutes of one core with bf16 instructions; every step goes on
# where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
firstlm_environment test # the metrics are in an extra

RATES=${RATES:-0.2667 0.5}
SEEDS=${SEEDS:-0 1 2}
NAME=${NAME:-reference}
CONFIG=${CONFIG:-smollm2-mixture}
TASKS=${TASKS:-debian-synopsis debian-en-de}
runs=runs/$NAME
settings=("data.train=[${TASKS// /,}]" "$@")
one=${SEEDS%% *} # the seed of rivals that get one

# train CONFIG NAME OVERRIDE…: a finished run is read, not repeated.
train() {
  local config=$1 name=$2
  shift 2
  firstlm train --config "configs/$config.yaml" output_dir="$runs/$name" "${settings[@]}" "$@"
}

rivals=()
folders() { # METHOD RATE -> its checkpoints, one a seed
  local found=()
  for seed in $SEEDS; do found+=("$runs/$1-$2-$seed/checkpoint"); done
  local IFS=,
  echo "${found[*]}"
}

for rate in $RATES; do
  at=(skip_rate="$rate" calibrate_rates="[$rate]")
  for seed in $SEEDS; do
    static=$runs/static-$rate-$seed
    train "$CONFIG" "static-$rate-$seed" "${at[@]}" seed="$seed" \
      control=static control_plan=search plan_search_by=prompts
    train "$CONFIG" "first-$rate-$seed" "${at[@]}" seed="$seed" \
      plan_search_common="$static" warmup_from="$static"
  done
  rivals+=(-c "$rate=$(folders first "$rate")" --trained "static=$rate=$(folders static "$rate")")
  at+=(seed="$one" warmup_from="$runs/static-$rate-$one")
  train "$CONFIG" "length-$rate-$one" "${at[@]}" control=length \
    plan_search_common="$runs/static-$rate-$one"
  for plan in uniform random:0 random:1; do
    train "$CONFIG" "${plan/:/}-$rate-$one" "${at[@]}" control=static control_plan="$plan"
  done
  drawn=$runs/random0-$rate-$one/checkpoint,$runs/random1-$rate-$one/checkpoint
  for name in length uniform; do
    rivals+=(--trained "$name=$rate=$runs/$name-$rate-$one/checkpoint")
  done
  rivals+=(--trained "random=$rate=$drawn")
done

rate=${RATES%% *}
train "$CONFIG" lora control=lora_only seed="$one"
train first-paper "paper-$rate-$one" skip_rate="$rate" calibrate_rates="[$rate]" seed="$one" ${PAPER:-}
data=()
for task in $TASKS; do data+=(--data "$task"); done
firstlm evaluate "${rivals[@]}" --trained lora_only="$runs/lora/checkpoint" \
  --trained "first_paper=$rate=$runs/paper-$rate-$one/checkpoint" \
  "${data[@]}" --max-length 192 --engine native \
  --controls base,shuffled,exact --output "results/$NAME" ${EVALUATE:-}
