"""Decoding: from prompts to responses, over whatever backend computes the steps.

In: prompts, widths, sampling and a backend's decoder. Out: events, and groups of responses. Here
too is what every backend refuses in the same words, and plans in NumPy in the same way.
"""
