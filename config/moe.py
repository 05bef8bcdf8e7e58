"""
A mixture of experts at the default model's size: the shared half of ReLU2's units, and one of eight
experts as wide as the other half. For GPUs:

    torchrun --nproc_per_node=8 train.py config/moe.py

No paper's run: the literature's experts are more and finer (DeepSeek-V3, arXiv 2412.19437: 256 experts
2,048 wide, 8 for a token). Few and coarse ones cost less time for the same FLOPs. ffn_hidden is 3/2 of
SwiGLU's 2048, so that a token costs the FLOPs of SwiGLU's three matrices in ReLU2's two. The dense twin
to beat is --ffn=relu2.
"""

ffn = "moe"  # or thresholdmoe, or moe:balance=loss
ffn_hidden = 3072
max_iters = 640
