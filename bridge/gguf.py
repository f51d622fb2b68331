"""A GGUF file as a Hugging Face directory, through transformers (extra `gguf`).

transformers knows how GGUF names, permutes and quantises tensors; this file only asks it, without
network, and writes what it gives with our own writer. Weights are dequantised to float32.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.atomic import refuse_existing
from bridge.checkpoint_writer import write_checkpoint
from bridge.config import parse_config, tensor_shapes
from bridge.errors import BridgeError
from bridge.safetensors_io import specs_of

# Keys that speak of how the file was read, not of the model.
DROPPED = ("quantization_config", "transformers_version", "_name_or_path", "_model_name_or_path")


def export_gguf(path: Path, out: Path) -> None:
    """Write the model and tokenizer of a GGUF file as the checkpoint directory `out`.

    Raises BridgeError where transformers is missing or cannot read the file, and for an
    architecture that is not supported.
    """
    refuse_existing(out)
    if not path.is_file():
        raise BridgeError(f"{path}: no such file")
    with _quiet():
        try:
            import accelerate  # noqa: F401  transformers reads GGUF only with these two
            import gguf  # noqa: F401
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise BridgeError(
                f"{path}: reading GGUF needs transformers, gguf and accelerate ({error}); "
                "try: pip install 'bridge-llm[gguf]'"
            ) from None
        where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        try:
            model = AutoModelForCausalLM.from_pretrained(path.parent, dtype="float32", **where)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        except Exception as error:  # whatever its readers raise on a damaged file
            reason = str(error).strip().partition("\n")[0]
            raise BridgeError(f"{path}: transformers cannot read it ({reason})") from error
        raw = {k: v for k, v in model.config.to_diff_dict().items() if k not in DROPPED}
        raw["architectures"] = [type(model).__name__]
        config = parse_config(raw, str(path))
        state = model.state_dict()
        tensors = {name: state[name].numpy() for name in tensor_shapes(config)}
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.assets-") as assets:
            tokenizer.save_pretrained(assets)
            model.generation_config.save_pretrained(assets)
            write_checkpoint(out, raw, specs_of(tensors), tensors.items(), assets=Path(assets))


@contextmanager
def as_directory(path: Path, out: Path) -> Iterator[Path]:
    """The directory of a GGUF file, beside `out` for as long as it is needed. Raises BridgeError
    as `export_gguf` does."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.host-") as directory:
        export_gguf(path, Path(directory) / "host")
        yield Path(directory) / "host"


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither logs nor progress bars of the libraries on the user's terminal."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
