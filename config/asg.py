"""
Adaptive Sparse Gating (Aardvark, 2025): what the paper states of its run.

    torchrun --nproc_per_node=8 train.py config/asg.py
    python experiments/compare.py --paper=asg config/asg.py        # every row of its table

Stated: 134M parameters, 640 steps, Chinchilla-optimal. 20 tokens for each of 134,217,728
parameters are exactly 640 steps of 2^22 tokens; that this was the batch is our inference.

    reported   ASG 5.11   fixed threshold 0.1 5.23   threshold per neuron 5.18
               no sparse pathway = SwiGLU (4.927)   Multi-Scale Gated 4.792   Dual-Gated 4.7926
               active ratio about 35%

By its own table the method loses to its ablation without the sparse pathway. Multi-Scale and
Dual-Gated are only named: ours are readings. As written it is not adaptive: through the hard mask
no gradient reaches the threshold, so tau stays sigmoid(0) = 0.5 and the width decides how much is
active (at init about 27% at d=512). asg:grad=ste learns it.
"""

ffn = "asg"
max_iters = 640
batch_size = 2048
block_size = 2048
