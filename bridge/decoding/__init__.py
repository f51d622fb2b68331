"""Decoding: from prompts to responses, over whatever backend computes the steps.

In: requests, each a prompt, its width and how its rows draw and end, and a backend's model. Out:
events, and groups of responses. `engine.py` is where to begin. Here too is what every backend
refuses in the same words, and plans in NumPy in the same way.
"""
