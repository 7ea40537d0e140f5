"""Zipformer speech encoder (arXiv 2310.11230) in plain PyTorch, with icefall's parameter names.

Shapes: B batch, T frames, C channels, H heads. Lengths are int64 tensors (B,).
"""
