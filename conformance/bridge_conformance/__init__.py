"""Property tests of the backend contract, by clause of the spec.

`strategies` draws random small models and batches, `tolerance` is the numerics rule, and the
`checks_*` modules hold one function a property; `checks.CHECKS` lists them all. Nothing here knows
which backend is under test: a porter's runs through the same functions.
"""
