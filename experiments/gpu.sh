#!/usr/bin/env bash
# Everything that only a CUDA GPU can show, on one card, with torch and numpy alone:
#
#     bash experiments/gpu.sh                # writes experiments/results/<device>.md and .json
#     DEVICE=cpu bash experiments/gpu.sh     # the same lines at toy sizes, into out/gpu-dry-run
#
# Meant to take under 8 minutes, which no card has shown yet: it compiles eight models of 32 layers.
# Each part prints when it began; the first failing line ends it. What was measured until then is
# written already, and the same command goes on from there (out/gpu-cuda).
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} python=${PYTHON:-python}
work=out/gpu-$device
part() { echo "== ${SECONDS}s  $1"; }
quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; return 1; }; }

if [ "$device" = cuda ]; then
    $python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
        { echo "error: torch sees no CUDA GPU here: DEVICE=cpu for a dry run" >&2; exit 1; }
    results=experiments/results
    ffn="--d=1536 --h=8960 --tokens=16384" decode=""
    model="--n_layer=32 --n_head=8 --n_embd=512 --ffn_hidden=2048 --block_size=2048"
    run="--batch_size=64 --micro_batch_size=16 --max_iters=50 --val_tokens=262144"
    step="--micro_batch_size=16"
    rounds=15
else
    export OMP_NUM_THREADS=1
    results=out/gpu-dry-run
    ffn="--d=64 --h=128 --tokens=64 --compile=False" decode="--d=64 --h=128 --compile=False"
    model="--n_layer=2 --n_head=2 --n_embd=64 --ffn_hidden=128 --block_size=64 --compile=False"
    run="--n_kv_head=2 --batch_size=4 --micro_batch_size=2 --max_iters=5 --val_tokens=256"
    step="--micro_batch_size=2"
    rounds=2
fi
card=$($python -c 'import torch; print(torch.__version__, *map(torch.cuda.get_device_name, range(torch.cuda.device_count())))')
stamp="$card $(cat ./*.py experiments/*.py experiments/gpu.sh | cksum)"
[ "$(cat "$work/stamp" 2>/dev/null)" = "$stamp" ] || rm -rf "$work"  # of another card or other code
mkdir -p "$work" "$results"
echo "$stamp" >"$work/stamp"
SECONDS=$(cat "$work/seconds" 2>/dev/null || echo 0)

# The results so far, written anew after every part.
cat >"$work/report.py" <<'EOF'
import datetime, json, pathlib, re, sys
import torch

work, results, device, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), *sys.argv[3:]
name = torch.cuda.get_device_name() if device == "cuda" else "cpu dry run"
day = datetime.date.today().isoformat()
out = {"device": name, "date": day, "torch": torch.__version__, "seconds": int(seconds), "train": {}}
text = [f"# {name}, {day}", f"`bash experiments/gpu.sh`, torch {torch.__version__}, {seconds} s.",
        "Checks passed: every FFN, bfloat16, compile, decode, DDP with one rank, resuming."]
for mode in ("ffn", "decode", "step", "data", "peers"):
    table, path = ((work / mode).with_suffix(end) for end in (".txt", ".json"))
    text += [f"## {mode}", f"```\n{table.read_text().strip()}\n```" if table.exists() else "not measured"]
    out[mode] = json.loads(path.read_text()) if path.exists() else None
rows = ["| system | loss | tokens/s | MFU |", "| --- | --- | --- | --- |"]
for system in ("swiglu", "dsg", "asg", "sparsegated", "dynamicgeglu", "sparseglu"):
    path = work / system / "log.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not log or not log[-1]["step"] or "val_loss" not in log[-1]:  # the end of a finished run
        rows.append(f"| {system} | not measured | | |")
        continue
    train = [row for row in log if "train_loss" in row][-1]
    val = [row for row in log if "val_loss" in row][-1]["val_loss"]
    mfu = f"{train['mfu']:.1%}" if train["mfu"] else "n/a"
    out["train"][system] = {"val_loss": val, "tok_per_s": train["tok_per_s"], "mfu": train["mfu"]}
    rows.append(f"| {system} | {val:.4f} | {train['tok_per_s']:,.0f} | {mfu} |")
text += ["## 50 steps of the default model, on bytes", "\n".join(rows)]
stem = results / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")
stem.with_suffix(".json").write_text(json.dumps(out, indent=1) + "\n")
print(f"{stem}.md and .json")
EOF
report() {
    echo $SECONDS >"$work/seconds"
    $python "$work/report.py" "$work" "$results" "$device" $SECONDS >"$work/where"
}

part "shards of bytes"
rm -rf "$work/data"
$python - "$work/data" "$device" <<'EOF'
import json, pathlib, sys, sysconfig
import numpy as np

