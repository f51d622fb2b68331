"""Small tokenizers of every kind of decoder, for tests that must hold for whichever a host has."""

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

# Bytes of a letter, a space, a line's end, an emoji's four, and such as are no UTF-8 at all.
BYTES = [0x61, 0x20, 0x0A, *"😀é".encode(), 0xFF, 0xC0, 0xE2, 0x82, 0xED, 0xA0]


def byte_level(prefix_space: bool = False) -> FastTokenizer:
    """All bytes, and tokens that end or begin within a character, as GPT-2's do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ģ", "a"), ("a", "ð")]
    vocab = {"<eos>": 0} | {letter: 1 + i for i, letter in enumerate(letters)}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return _with_added(fast)


def byte_fallback(*steps: decoders.Decoder) -> FastTokenizer:
    """SentencePiece's BPE with a piece a byte, as Llama 2 has it."""
    pieces = ["▁", "a", "b", "▁a", "▁▁", "é", "2", "+", "=", "4", "▁2", "▁4"]
    vocab = {"<eos>": 0, "<unk>": 1} | {f"<0x{b:02X}>": 2 + b for b in range(256)}
    vocab |= {piece: 258 + i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "▁"), ("▁", "2"), ("▁", "4")]
    fast = FastTokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(list(steps))
    return _with_added(fast)


def metaspace(scheme: str, *before: decoders.Decoder) -> FastTokenizer:
    """SentencePiece's unigrams, as T5 has them."""
    pieces = ["▁", "a", "b", "▁a", "▁a▁", "▁▁", "2", "+", "=", "4", "▁4", "<0x61>", "<0xE2>"]
    vocab = [("<eos>", 0.0), ("<unk>", -9.0), *((piece, -2.0) for piece in pieces)]
    fast = FastTokenizer(models.Unigram(vocab, unk_id=1))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    last = decoders.Metaspace(prepend_scheme=scheme)
    fast.decoder = decoders.Sequence([*before, last]) if before else last
    return _with_added(fast)


def words(decoder: decoders.Decoder | None) -> FastTokenizer:
    """Whole words and parts of words."""
    pieces = ["a", "##b", "b", ".", ",", "n't", "'s", "▁", "aa", "##", "b</w>", "|", "<pad>"]
    pieces += ["2", "=", "4", " a ", "  "]
    vocab = {"<eos>": 0, "<unk>": 1} | {piece: 2 + i for i, piece in enumerate(pieces)}
    fast = FastTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoder
    return _with_added(fast)


def _with_added(fast: FastTokenizer) -> FastTokenizer:
    fast.add_special_tokens(["<eos>", "<|end|>"])
    fast.add_tokens([AddedToken("<tool>", normalized=False)])
    return fast


REPLACE = decoders.Replace("▁", " ")
BYTE, FUSE = decoders.ByteFallback(), decoders.Fuse()
EAGER = {  # what they say is certain at once, but for characters begun and runs of bytes
    "byte level": byte_level,
    "byte level, prefix space": lambda: byte_level(prefix_space=True),
    "llama 2": lambda: byte_fallback(REPLACE, BYTE, FUSE, decoders.Strip(" ", 1, 0)),
    "gemma": lambda: byte_fallback(REPLACE, BYTE, FUSE),
    "strip three": lambda: byte_fallback(REPLACE, BYTE, FUSE, decoders.Strip(" ", 3, 0)),
    "strip each": lambda: byte_fallback(REPLACE, BYTE, decoders.Strip(" ", 1, 0), FUSE),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "bytes, then metaspace": lambda: metaspace("always", decoders.ByteFallback()),
    "word piece": lambda: words(decoders.WordPiece()),
    "word piece as it is": lambda: words(decoders.WordPiece(cleanup=False)),
    "no decoder": lambda: words(None),
    "replace by pattern": lambda: words(decoders.Replace(Regex("a+|^"), "<>")),
    "fuse": lambda: words(decoders.Fuse()),
}
LATE = {  # what they say depends on what follows, without a bound
    "strip the end": lambda: byte_fallback(REPLACE, BYTE, FUSE, decoders.Strip("a", 0, 1)),
    "replace after fuse": lambda: byte_fallback(BYTE, FUSE, decoders.Replace("▁a", "!")),
    "suffix": lambda: words(decoders.BPEDecoder()),
    "ctc": lambda: words(decoders.CTC()),
}
ALL = EAGER | LATE
