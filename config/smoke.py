"""A first run, in about two minutes and without a GPU: a small SwiGLU model of bytes, trained on the
Python standard library's own sources. `python train.py config/smoke.py`"""

data_dir = "data/stdlib"
prepare = "--input=stdlib --encoding=bytes --val_tokens=262144 --max_tokens=8000000"
out_dir = "out/smoke"

n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 128
ffn_hidden = 384
block_size = 256

max_iters = 220
batch_size = 16
micro_batch_size = 16
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 20

eval_interval = 110
val_tokens = 65536
save_interval = 110
compile = False  # compiling takes longer than these steps
sample_tokens = 200
prompt = "def "