out = pathlib.Path(sys.argv[1])
out.mkdir()
files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = np.frombuffer(b"\0".join(f.read_bytes() for f in files), np.uint8).astype("<u2")
text = np.tile(text, 1 + 9_000_000 // len(text))  # 50 steps of 64 x 2048 are 6.6 million
shards = {"bytes_val_000000.bin": text[:600_000], "bytes_train_000001.bin": text[600_000:]}
for name, tokens in shards.items():
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (out / name).write_bytes(header.tobytes() + tokens.tobytes())
if sys.argv[2] != "cuda":  # without a meta.json they count as GPT-2's, with a vocabulary of 50304
    meta = {"encoding": "bytes", "vocab_size": 257, "eot": 256, "complete": True}
    meta["shards"] = [{"name": name, "tokens": len(tokens)} for name, tokens in shards.items()]
    (out / "meta.json").write_text(json.dumps(meta))
EOF

if [ ! -e "$work/checked" ]; then
part "checks: every FFN compiled against eager, decode against forward, bfloat16 against float32"
$python - "$device" <<'EOF'
import sys
import torch
from model import FFNS, GPT, GPTConfig, make_ffn

device = sys.argv[1]
d, h = (512, 2048) if device == "cuda" else (64, 128)
# Inductor fuses some reductions only over thousands of rows.
B, T = (8, 2048) if device == "cuda" else (2, 64)
backend = "inductor" if device == "cuda" else "aot_eager"  # the dry run compiles no kernels


def off(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def outputs(layer, call, x, dy):
    """y and every gradient."""
    y = call(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


specs = [*FFNS, "sparseglu:select=stat", "sparseglu:grad=gate", "asg:grad=ste", "sparsegated:grad=ste"]
for spec in specs:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = make_ffn(spec, d, h).to(device)
    x, dy = torch.randn(2, B, T, d, device=device)
    x.requires_grad_()
    eager = outputs(layer, layer, x, dy)
    # 1e-2: rounding may swap two units at the edge of a top-k; a wrong formula is off by far more
    for a, b in zip(outputs(layer, torch.compile(layer, dynamic=False, backend=backend), x, dy), eager):
        assert off(a, b) < 1e-2, (spec, "compiled", off(a, b))
    if hasattr(layer, "decode"):
        error = off(layer.decode(x[0, :4]), eager[0][0, :4])
        assert error < 1e-2, (spec, "decode", error)
    with torch.autocast(device, torch.bfloat16):
        error = off(layer(x), eager[0])
    assert error < 0.1, (spec, "bfloat16", error)

torch.manual_seed(0)
torch._dynamo.reset()
model = GPT(GPTConfig(T, 512, 2, 2, 1, d, "dsg", h)).to(device)
idx = torch.randint(512, (B, T), device=device)
losses, gradients = [], []
for call in (model, torch.compile(model, dynamic=False, backend=backend)):
    for bf16 in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            losses.append(call(idx, idx)[1])
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
assert max(losses) - min(losses) < 0.05, losses
for (name, _), eager, compiled in zip(model.named_parameters(), gradients[0], gradients[2]):
    assert off(compiled, eager) < 1e-2, (name, off(compiled, eager))
print(f"{len(specs)} FFNs pass; losses of one model {[round(x.item(), 4) for x in losses]}")
EOF

part "checks: one rank of DDP against none, and a run cut in two against a whole one"
small="--data_dir=$work/data --device=$device --n_layer=2 --n_head=2 --n_kv_head=2 --n_embd=128
    --ffn_hidden=256 --block_size=128 --batch_size=8 --micro_batch_size=4 --val_tokens=8192
    --ffn=sparseglu --log_interval=1 --lr_decay_iters=20 --warmup_iters=2 --compile=False"
quietly $python train.py $small --max_iters=20 --out_dir="$work/whole"
quietly $python -m torch.distributed.run --standalone --nproc_per_node=1 \
    train.py $small --max_iters=20 --out_dir="$work/ddp"
quietly $python train.py $small --max_iters=10 --out_dir="$work/cut"
quietly $python train.py $small --max_iters=20 --out_dir="$work/cut" --init_from=resume
$python - "$work" <<'EOF'
import json, sys


def losses(name):
    rows = [json.loads(line) for line in open(f"{sys.argv[1]}/{name}/log.jsonl")]
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


whole, ddp, cut = losses("whole"), losses("ddp"), losses("cut")
assert whole[20] < whole[0] - 0.5, whole  # it learns
assert abs(whole[20] - ddp[20]) < 0.02 and abs(whole[20] - cut[20]) < 0.02, (whole, ddp, cut)
print(f"validation loss {whole[0]:.4f} to {whole[20]:.4f}; DDP {ddp[20]:.4f}, cut {cut[20]:.4f}")
EOF

touch "$work/checked"
fi

bench() {  # name, script, arguments: a table and its JSON
    [ ! -e "$work/$1.json" ] || return 0
    part "bench: $1"
    { $python "$2" --device="$device" --rounds=$rounds --json="$work/$1.json" "${@:3}" \
        2>"$work/err" || { cat "$work/err" >&2; false; }; } | tee "$work/$1.txt"
    report
}
bench ffn bench.py --mode=ffn $ffn
bench decode bench.py --mode=decode $decode --ffn=swiglu,sparseglu,sparseglu:select=stat,sparsegated,spark
bench step bench.py --mode=step $model $step
bench data bench.py --mode=data
if $python -c 'import transformers' 2>/dev/null; then
    bench peers experiments/peers.py $model $step
else
    echo "not measured: transformers is not installed" | tee "$work/peers.txt"
fi

finished() { tail -n 1 "$work/$1/log.jsonl" 2>/dev/null | grep -q '"step": [1-9].*val_loss'; }
for system in swiglu dsg asg sparsegated dynamicgeglu sparseglu; do
    ! finished "$system" || continue
    part "50 steps: $system"
    quietly $python train.py --data_dir="$work/data" --device="$device" --ffn=$system $model $run \
        --eval_interval=1000 --out_dir="$work/$system"
    finished "$system" || { echo "error: $system was stopped" >&2; exit 1; }
    tail -n 1 "$work/$system/log.jsonl"
    report
done
echo "== ${SECONDS}s  done: $(cat "$work/where")"
rm -rf "$work"
