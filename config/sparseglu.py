"""
SparseGLU (Aardvark, 2025): what the paper states of its run.

    torchrun --nproc_per_node=8 train.py config/sparseglu.py
    python experiments/compare.py --paper=sparseglu config/sparseglu.py

Stated: 134M parameters, 50K steps, learning rate 6e-4 with cosine, batch 256, k of 25%, a predictor
of 32-64-h. Its FFN of 1536 x 8960 belongs to Qwen2-1.5B and fits no 134M model: it is a shape for
bench.py. Sequence length and warm-up are not stated: ours.

    reported   SparseGLU 5.0202   SwiGLU 4.927   GEGLU 4.8734

"1.3% worse" is 1.9% by its own table. No gradient reaches the predictor through the hard mask, so
what picks the neurons is a random function of 32 channels; sparseglu:grad=ste and grad=gate learn it.
"""

ffn = "sparseglu:k=0.25:r=32:p=64"
learning_rate = 6e-4
min_lr = 6e-5
schedule = "cosine"
max_iters = 50_000
batch_size = 256
block_size = 2048
warmup_iters = 500
eval_interval = 1000
save_interval = 1000
log_interval = 100
