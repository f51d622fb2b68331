"""Checkpoints: what a model is on disk, in each of its forms (chapter 9), and how it is made.

In: directories and GGUF files. Out: opened checkpoints, whose tensors are read when asked for; and
directories that appear whole or not at all: converted, or initialised with fresh blocks.
"""
