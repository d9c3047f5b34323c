"""Vocabularies in other formats -> a `tokenizer.json`: tiktoken's ranks (Meta's Llama-3, Qwen), GPT-2's two files, SentencePiece.

The results give the ids of the originals; a test compares them with llama.cpp's expected ids.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

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


MOST_GROWTH = 64
"""How many times as long the replacements of a tokenizer.json may make a text. A
space becomes three bytes."""


def check_growth(file: Any) -> None:
    """ValueError for a tokenizer.json whose replacements, one behind the other, would fill
    the memory with a text."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        waiting = [file.get(part)] if isinstance(file, dict) else []
        while waiting:
            step = waiting.pop()
            if isinstance(step, list):
                waiting += step
            elif isinstance(step, dict):
                waiting += [step.get(key) for key in ("normalizers", "pretokenizers", "decoders")]
                growth *= _grows(step) if step.get("type") == "Replace" else 1
        if growth > MOST_GROWTH:
            raise ValueError(
                f"the replacements of its {part} make a text over {MOST_GROWTH} times as long",
            )


def _grows(step: Mapping[str, Any]) -> float:
    """How many times as long a replacement makes a text; a pattern may stand for a
    single byte, or for none."""
    pattern = step.get("pattern")
    found = pattern.get("String") if isinstance(pattern, Mapping) else None
    short = len(found.encode()) if isinstance(found, str) else 1
    return max(1.0, len(str(step.get("content", "")).encode()) / max(1, short) + (short == 0))


@dataclass(frozen=True, kw_only=True)
class Added:
    """A token that was added to a vocabulary later."""

    text: str
    special: bool = True
    """Left out of decoded text."""
    lstrip: bool = False
    """It takes the white space before it."""
    rstrip: bool = False
    """It takes the white space behind it."""


@dataclass(frozen=True, kw_only=True)
class Proto:
    """What a SentencePiece file says and its library does not."""

    user_defined: frozenset[int]
    """Ids of pieces that are found in a text before anything else."""
    prefix: bool
    """Does it put a space before every text (add_dummy_prefix)?"""
    bpe: bool
    """Is it byte-pair encoding, and no unigram model?"""


def read_proto(content: bytes) -> Proto:
    """A SentencePiece file's own settings: a protobuf message, ModelProto in
    sentencepiece_model.proto."""
    user_defined = set()
    prefix = True
    bpe = False
    number = 0
    for field, value in _fields(content):
        # a piece; its field 3 is its kind, and 4 is USER_DEFINED
        if field == 1 and isinstance(value, bytes):
            if dict(_fields(value)).get(3) == 4:
                user_defined.add(number)
            number += 1
        elif field == 2 and isinstance(value, bytes):
            # how it was trained; 3 is the kind of model, and 2 is BPE
            bpe = dict(_fields(value)).get(3, 1) == 2
        elif field == 3 and isinstance(value, bytes):  # how texts are normalised
            prefix = bool(dict(_fields(value)).get(3, prefix))
    return Proto(user_defined=frozenset(user_defined), prefix=prefix, bpe=bpe)


WITHOUT_PREFIX = b"\x1a\x02\x18\x00"
"""Appended to a SentencePiece file it sets add_dummy_prefix=false: a later field 3 of a protobuf
message is merged into the first."""


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: their numbers and values, whole numbers as int
    and all others as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = 8 if kind == 1 else 4
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, lowest first, and where the next field begins."""
    value = 0
    shift = 0
    while message[at] & 128:
        value |= (message[at] & 127) << shift
        shift += 7
        at += 1
    return value | message[at] << shift, at + 1


PROBE = "The  quick\tfox,   naïve ﬁne Ⅻ 日本 🙂 1234567\n\n jumped"
"""A text on which kinds of segmentation and normalisation differ."""


def from_sentencepiece(
    content: bytes,
    *,
    added: Mapping[int, Added] | None = None,
    legacy: bool = True,
    prefix: bool = True,
    end: str = "",
    start: str | None = None,
) -> dict[str, bytes]:
    """Files of a tokenizer from a SentencePiece BPE model, read as LLaVA and transformers'
    slow LlamaTokenizer read it.

    `added`: tokens by id. `prefix`: a text begins with a space, with `legacy` also behind a special
    token (and, which SentencePiece does not, behind a user-defined piece). `end` ends an answer,
    the model's own if empty; `start` is put before every text.
    ValueError for a model that is not BPE with byte fallback, whose segmentation is another, and for added ids with gaps.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    proto = read_proto(content)
    size = model.get_piece_size()
    if not proto.bpe or not any(model.is_byte(id) for id in range(size)):
        kind = "has no byte fallback" if proto.bpe else "is no BPE but a unigram model"
        only = "only Llama's kind (BPE with bytes) can be written as tokenizer.json"
        raise ValueError(f"the SentencePiece model {kind}; {only}")
    pieces = {id: model.id_to_piece(id) for id in range(size)}
    pieces |= {id: token.text for id, token in (added or {}).items() if id < size}
    vocabulary = {piece: id for id, piece in pieces.items()}
    unknown = pieces[model.unk_id()]
    merges = _merges(vocabulary, model)
    built = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    )
    spaces = [normalizers.Prepend("▁")] if prefix and legacy else []
    if prefix and not legacy:
        built.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁",
            prepend_scheme="first",
            split=False,
        )
    else:
        built.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip],
    )
    whole = model
    if not prefix:
        whole = sentencepiece.SentencePieceProcessor(model_proto=content + WITHOUT_PREFIX)
    if built.encode(PROBE).ids != whole.encode(PROBE):
        does = "splits or normalises text as no tokenizer.json of Llama's kind does (NFKC)"
        raise ValueError(f"the SentencePiece model {does}")
    special = [id for id in range(size) if model.is_control(id) or id == model.unk_id()]
    built.add_special_tokens(
        [AddedToken(pieces[id], normalized=False, special=True) for id in special],
    )
    defined = [pieces[id] for id in sorted(proto.user_defined)]
    built.add_tokens([AddedToken(text, normalized=False, special=False) for text in defined])
    for id, token in sorted((added or {}).items()):
        strips = {"lstrip": token.lstrip, "rstrip": token.rstrip}
        built.add_tokens(
            [AddedToken(token.text, normalized=False, special=token.special, **strips)],
        )
        if built.token_to_id(token.text) != id:
            raise ValueError(gap_in_ids(token.text, id, size))
    return _files(built, end or pieces[model.eos_id()], start, {"unk_token": unknown})


def gap_in_ids(text: str, id: int, size: int) -> str:
    """What to say of an added token whose id is not the next one."""
    gap = f"leaves a gap behind the model's {size} tokens"
    return f"the added token {text!r} has id {id}, which {gap}; use its tokenizer.json"


def _merges(
    vocabulary: Mapping[str, int],
    model: sentencepiece.SentencePieceProcessor,
) -> list[tuple[str, str]]:
    """Pairs of pieces that make another piece, in the order in which SentencePiece joins them: by
    the score of what they make."""
    scored = []
    for piece, id in vocabulary.items():
        if model.is_control(id) or model.is_byte(id) or model.is_unknown(id):
            continue
        for at in range(1, len(piece)):
            left = piece[:at]
            right = piece[at:]
            if left in vocabulary and right in vocabulary:
                scored.append(
                    (-model.get_score(id), vocabulary[left], vocabulary[right], left, right),
                )
    return [(left, right) for *_, left, right in sorted(scored)]


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
