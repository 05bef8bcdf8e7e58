"""
Dynamic Sparse Gating (Aardvark, 2025): what the paper states of its run.

    torchrun --nproc_per_node=8 train.py config/dsg.py

Stated: 134M parameters, vocabulary 50304, 400 steps, batch 512, sequences of 2048, 8 A100.
Not stated: the shape (train.py's default is our inference: its layers' matrices hold 134,217,728
parameters), the learning rate, what the gate m is (ours is Dynamic GEGLU's alpha).

    reported   DSG 4.935   SwiGLU 4.927

400 x 512 x 2048 tokens are 3.1 per parameter. The five papers, from 400 steps to 100,000, share one
SwiGLU loss of 4.927 (4.9266 in Dynamic GEGLU): they cannot all have measured it.
"""

ffn = "dsg"
max_iters = 400
batch_size = 512
block_size = 2048
