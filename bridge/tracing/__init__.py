"""Tracing: what the sharing between rows does, seen by replaying the answers of a group.

In: a model and the responses of one prompt. Out: a `Trace` (`trace`), which says where rows look,
how much blocks add and how alike answers are (`diversity`), and is JSON if asked; and of a trace a
page or a picture (`export`). It knows nothing of terminals: `bridge inspect --trace` has that view.
"""
