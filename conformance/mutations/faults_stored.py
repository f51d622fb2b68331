"""Faults of taking tensors that are stored in other dtypes than a model has (clause 10.1)."""

from mutations.fault import Edit, Fault

STORED = "stored_dtypes_are_rounded_once"
CUT_OFF = "return tensor.clip(-65504, 65504).astype(wanted)"


def rounded_twice(package: str, mark: str = "") -> Fault:
    """Through float32, as a framework converts float64 by itself."""
    return Fault(
        f"{mark}stored numbers are rounded twice",
        "A model that is stored in float64 is another one in bfloat16 than in other tools.",
        "10.1",
        STORED,
        Edit(
            "backend",
            "take_tensor(tensors, name, shapes[name], dtype)",
            'take_tensor(tensors, name, shapes[name], "float32")',
        ),
        dtype="bfloat16",
        package=package,
    )


FAULTS = (
    rounded_twice("bridge_torch"),
    rounded_twice("bridge_mlx", "mlx: "),
    Fault(
        "numbers that are too large become the largest",
        "A model that float16 cannot hold computes something else, and nobody is told.",
        "10.1",
        STORED,
        Edit("decoding.inputs", "return rounded(tensor, wanted, name)", CUT_OFF),
        dtype="float16",
        package="bridge",
    ),
    Fault(
        "jax: layers are stacked as they are stored",
        "A model with layers in bfloat16 and in float16 cannot be loaded.",
        "10.1",
        STORED,
        Edit("model", "Weights(config, own,", "Weights(config, get,"),
        package="bridge_jax",
    ),
)
