"""Vocabularies in other formats -> a `tokenizer.json`: tiktoken's ranks (Meta's Llama-3, Qwen), GPT-2's two files, SentencePiece.

The results give the ids of the originals; a test compares them with llama.cpp's expected ids.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)), "<|start_header_id|>",
    "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)  # fmt: skip
RANKS: dict[int, tuple[str, Sequence[str], str, str | None]] = {
    128000: (_SPLIT.replace("NUMBER", r"\p{N}{1,3}"), _LLAMA3, "<|end_of_text|>", "<|begin_of_text|>"),
    151643: (_SPLIT.replace("NUMBER", r"\p{N}"), ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", None),
}
"""Tokens of a file of ranks, which does not say more -> its split pattern, special tokens, end and start token. Llama-3's, and Qwen's."""


def is_ranks(content: bytes) -> bool:
    """Is a file of unknown kind one of tiktoken's, `base64 rank` on each line?"""
    parts = content[:200].split(b"\n", 1)[0].split()
    return len(parts) == 2 and parts[1].isdigit()


def from_ranks(content: bytes) -> dict[str, bytes]:
    """Files of a tokenizer from tiktoken's ranks. ValueError for a number of tokens that is none of the known models'."""
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in content.splitlines() if line.strip()}
    if len(ranks) not in RANKS:
        known = ", ".join(map(str, RANKS))
        raise ValueError(f"a file of {len(ranks)} ranks does not say how it splits text (known are {known}); use the model's tokenizer.json")
    pattern, specials, end, start = RANKS[len(ranks)]
    merges = sorted((rank, pair) for token, rank in ranks.items() if len(token) > 1 and (pair := _halves(token, ranks)) is not None)
    vocabulary = {_visible(token): rank for token, rank in ranks.items()}
    model = Tokenizer(models.BPE(vocabulary, [(_visible(a), _visible(b)) for _, (a, b) in merges], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _byte_level(model, specials, end, start)


def from_gpt2(vocabulary: bytes, merges: bytes) -> dict[str, bytes]:
    """Files of a tokenizer from `vocab.json` and `merges.txt`, as GPT-2 has them."""
    lines = [line for line in merges.decode().split("\n") if line and not line.startswith("#version")]
    model = Tokenizer(models.BPE(json.loads(vocabulary), [(a, b) for a, b in (line.split(" ") for line in lines)]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _byte_level(model, ("<|endoftext|>",), "<|endoftext|>", None)


def from_sentencepiece(content: bytes, *, added: Mapping[int, tuple[str, bool]] | None = None, legacy: bool = True) -> dict[str, bytes]:
    """Files of a tokenizer from a SentencePiece BPE model, as transformers' LlamaTokenizer reads it.

    `added` tokens are id -> (text, is it special?); without `legacy` a text behind one of them begins without a space.
    ValueError for a model that is not BPE with byte fallback, whose segmentation is another, and for added ids with gaps.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    size = model.get_piece_size()
    if not any(model.is_byte(id) for id in range(size)):
        raise ValueError("the SentencePiece model has no byte fallback; only Llama's kind (BPE with bytes) can be written as tokenizer.json")
    vocabulary = {model.id_to_piece(id): id for id in range(size)}
    scored = []
    for piece, id in vocabulary.items():
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in vocabulary and piece[at:] in vocabulary]
        scored += [(-model.get_score(id), vocabulary[a], vocabulary[b], a, b) for a, b in pairs]
    merges = [(a, b) for *_, a, b in sorted(scored)]
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token=model.id_to_piece(model.unk_id()), fuse_unk=True, byte_fallback=True))
    if legacy:
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        built.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    names = {role: model.id_to_piece(id) for role, id in (("unk", model.unk_id()), ("bos", model.bos_id()), ("eos", model.eos_id())) if id >= 0}
    built.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names.values()])
    for id, (text, special) in sorted((added or {}).items()):
        built.add_tokens([AddedToken(text, normalized=False, special=special)])
        if built.token_to_id(text) != id:
            raise ValueError(f"the added token {text!r} has id {id}, which leaves a gap behind the model's {size} tokens; use its tokenizer.json")
    return _files(built, names["eos"], names.get("bos"), {"unk_token": names["unk"]})


def _byte_level(model: Tokenizer, specials: Sequence[str], end: str, start: str | None) -> dict[str, bytes]:
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return _files(model, end, start, {})


def _files(model: Tokenizer, end: str, start: str | None, more: dict[str, str]) -> dict[str, bytes]:
    if start is not None:
        model.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, model.token_to_id(start))])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": start, "clean_up_tokenization_spaces": False, **more}
    return {"tokenizer.json": model.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that were merged to this one: what byte-pair encoding by lower ranks makes of its bytes."""
    parts = [bytes([byte]) for byte in token]
    limit = ranks[token]
    while len(parts) > 2:
        found = [(rank, at) for at, (a, b) in enumerate(pairwise(parts)) if (rank := ranks.get(a + b, limit)) < limit]
        if not found:
            return None
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _visible(token: bytes) -> str:
    """GPT-2's way to write bytes as letters."""
    return "".join(_letters()[byte] for byte in token)


@cache
def _letters() -> dict[int, str]:
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(others)}
