"""Hostile checkpoints by the thousand: what they are made of, and what each must come to.

`seeds` has small valid checkpoints of every form, `mutate` damages one as a function of a number,
`trial` writes it to disk, opens it under watch and says what it came to, and `corpus` replays what
once found a fault. `python -m tests.fuzz --help` runs more than the suite does.
"""
