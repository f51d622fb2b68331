"""How good a model's groups are at a task, with error bars, and what they cost.

In: models and tasks (`evaluate`), responses (`voting`, `metrics`), models and their hosts
(`speed`), and other engines (`peers`). Out: results that grow on disk (`records`), what they come
to (`summary`, `intervals`), plots.
"""
