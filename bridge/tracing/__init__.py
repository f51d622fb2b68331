"""Tracing: what the sharing between rows does, seen by replaying the answers of a group.

In: a model and the responses of one prompt. Out: a `Trace`, where rows look, how much blocks add,
how alike answers are; and views of it.
"""
