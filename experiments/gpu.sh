#!/usr/bin/env bash
# What only a CUDA GPU can show, on one card, in two parts of at most seven minutes each:
#
#     RESULTS=results bash experiments/gpu.sh 1      # ceilings, the step, its options, checks, training
#     RESULTS=results bash experiments/gpu.sh 2      # other trainers, decoding, every FFN's cost
#     RESULTS=results bash experiments/gpu.sh 1 facts step   # only these steps of a part
#     DEVICE=cpu bash experiments/gpu.sh 1           # the same lines at toy sizes, as a dry run
#
# The most telling things come first. Each result is written at once: tables to log.txt, the same as
# JSON to results.jsonl. A step that is done is not done again, so the script may be cut anywhere and
# started anew. It needs torch and numpy; without transformers the other trainers are left out.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?give the part, 1 or 2} only="${*:2}" device=${DEVICE:-cuda} python=${PYTHON:-python}
work=out/gpu-$device results=${RESULTS:-out/gpu-$device}
mkdir -p "$work" "$results"
touch "$work/done"
export PYTHONUNBUFFERED=1 WORK=$work DEVICE=$device

full="--n_layer=32 --n_head=8 --n_embd=512 --ffn_hidden=2048 --block_size=2048 --micro_batch_size=16"
small=${full/32/8}  # eight layers compile in a quarter of the time, and show the same per layer
run="--batch_size=64 --max_iters=50 --val_tokens=262144" ffn="--d=512 --h=2048 --tokens=32768"
decode="--layers=16" rounds=11
if [ "$device" = cpu ]; then
    export OMP_NUM_THREADS=1
    full="--n_layer=2 --n_head=2 --n_embd=64 --ffn_hidden=128 --block_size=64 --micro_batch_size=2"
    small=$full run="--n_kv_head=2 --batch_size=4 --max_iters=5 --val_tokens=256"
    ffn="--d=64 --h=128 --tokens=64" decode="--layers=2 --d=64 --h=128" rounds=2
fi

# step NAME COMMAND...: run it once, add what it prints to log.txt and its JSON to results.jsonl
step() {
    local name=$1 start=$SECONDS
    shift
    [[ -z $only || " $only " == *" $name "* ]] || return
    grep -qx "$name" "$work/done" && return
    echo "== $name: $*" | tee -a "$work/log.txt"
    rm -f "$work/json"
    if "$@" >"$work/out" 2>"$work/err"; then echo "$name" >>"$work/done"; else
        echo "FAILED" >>"$work/out"; tail -n 25 "$work/err" >>"$work/out"
    fi
    echo "($((SECONDS - start)) s)" >>"$work/out"
    tee -a "$work/log.txt" <"$work/out"
    [ -f "$work/json" ] && $python -c 'import json, sys; print(json.dumps(
        {"name": sys.argv[1], **json.load(open(sys.argv[2]))}))' "$name" "$work/json" >>"$work/results.jsonl"
    [ "$work" -ef "$results" ] || cp "$work/log.txt" "$work/results.jsonl" "$results" 2>/dev/null
}
bench() { step "$1" $python bench.py --device="$device" --rounds=$rounds --json="$work/json" "${@:2}"; }
peers() { step "$1" $python experiments/peers.py --device="$device" --rounds=$rounds --json="$work/json" "${@:2}"; }
train() { step "$1" $python train.py --data_dir="$work/data" --device="$device" --out_dir="$work/$1" "${@:2}"; }

