"""Faults planted in a backend, each of which conformance must catch: the test of the tests.

Not shipped. `python -m mutations`, from `conformance/`, runs them all; `fault.py` says what one is.
"""

from mutations import (
    faults_advantages,
    faults_ahead,
    faults_block,
    faults_coming,
    faults_decode,
    faults_ends,
    faults_files,
    faults_fused,
    faults_jax,
    faults_jax_training,
    faults_life,
    faults_long,
    faults_mlx,
    faults_mlx_coming,
    faults_mlx_training,
    faults_model,
    faults_sampling,
    faults_shared,
    faults_stored,
    faults_tables,
    faults_torch_ahead,
    faults_train,
    faults_trainable,
)
from mutations.fault import Fault

MODULES = (
    faults_block,
    faults_model,
    faults_decode,
    faults_torch_ahead,
    faults_fused,
    faults_sampling,
    faults_long,
    faults_coming,
    faults_ahead,
    faults_tables,
    faults_ends,
    faults_train,
    faults_trainable,
    faults_life,
    faults_shared,
    faults_jax,
    faults_jax_training,
    faults_mlx,
    faults_mlx_coming,
    faults_mlx_training,
    faults_advantages,
    faults_stored,
    faults_files,
)

FAULTS: dict[str, Fault] = {fault.name: fault for module in MODULES for fault in module.FAULTS}
