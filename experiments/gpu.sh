#!/usr/bin/env bash
# Measure what only a CUDA GPU can show, on one card, in two parts of at most seven minutes each:
#
#     RESULTS=results bash experiments/gpu.sh 1      # ceilings, the step, other trainers
#     RESULTS=results bash experiments/gpu.sh 2      # 32 layers, checks, options, each FFN's cost
#     RESULTS=results bash experiments/gpu.sh 2 checks ddp      # only these steps of a part
#     DEVICE=cpu bash experiments/gpu.sh             # a dry run of both parts at toy sizes
#
# The most telling steps come first. Each writes what it found at once: tables to log.txt, a line of JSON
# to results.jsonl, and at the end of a part all lines so far to report.md. A step that is done is not
# done again, so that the script may be cut anywhere and started anew, on another machine too if the
# folder RESULTS comes along. After LIMIT seconds a part cuts the step that runs and starts no other. It
# needs torch and numpy; without transformers the steps peers-hf and peers-hf-no-mask fail, and the
# others go on. The number beside a step is its seconds on an H100: measured, or in brackets estimated.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} device=${DEVICE:-cuda} parts=${1:-1 2} only=${*:2} limit=${LIMIT:-420}
work=out/gpu-$device
results=${RESULTS:-$work}
export PYTHONUNBUFFERED=1
if [ "$device" = cuda ] && ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no CUDA GPU here; DEVICE=cpu makes a dry run" >&2
    exit 1
fi
mkdir -p "$work" "$results"

full="--n_layer=32 --n_head=8 --n_embd=512 --ffn_hidden=2048 --block_size=2048 --micro_batch_size=16"
small=${full/32/8}  # eight layers compile in half a minute, 32 in two, and show the same per layer
ffn="--n_embd=512 --ffn_hidden=2048 --tokens=32768 --block_size=2048"
tiny="--n_layer=2 --n_head=2 --n_kv_head=2 --n_embd=128 --ffn_hidden=256 --block_size=128 --batch_size=8
    --micro_batch_size=4 --val_tokens=8192 --ffn=sparseglu --lr_decay_iters=20 --warmup_iters=2"
rounds=11 eager="" smoke="config/smoke.py --sample_tokens=0"
if [ "$device" = cpu ]; then
    export OMP_NUM_THREADS=1
    full="--n_layer=1 --n_head=2 --n_embd=64 --ffn_hidden=128 --block_size=32 --micro_batch_size=2
        --vocab_size=384"
    small=$full
    ffn="--n_embd=64 --ffn_hidden=128 --tokens=64 --block_size=32"
    rounds=2 eager=--compile=False smoke="config/smoke.py --sample_tokens=0 --max_iters=20 --val_tokens=1024"
fi

# step NAME COMMAND...: run the command, unless it is done, and record what it printed and measured.
step() {
    local name=$1 start=$SECONDS left=$((began + limit - SECONDS)) code
    shift
    [[ -z $only || " $only " == *" $name "* ]] || return
    grep -qs "\"name\": \"$name\", \"ok\": true" "$results/results.jsonl" && return
    if [ "$left" -le 0 ]; then
        echo "== $name: no time is left"
        return
    fi
    echo "== $name: $*" | tee -a "$results/log.txt"
    rm -f "$work/json"
    timeout "$left" "$@" >"$work/out" 2>"$work/err"
    code=$?
    [ "$code" = 0 ] || tail -n 25 "$work/err" >>"$work/out"
    sed '/^step .*|/d' "$work/out" | tee -a "$results/log.txt"  # without a run's lines of progress
    $python experiments/gpu.py record "$results" "$name" "$code" $((SECONDS - start)) "$work" "$@" |
        tee -a "$results/log.txt"
}
bench() { step "$1" $python bench.py --device="$device" --rounds=$rounds --json="$work/json" "${@:2}"; }
peers() {
    step "peers-$1" $python experiments/peers.py --device="$device" --rounds=$rounds --json="$work/json" \
        --systems="$1" $small $eager
}
train() { step "$1" $python "${@:2}" --data_dir="$work/data" --device="$device"; }

part1() {
    step facts $python experiments/gpu.py facts "$device" "$work/json" # 33
    bench step8 --mode=step $small --profile # 52; the dry run compiles here, and only here
    for system in ours hf-no-mask hf; do peers $system; done # (150)
    TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 bench step8-no-mix-order --mode=step $small $eager # (52)
}
part2() {
    bench step32 --mode=step $full $eager --profile # 123
    step checks $python experiments/gpu.py checks "$device" # 73
    bench step8-both --mode=step $small $eager --residual=bfloat16 --recompute=True # (52)
    bench ffn $ffn $eager \
        --ffn=swiglu,relu2,dsg,asg,sparsegated,dynamicgeglu,sparseglu,sparseglu:select=stat,spark # (57)
    bench ffn-flops $ffn $eager --ffn_match=flops --ffn=swiglu,relu2,moe,thresholdmoe # (40)
    [ -f "$work/data/meta.json" ] || $python experiments/gpu.py shards "$work/data"
    train ddp -m torch.distributed.run --standalone --nproc_per_node=1 train.py $tiny --max_iters=20 \
        --out_dir="$work/ddp" $eager # 39
    step resume $python experiments/gpu.py resume "$work" $tiny --data_dir="$work/data" --device="$device" \
        --compile=False # 32
    train smoke train.py $smoke --out_dir="$work/smoke" # 13
    # What follows is for a second start of this part.
    bench step8-recompute --mode=step $small $eager --recompute=True # (52)
    bench step8-residual --mode=step $small $eager --residual=bfloat16 # (52)
    device=cpu train smoke-cpu train.py $smoke --out_dir="$work/smoke-cpu" # 25
}
for part in $parts; do
    began=$SECONDS
    "part$part"
    $python experiments/gpu.py report "$results"
done