if [ "$part" = 1 ]; then
step shards $python - <<'END'
# The bytes of Python's own library, as if they were GPT-2 tokens: a vocabulary of 50304.
import os, pathlib, sysconfig
import numpy as np
out = pathlib.Path(os.environ["WORK"], "data")
out.mkdir(exist_ok=True)
files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = np.frombuffer(b"\0".join(f.read_bytes() for f in files), np.uint8).astype("<u2")
text = np.tile(text, 1 + 9_000_000 // len(text))
for name, tokens in ("val_000000", text[:600_000]), ("train_000001", text[600_000:]):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (out / f"bytes_{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
END
step facts $python - <<'END'
import json, os, sys
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
sys.path.insert(0, ".")
import bench, model

device = torch.device(os.environ["DEVICE"])
cuda = device.type == "cuda"
N, d, h, V, big = (32768, 512, 2048, 50304, 8192) if cuda else (64, 32, 64, 384, 64)
bf16 = {"device": device, "dtype": torch.bfloat16}
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
         "device": torch.cuda.get_device_name() if cuda else "cpu"}

def ms(call):
    return 1e3 * sorted(bench.measure({"call": call}, 9, device)["call"])[4]

def note(name, call, flops=0, size=0):
    time = ms(call)
    facts[name] = round(time, 4)
    rate = f"{flops / time / 1e9:8.1f} TFLOP/s" if flops else f"{size / time / 1e9:8.3f} TB/s" if size else ""
    print(f"{name:<34}{time:9.3f} ms {rate}", flush=True)

print(facts)
a = torch.randn(big * big * 8, **bf16)
note("copy", lambda: a.clone(), size=4 * a.numel())
a, b = torch.randn(2, big, big, **bf16)
note("product of 8192^3", lambda: a @ b, 2 * big**3)
del a, b
for name, i, o in [("q, k, v or o", d, d), ("qkv in one", d, 3 * d), ("gate or up", d, h),
                   ("gate and up in one", d, 2 * h), ("down", h, d), ("lm_head of 4096", d, V)]:
    n = N // 8 if o == V else N
    x, w, dy = torch.randn(n, i, **bf16), torch.randn(o, i, **bf16), torch.randn(n, o, **bf16)
    note(f"{name}: forward", lambda: x @ w.t(), 2 * n * i * o)
    note(f"{name}: dx", lambda: dy @ w, 2 * n * i * o)
    note(f"{name}: dw", lambda: dy.t() @ x, 2 * n * i * o)
B, T = (16, 2048) if cuda else (2, 32)
q, k, v = torch.randn(3, B, T, 8, 64, **bf16).transpose(2, 3).requires_grad_().unbind(0)
do = torch.randn(B, 8, T, 64, **bf16)
flops = 2 * 2 * B * 8 * T * T * 64 / 2
for kernel in ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if cuda else ("default",):
    def attend():
        if kernel == "default":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    try:
        note(f"attention, {kernel}: forward", attend, flops)
        note(f"attention, {kernel}: both", lambda: torch.autograd.grad(attend(), (q, k, v), do), 3.5 * flops)
    except RuntimeError as e:
        print(kernel, str(e)[:200])
if cuda:
    facts["kernel"] = type(F.scaled_dot_product_attention(q, k, v, is_causal=True).grad_fn).__name__
    print("by default:", facts["kernel"])
score = torch.randn(N, h, device=device)
note("topk and scatter", lambda: model.top_k_mask(score, h // 4))
counting = torch.compile(model.at_least_kth, dynamic=False)
note("topk by counting, compiled", lambda: counting(score, torch.tensor(h // 4, device=device)))
note("over mean + z std, compiled", lambda f=torch.compile(model.over_mean_mask): f(score, 0.67))
x, w = (torch.randn(n, d, **bf16).requires_grad_() for n in (N, V))
y = torch.randint(V, (N,), device=device)
loss = torch.compile(model.linear_cross_entropy, dynamic=False)
note("loss: both", lambda: torch.autograd.grad(loss(x, w, y), (x, w)), 6 * N * d * V)
plain = torch.compile(lambda x, w, y: F.cross_entropy((x @ w.t()).float(), y), dynamic=False)
note("loss, plain: both", lambda: torch.autograd.grad(plain(x, w, y), (x, w)), 6 * N * d * V)
json.dump(facts, open(os.environ["WORK"] + "/json", "w"))
END
bench step --mode=step $full --profile="$work/profile"
bench step8 --mode=step $small
TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 bench step8-no-mix-order --mode=step $small
bench step8-recompute --mode=step $small --recompute=True
bench step8-residual --mode=step $small --residual=bfloat16
bench step8-both --mode=step $small --residual=bfloat16 --recompute=True --profile="$work/profile-both"
step checks $python - <<'END'
# Every FFN compiled against eager, decode against forward, bfloat16 against float32: outputs and gradients.
import os, sys
import torch
sys.path.insert(0, ".")
from model import FFNS, GPT, GPTConfig, make_ffn

device = os.environ["DEVICE"]
cuda = device == "cuda"
d, h, B, T = (512, 2048, 8, 2048) if cuda else (64, 128, 2, 64)  # some reductions fuse over many rows only
options = {"dynamic": False, "backend": "inductor" if cuda else "aot_eager"}
torch._dynamo.config.recompile_limit = 64

def off(a, b):
    return float(((a - b).norm() / b.norm()).detach())

def outputs(layer, call, x, dy):
    y = call(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

specs = [*FFNS, "sparseglu:select=stat", "sparseglu:grad=gate", "asg:grad=ste", "sparsegated:grad=ste"]
bad = []
for spec in specs:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = make_ffn(spec, d, h).to(device)
    x, dy = torch.randn(2, B, T, d, device=device)
    x.requires_grad_()
    eager = outputs(layer, layer, x, dy)
    worst = {"compiled": max(map(off, outputs(layer, torch.compile(layer, **options), x, dy), eager))}
    if hasattr(layer, "decode"):
        with torch.no_grad():
            worst["decode"] = off(layer.decode(x[0, :4]), eager[0][0, :4])
    with torch.autocast(device, torch.bfloat16):
        worst["bfloat16"] = off(layer(x), eager[0])
    print(spec, {k: f"{v:.1e}" for k, v in worst.items()}, flush=True)
    # Rounding may swap two units at the edge of a top-k; a wrong formula is off by far more.
    bad += [(spec, k, v) for k, v in worst.items() if not v < (0.1 if k == "bfloat16" else 1e-2)]
for residual in ("float32", "bfloat16"):
    torch._dynamo.reset()
    model = GPT(GPTConfig(T, 512, 2, 2, 1, d, "dsg", h, residual=residual)).to(device)
    idx = torch.randint(512, (B, T), device=device)
    losses, gradients = [], []
    for call in (model, torch.compile(model, **options)):
        for bf16 in (False, True):
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                losses.append(call(idx, idx)[1])
            gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    worst = max(map(off, gradients[2], gradients[0])), max(map(off, gradients[3], gradients[1]))
    print(f"dsg, 2 layers, residual {residual}: losses {[round(x.item(), 4) for x in losses]}, gradients "
          f"compiled against eager {worst[0]:.1e}, in bfloat16 {worst[1]:.1e}")
    bad += [(residual, worst)] if worst[0] > 1e-2 or worst[1] > 0.1 else []
if bad:
    sys.exit(f"off: {bad}")
END
tiny="--n_layer=2 --n_head=2 --n_kv_head=2 --n_embd=128 --ffn_hidden=256 --block_size=128 --batch_size=8
    --micro_batch_size=4 --val_tokens=8192 --ffn=sparseglu --log_interval=10 --lr_decay_iters=20 --warmup_iters=2"
train whole $tiny --max_iters=20 --compile=False
train cut $tiny --max_iters=10 --compile=False
train cut2 $tiny --max_iters=20 --compile=False --init_from=resume --out_dir="$work/cut"
step ddp $python -m torch.distributed.run --standalone --nproc_per_node=1 train.py --data_dir="$work/data" \
    --device="$device" --out_dir="$work/ddp" $tiny --max_iters=20
train swiglu $full $run --eval_interval=1000 --log_interval=10
step smoke $python train.py config/smoke.py --device="$device" --out_dir="$work/smoke"
step smoke-cpu $python train.py config/smoke.py --device=cpu --out_dir="$work/smoke-cpu"
fi

if [ "$part" = 2 ]; then
peers peers $full
bench decode --mode=decode $decode --ffn=swiglu,sparseglu,sparseglu:select=stat,sparsegated,spark
bench ffn --mode=ffn $ffn --ffn=swiglu,relu2,dsg,asg,sparsegated,dynamicgeglu,sparseglu,sparseglu:select=stat,spark
fi
