"""A comparison that two CPU cores can carry, a few minutes a run, as in experiments/results/start_values
but on bytes of the Python standard library. At this width the FFN is two thirds of the FLOPs and ASG's
threshold passes some units.

    python experiments/compare.py config/tiny.py --ffn=swiglu,geglu,sparseglu --seeds=5 --name=tiny
"""

data_dir = "data/stdlib"
prepare = "--input=stdlib --encoding=bytes --val_tokens=262144 --max_tokens=8000000"

n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 256
ffn_hidden = 768
ffn_init_std = 0.0625  # 1/sqrt(n_embd): SwiGLU gained 0.07 nats by it on web text; or use --init_sweep
block_size = 256

max_iters = 500
batch_size = 16
micro_batch_size = 16
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 20

eval_interval = 100
val_tokens = 262144
save_interval = 100
log_interval = 50
