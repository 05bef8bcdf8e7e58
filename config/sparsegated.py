"""
Sparse Gated FFN (Aardvark, 2025): what the paper states of its run.

    torchrun --nproc_per_node=8 train.py config/sparsegated.py
    python experiments/compare.py --paper=sparsegated config/sparsegated.py

Stated: 134M parameters, 100K steps, batch 1024, top-k of 0.15 h. Sequence length, learning rate
and warm-up are not stated: those here are ours.

    reported   5.0902 (claimed at 0.15x the FLOPs)   no key-value split 5.2341
               no residual gate 5.4123   50% sparsity 5.0321   SwiGLU 4.927

The SwiGLU loss of 100,000 steps is, to the digit, that of Dynamic Sparse Gating's 400. The keys
must all be computed to find the largest, so the ideal cost is (1 + 2k)/3 + d/(3h) of SwiGLU's, 0.52
here, not 0.15.
"""

ffn = "sparsegated:k=0.15"
max_iters = 100_000
batch_size = 1024
block_size = 2048
warmup_iters = 1000
eval_interval = 1000
save_interval = 1000
log_interval = 100
