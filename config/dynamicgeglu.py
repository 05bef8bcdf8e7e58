"""
Dynamic GEGLU (Aardvark, 2025): what the paper states of its run.

    torchrun --nproc_per_node=8 train.py config/dynamicgeglu.py
    python experiments/compare.py --paper=dynamicgeglu config/dynamicgeglu.py --seeds=5

Stated: 83M parameters, AdamW, learning rate 3e-4, betas 0.9 and 0.98, cosine, batch 128, context
2048, 400 steps, validation every 50, 5 seeds. ffn_hidden 1024 makes the layers' matrices
83,886,080; that this is the "83M" is our inference. No warm-up or final rate is stated.

    reported   Dynamic GEGLU 4.9260 +- 0.0002   SwiGLU 4.9266 +- 0.0003   IsoGMLP 4.9480 +- 0.0005

The gain it claims is 0.0006, twice SwiGLU's standard deviation. What it calls perplexity is
a loss; the ablations it announces are not in it; IsoGMLP is only named. 400 x 128 x 2048 tokens are
1.25 per parameter. alpha is close to a constant: LN(x) has norm sqrt(d) but for its gain and bias.
"""

ffn = "dynamicgeglu"
ffn_hidden = 1024
learning_rate = 3e-4
min_lr = 3e-5
beta1 = 0.9
beta2 = 0.98
schedule = "cosine"
batch_size = 128
block_size = 2048
max_iters = 400
eval_interval = 50
