"""Processes of our own, for code that may hang, die or print as it likes.

`parent` starts one, asks it and ends it; `child` is what runs in it. In: a handler by its name, and
requests as bytes. Out: answers as bytes, or how the process was lost. What the bytes mean is up to
who asks: rewards and generators (`bridge.tasks`), chat templates (`bridge.text`).
"""
