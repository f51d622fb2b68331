"""Faults of taking tensors that are stored in other dtypes than a model has (clause 10.1)."""

from mutations.fault import Edit, Fault

STORED = "stored_dtypes_are_rounded_once"


def rounded_twice(package: str, of: str) -> Fault:
    """Without the dtype a framework converts by itself, float64 through float32."""
    return Fault(
        f"stored numbers are rounded twice{of}",
        "A model that is stored in float64 is another one in bfloat16 than in other tools.",
        "10.1",
        STORED,
        Edit(
            "backend",
            "take_tensor(tensors, name, shapes[name], dtype)",
            "take_tensor(tensors, name, shapes[name])",
        ),
        dtype="bfloat16",
        package=package,
    )


FAULTS = (
    rounded_twice("bridge_torch", ""),
    rounded_twice("bridge_mlx", " (MLX)"),
    Fault(
        "layers are stacked as they are stored (JAX)",
        "A model with layers in bfloat16 and in float16 cannot be loaded.",
        "10.1",
        STORED,
        Edit("model", "_stack(config, names, own)", "_stack(config, names, get)"),
        package="bridge_jax",
    ),
)
