"""The NumPy reference, written to be read beside the spec: the definition of what Bridge computes.

Forward and exact hand-written backward, cached decoding, sampling, losses, AdamW. float64 by
default; float32, bfloat16 and float16 follow the rule of `precision`. Knows no files and no text.
"""
