"""A comparison that two CPU cores can carry, a few minutes a run: bytes of the Python standard
library, a width at which the FFN is two thirds of the FLOPs and ASG's threshold passes some units.

    python experiments/compare.py config/tiny.py --ffn=swiglu,geglu,sparseglu --seeds=3 --name=tiny
"""

data_dir = "data/stdlib"
prepare = "--input=stdlib --encoding=bytes --val_tokens=262144 --max_tokens=8000000"

n_layer = 3
n_head = 4
n_kv_head = 2
n_embd = 256
ffn_hidden = 768
block_size = 256

max_iters = 200
batch_size = 16
micro_batch_size = 16
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 20

eval_interval = 50
val_tokens = 131072
save_interval = 100
log_interval = 10
