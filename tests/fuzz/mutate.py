"""Damage to a tree, as a function of a seed and a number: the same input on every machine.

An input changes one or a few files. JSON is changed where its structure is: a value, a type, a
key, twice the same key; a safetensors header so too, with its length kept true or made to lie;
and any file by its bytes, or by what it is on disk.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from .seeds import Entry, Link, Special, Tree, seeds

Pairs = list[tuple[str, Any]]


class Object:
    """A JSON object as pairs, so that a key can come twice."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = list(pairs)


NUMBERS = (
    *(0, -1, 1, 2, 3, 4, 7, 8, 16, 64, 65, 255, 4096, 10**5, 10**9),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**18, 10**40, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-320, 5e-324, 1e-30, 1e30, 1e308, 1.7976931348623157e308),
    *(float("nan"), float("inf"), -float("inf")),
)
TEXTS = (
    *("", " ", "\n", "a\nb", "\x00", "\ud800", "\u202e", "é", "🦊", "x" * 300, "A" * 70_000),
    *("..", ".", "/", "../base", "../outside", "/etc/passwd", "../outside/model.safetensors"),
    *("/dev/zero", "model.safetensors", "config.json", "a\\b.safetensors", "a\x00.safetensors"),
    *("\n.safetensors", "\ud800.safetensors", ".safetensors", "sub/model.safetensors"),
    *("CON", "~", "~root", "file:///etc/passwd", "http://127.0.0.1/", "%s%n{0}", "{{ 1 }}"),
    *("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "U32", "BOOL"),
    *("f32", "float32", "attention", "mlp", "1.0", "llama", "qwen2", "qwen3", "mistral", "gpt2"),
    *("LORA", "all-linear", "q_proj", "lm_head", "none", "gaussian", "pissa"),
    *("default", "linear", "llama3", "yarn", "dynamic", "longrope", "full_attention"),
    *("sliding_attention", "<eos>", "</s>", "__metadata__", "format", "pt", "jax", "mlx"),
    *("BPE", "Unigram", "WordPiece", "WordLevel", "Sequence", "Replace", "Prepend", "Split"),
    *(
        "ByteLevel",
        "Precompiled",
        "ByteFallback",
        "Fuse",
        "Strip",
        "(a+)+$",
        "(?=a)*",
        "[",
        "a{9999}",
    ),
    *("lm_head.weight", "model.norm.weight", "model.layers.0.bridge.norm.weight"),
    *("model.layers.*.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.embed_tokens.weight"),
)
KEYS = (
    *("bridge", "quantization", "quantization_config", "rope_scaling", "rope_parameters", "base"),
    *("auto_map", "model_file", "vocab_size", "hidden_size", "num_hidden_layers", "head_dim"),
    *("sliding_window", "layer_types", "max_window_layers", "tie_word_embeddings", "type"),
    *("weight_map", "metadata", "dtype", "shape", "data_offsets", "__metadata__", "factor"),
    *("rms_norm_eps", "eos_token_id", "partial_rotary_factor", "bits", "group_size", "mode"),
    *("chat_template", "eos_token", "truncation", "padding", "added_tokens", "model", "content"),
    *("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "use_dora", "bias"),
)
JINJA = (
    "{% for a in range(99999) %}",
    "{% for a in messages %}",
    "{% endfor %}",
    "{% if a %}",
    "{% endif %}",
    "{% else %}",
    "{% set x = 'a' * 9999 %}",
    "{% set ns = namespace(x=3) %}",
    "{% set ns.x = ns.x * ns.x %}",
    "{% set ns.x = ns.x ~ ns.x %}",
    "{% macro f(a) %}{{ f(a) }}{% endmacro %}",
    "{{ f(1) }}",
    "{% break %}",
    "{% set x = messages | tojson %}",
    "{{ x | replace('a', x) }}",
    "{{ messages | map('upper') | list }}",
    "{{ [1, 2] | sum(start=x) }}",
    "{{ ''.__class__ }}",
    "{{ x.format(x) }}",
    "{{ '%9999d' % x }}",
    "{{ 9 ** 99 ** 9 }}",
    "{{ messages | batch(3) | list | length }}",
    "{{ (x, x) | join(x) | wordwrap(3) }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% raw %}",
    "{# ",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{% filter upper %}",
    "{% call f(1) %}",
    "{% block a %}",
    "{% generation %}",
    "((((((((",
    "[[[[[[[[",
    "-----",
)
RARE = 0.02  # how often an input is deep or large, which takes time


def mutant(name: str, seed: int, number: int) -> Tree:
    """The entries of seed checkpoint `name` that input `number` changes."""
    rng = random.Random(f"{name} {seed} {number}")
    tree = seeds()[name]
    files = [path for path in tree if not path.startswith("outside/")]
    changes: Tree = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(files)
        entry = changes.get(path, tree[path])
        changes[path] = _damage(rng, path, entry, tree)
    return changes


def _damage(rng: random.Random, path: str, entry: Entry, tree: Tree) -> Entry:
    if not isinstance(entry, bytes) or rng.random() < 0.04:
        return _on_disk(rng, path, tree)
    if rng.random() < 0.2:
        return _bytes(rng, entry, tree)
    if path.endswith(".safetensors"):
        return _safetensors(rng, entry)
    if path.endswith(".json"):
        return _json_text(rng, entry, _value)
    return _template(rng, entry)


def _on_disk(rng: random.Random, path: str, tree: Tree) -> Entry:
    """What is not a plain file, or not there, or another file."""
    up = "../" * path.count("/")
    targets = ("outside/secret.txt", "outside/model.safetensors", "outside/tokenizer_config.json")
    other = rng.choice([p for p in tree if isinstance(tree[p], bytes)])
    return rng.choice(
        [
            Special("absent"),
            Special("fifo"),
            Special("folder"),
            Link(up + rng.choice(targets)),
            Link(path.rsplit("/", 1)[-1]),  # to itself
            Link("/dev/zero"),
            Link(up + other),
            tree[other],
            b"",
        ]
    )


def _bytes(rng: random.Random, data: bytes, tree: Tree) -> bytes:
    """Flips, cuts, insertions and splices."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        if rng.random() < 0.5:  # where the structure is, and not the weights
            at = min(at, rng.randrange(400))
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.choice(b'\x00\xff"{}[]:,0-\\\n')
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + rng.choice((1, 2, 8, 64))]
            case 4:
                changed[at:at] = rng.choice(
                    (b"\x00", b"0" * 40, b"\xff" * 8, b"[" * 9, b"{}", b"9")
                )
            case _:
                other = rng.choice([e for e in tree.values() if isinstance(e, bytes)])
                start = rng.randrange(len(other) + 1)
                changed[at : at + rng.choice((0, 16, 200))] = other[start : start + 200]
    return bytes(changed)


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    """A header with changed entries; then a length that is true, or a lie."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    header = _json_text(rng, header, _entry if rng.random() < 0.7 else _value)
    header += b" " * rng.choice((0, 0, 0, 1, -len(header) % 8))
    claimed = len(header)
    match rng.randrange(24):
        case 0:
            claimed += rng.choice((-8, -1, 1, 8, len(body), len(body) + 1))
        case 1:
            claimed = rng.choice((0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 100_000_001))
        case 2:
            body = body[: rng.randrange(len(body) + 1)]
        case 3:
            body += bytes(rng.choice((1, 2, 8)))
        case 4 if body:
            at = rng.randrange(len(body))
            body = (
                body[:at]
                + rng.choice((b"\x7f\xc0" * 4, b"\xff" * 8, b"\x00\x7c" * 4))
                + body[at + 8 :]
            )
        case _:
            pass
    return (claimed % 2**64).to_bytes(8, "little") + header + body


def _entry(rng: random.Random, root: Any) -> Any:
    """One tensor's entry: its offsets, its shape or its dtype; or two that trade places."""
    if not isinstance(root, Object) or not root.pairs:
        return _value(rng, root)
    at = rng.randrange(len(root.pairs))
    entry = root.pairs[at][1]
    if not isinstance(entry, Object):
        return _value(rng, root)
    fields = dict(entry.pairs)
    other_name, other = rng.choice(root.pairs)
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    match rng.randrange(9):
        case 0:
            fields["dtype"] = rng.choice(TEXTS)
        case 1:
            fields["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]
        case 2 if isinstance(shape, list):
            fields["shape"] = rng.choice(
                (shape[::-1], [1, *shape], shape[:-1], [0, *shape], shape * 2)
            )
        case 3:
            fields["data_offsets"] = [
                rng.choice(NUMBERS) for _ in range(rng.choice((2, 2, 2, 1, 3)))
            ]
        case 4 if isinstance(offsets, list):
            fields["data_offsets"] = rng.choice((offsets[::-1], offsets * 2, offsets[:1]))
        case 5 if isinstance(offsets, list) and all(type(v) is int for v in offsets):
            shift = rng.choice((-8, -4, -2, -1, 1, 2, 4, 8))
            moved = rng.choice(((shift, shift), (0, shift), (shift, 0)))
            fields["data_offsets"] = [v + m for v, m in zip(offsets, moved, strict=False)]
        case 6 if isinstance(other, Object):  # two names for the same bytes, or swapped
            taken = dict(other.pairs)
            other.pairs = list(fields.items()) if rng.random() < 0.5 else other.pairs
            fields = taken
        case 7:
            root.pairs[at] = (rng.choice((other_name, *TEXTS)), entry)
            return root
        case _:  # many axes, whose product may be beyond any number
            fields["shape"] = [rng.choice((1, 1, 2**40))] * rng.choice((1, 33, 65, 200))
    entry.pairs = list(fields.items())
    return root


def _json_text(
    rng: random.Random, data: bytes, change: Callable[[random.Random, Any], Any]
) -> bytes:
    """Change a JSON document in its structure; where it is none, in its bytes."""
    try:
        root = json.loads(data, object_pairs_hook=Object)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            root = change(rng, root)
        text = _dump(root, escaped=rng.random() < 0.5)
    except (ValueError, RecursionError):
        return _bytes(rng, data, {"": data})
    if rng.random() < RARE:
        text = rng.choice(
            ("\ufeff" + text, text + " " + text, text + " " * 5000, "\n" + text, text[:-1])
        )
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")


def _value(rng: random.Random, root: Any) -> Any:
    """Change one value somewhere, found by walking down from the root."""
    if rng.random() < 0.02:
        return _any_value(rng)
    node: Any = root
    while isinstance(node, (Object, list)):
        items = node.pairs if isinstance(node, Object) else node
        if not items or rng.random() < 0.12:
            _reorder(rng, items, isinstance(node, Object))
            return root
        at = rng.randrange(len(items))
        child = items[at][1] if isinstance(node, Object) else items[at]
        deeper = isinstance(child, (Object, list)) and rng.random() < 0.8
        if not deeper:
            new = _near(rng, child) if rng.random() < 0.4 else _any_value(rng)
            items[at] = (items[at][0], new) if isinstance(node, Object) else new
            return root
        node = child
    return _any_value(rng)


def _reorder(rng: random.Random, items: list[Any], keyed: bool) -> None:
    """Members that come, go, trade places, or come twice."""
    at = rng.randrange(len(items)) if items else 0
    match rng.randrange(5):
        case 0 if items:
            del items[at]
        case 1 if items:
            items.append(items[at])
        case 2 if keyed and items:
            items.append((items[at][0], _any_value(rng)))  # the same key twice
        case 3 if keyed and items:
            items[at] = (rng.choice(KEYS + TEXTS), items[at][1])
        case _:
            items.insert(at, (rng.choice(KEYS), _any_value(rng)) if keyed else _any_value(rng))


def _near(rng: random.Random, value: Any) -> Any:
    """Another value of the same kind, close by."""
    match value:
        case bool():
            return not value
        case int():
            return rng.choice(
                (
                    value + 1,
                    value - 1,
                    -value,
                    value * 2,
                    value // 2,
                    float(value) if abs(value) < 2**60 else 1.5,
                )
            )
        case float():
            return rng.choice((-value, value * 2, value / 3, str(value)))
        case str():
            at = rng.randrange(len(value) + 1)
            return value[:at] + rng.choice(TEXTS) + value[at:]
        case None:
            return rng.choice((False, 0, "", "null"))
        case list():
            return value[::-1]
        case _:
            return Object([])


def _any_value(rng: random.Random) -> Any:
    if rng.random() < RARE:
        deep, large = rng.choice((50, 500, 3000, 100_000)), rng.choice((5000, 200_000))
        return rng.choice(
            (
                Raw("[" * deep + "]" * deep),
                Raw('{"a":' * deep + "1" + "}" * deep),
                Raw("9" * large),
                Raw("1" + "0" * 308 + "." + "0" * 100),
                Raw("[" + '"a",' * large + "0]"),
                Raw("[" + ",".join(map(str, range(5000))) + "]"),
            )
        )
    match rng.randrange(5):
        case 0 | 1:
            return rng.choice(NUMBERS)
        case 2:
            return rng.choice(TEXTS)
        case 3:
            return rng.choice((None, True, False, [], Object([]), [[]], [None], {}, [0], ["a"]))
        case _:
            return Object([(rng.choice(KEYS), rng.choice(NUMBERS + TEXTS)) for _ in range(2)])


class Raw(str):
    """Text that is put into the document as it is."""


def _dump(value: Any, escaped: bool) -> str:
    """JSON text of a document, with what a `Raw` holds as it is."""
    match value:
        case Raw():
            return str(value)
        case Object():
            pairs = (
                f"{json.dumps(k, ensure_ascii=escaped)}:{_dump(v, escaped)}" for k, v in value.pairs
            )
            return "{" + ",".join(pairs) + "}"
        case list():
            return "[" + ",".join(_dump(v, escaped) for v in value) + "]"
        case _:
            return json.dumps(value, ensure_ascii=escaped)


def _template(rng: random.Random, data: bytes) -> bytes:
    """Pieces of Jinja put in, taken out, repeated and nested."""
    text = data.decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 4, 30))):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(JINJA)
        if rng.random() < RARE * 2:
            piece *= rng.choice((25, 150, 2000))
        match rng.randrange(4):
            case 0:
                text = text[:at] + text[at + rng.choice((1, 5, 20)) :]
            case _:
                text = text[:at] + piece + text[at:]
    return text.encode("utf-8", "replace")
