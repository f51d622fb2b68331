"""The tokenizer of a GGUF file, made by transformers, with what transformers leaves out of it.

Every key of the file's tokenizer is read, known to say nothing of how text becomes tokens, or
refused by name; so is a way of splitting text that nobody here knows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from bridge.errors import BridgeError, one_line, show

READ = {
    *("model", "pre", "tokens", "token_type", "scores", "merges", "add_space_prefix"),
    *("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id", "eot_token_id"),
    *("eom_token_id", "unknown_token_id", "padding_token_id"),
}
# Keys of other uses of a model, and with one value those that would change what text becomes.
IGNORED = {
    *("cls_token_id", "mask_token_id", "seperator_token_id", "separator_token_id"),
    *("token_type_count", "prefix_token_id", "suffix_token_id", "middle_token_id"),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
}
NEUTRAL = {"add_sep_token": False, "remove_extra_whitespaces": False}
# `tokenizer.ggml.pre`: GPT-2's way of splitting text, which transformers takes for all that it does
# not know, and the same after every digit is split off.
AS_GPT2 = (None, "default", "gpt-2", "phi-2", "mpt", "olmo", "jais")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def save_tokenizer(path: Path, metadata: Mapping[str, Any], out: Path) -> None:
    """Write the files of the tokenizer of `path` into the directory `out`.

    Raises BridgeError, naming the file and the key, for what cannot be carried over.
    """
    from transformers import PreTrainedTokenizerFast

    _refuse_unknown(path, metadata)
    try:
        # not by AutoTokenizer, which reads the model's settings too, and some not
        made = PreTrainedTokenizerFast.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
        _complete(path, metadata, made.backend_tokenizer)
        made.save_pretrained(out)
    except BridgeError:
        raise
    except Exception as error:  # whatever its readers raise on a damaged file
        reason = one_line(str(error).strip().partition("\n")[0])
        raise BridgeError(f"{path}: transformers cannot make its tokenizer ({reason})") from error


def _refuse_unknown(path: Path, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        where, _, name = key.partition("tokenizer.ggml.")
        if where or name in READ or name in IGNORED:
            continue
        if name not in NEUTRAL or value != NEUTRAL[name]:
            raise BridgeError(
                f"{path}: {one_line(key)} {show(value)} is not known; start from the model's "
                "Hugging Face directory"
            )


def _complete(path: Path, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Let `tokenizer` split text as the file says where transformers does not."""
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    splits = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    if kind == "gpt2" and splits.get("type") == "ByteLevel" and splits.get("use_regex"):
        if pre in DIGITS:
            as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, as_gpt2])
        elif pre not in AS_GPT2:
            raise BridgeError(
                f"{path}: tokenizer.ggml.pre {show(pre)} is a way of splitting text that is not "
                "known; start from the model's Hugging Face directory"
            )
    if kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        spaces = decoders.Replace("▁", " ")
        tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
