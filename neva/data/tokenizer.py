"""Text to token ids and back: SentencePiece, Hugging Face and tiktoken files behind one small interface."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from neva.data.vocabularies import from_gpt2, from_ranks, from_sentencepiece, is_ranks

STARTS = ("<s>", "<|begin_of_text|>", "<bos>")
"""Names of a token that stands before a text, where tokenizer_config.json does not tell."""
ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>")
"""Names of a token that ends a text, where tokenizer_config.json does not tell."""
BESIDE = ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
"""What is read beside a tokenizer: names of special tokens, tokens that were added later, and the chat format."""
PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""GPT-2's two files: the first's name -> the second's."""
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "qwen.tiktoken", *PAIRS)
"""What a folder is searched for, in this order: tokenizer.json also knows the tokens that were added later."""


class Tokenizer(ABC):
    """What the rest needs of a tokenizer. Holds its files' contents, so that it can be saved after they are gone, and pickled."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def __reduce__(self) -> tuple[type, tuple[dict[str, bytes]]]:
        return type(self), (self.files,)

    @abstractmethod
    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Token ids of a text; special tokens spelled in it become their ids, none is added.

        `first` is false for a text that goes on behind a special token or an image: some tokenizers then put no space before it.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens and negative ids (image features) give nothing."""

    def special(self, text: str) -> int | None:
        """The id of a text that is one special token, which `decode` never shows; None if not."""
        ids = self.encode(text, first=False)
        return ids[0] if len(ids) == 1 and not self.decode(ids) else None

    @property
    @abstractmethod
    def bos(self) -> int | None:
        """The id that a text starts with, None if this tokenizer's models want none."""

    @cached_property
    def _config(self) -> dict[str, Any]:
        return json.loads(self.files.get("tokenizer_config.json", b"{}"))

    @property
    def start(self) -> int | None:
        """The id of the start token, also where none is added by itself; None if there is none."""
        return self.bos

    @cached_property
    def chat_template(self) -> str:
        """The tokenizer's own chat format as Jinja; empty if it has none."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        template = self._config.get("chat_template") or json.loads(self.files.get("chat_template.json", b"{}")).get("chat_template") or ""
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t["name"] == "default"), "")
        return template

    @property
    @abstractmethod
    def specials(self) -> tuple[str, ...]:
        """Texts that are one token each wherever they stand."""

    @property
    @abstractmethod
    def eos(self) -> int:
        """The id that ends an answer."""

    @property
    @abstractmethod
    def pad(self) -> int:
        """An id to fill up with; never attended to."""

    @property
    @abstractmethod
    def size(self) -> int:
        """One more than the largest id: the least size of the embedding."""

    def save(self, folder: str | Path) -> None:
        """Writes the files from which `load_tokenizer(folder)` gives this tokenizer back."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


class SentencePieceTokenizer(Tokenizer):
    """A `.model` file (Llama-2, Vicuna, Mistral), read as LLaVA reads it: transformers' LlamaTokenizer with legacy=True.

    That is: the text is split at the special tokens, and each part between is encoded by itself, with SentencePiece's leading space.
    """

    @cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.files["tokenizer.model"])

    @cached_property
    def _special(self) -> dict[str, int]:
        ids = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        return {self._model.id_to_piece(id): id for id in ids if id >= 0}

    @cached_property
    def specials(self) -> tuple[str, ...]:
        return tuple(self._special)

    @cached_property
    def _split(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(re.escape(piece) for piece in self._special) + ")")

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            ids += [self._special[part]] if part in self._special else self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self._special.values())  # an embedding padded to a round size knows ids that the model does not
        return self._model.decode([int(id) for id in ids if 0 <= id < self.size and id not in special])

    @property
    def bos(self) -> int | None:
        return self.start if self._config.get("add_bos_token", True) else None

    @property
    def start(self) -> int | None:
        return self._model.bos_id() if self._model.bos_id() >= 0 else None

    @cached_property
    def eos(self) -> int:
        token = self._config.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        id = self._model.piece_to_id(token) if token else self._model.unk_id()
        return self._model.eos_id() if id == self._model.unk_id() else id

    @property
    def pad(self) -> int:
        return self._model.pad_id() if self._model.pad_id() >= 0 else self._model.unk_id()

    @property
    def size(self) -> int:
        return self._model.get_piece_size()


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`; its start and end tokens are told by the `tokenizer_config.json` beside it, or else by common names."""

    @cached_property
    def _model(self) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
        model.no_truncation()
        model.no_padding()
        return model

    def _named(self, role: str, names: Sequence[str]) -> int | None:
        """Id of the config's token of this role, or of the first of `names` that is in the vocabulary."""
        token = self._config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return self._model.token_to_id(token)
        if role in self._config:  # null: the tokenizer has none
            return None
        return next((id for name in names if (id := self._model.token_to_id(name)) is not None), None)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        if first or not text or not self._spaced:
            return self._model.encode(text, add_special_tokens=False).ids
        return self._model.encode(self._spaced + text, add_special_tokens=False).ids[1:]

    @cached_property
    def specials(self) -> tuple[str, ...]:
        added = json.loads(self.files["tokenizer.json"]).get("added_tokens", ())
        return tuple(token["content"] for token in added)

    @cached_property
    def _spaced(self) -> str:
        """A special token behind which text is tokenised otherwise than at the start (SentencePiece with legacy=false); empty if it is not."""
        end = self._model.id_to_token(self.eos) or ""
        return end if self._model.encode(end + "a", add_special_tokens=False).ids[1:] != self.encode("a") else ""

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(id) for id in ids if id >= 0], skip_special_tokens=True)

    @cached_property
    def bos(self) -> int | None:
        named = self._named("bos_token", STARTS)
        if "add_bos_token" in self._config:
            return named if self._config["add_bos_token"] else None
        if self._model.post_processor is None:
            return named
        # What the file itself puts before a text decides: GPT-2 and Qwen name a start token or none, and put none.
        first = self._model.encode("a").ids[:1]
        return first[0] if first and first != self.encode("a")[:1] else None

    @cached_property
    def start(self) -> int | None:
        return self.bos if self.bos is not None else self._named("bos_token", ())

    @cached_property
    def eos(self) -> int:
        id = self._named("eos_token", ENDS)
        if id is None:
            raise ValueError(f"the tokenizer has no end token (looked for {', '.join(ENDS)}): put tokenizer_config.json with eos_token beside it")
        return id

    @cached_property
    def pad(self) -> int:
        id = self._named("pad_token", ("<pad>", "<unk>"))
        return self.eos if id is None else id

    @cached_property
    def size(self) -> int:
        return max(self._model.get_vocab(with_added_tokens=True).values()) + 1


def _read(file: Path) -> dict[str, bytes]:
    """A tokenizer's file as one of our classes takes it, and what stands beside it."""
    content = file.read_bytes()
    if file.name in PAIRS:
        files = from_gpt2(content, (file.parent / PAIRS[file.name]).read_bytes())
    elif file.suffix == ".json":
        files = {"tokenizer.json": content}
    else:
        files = from_ranks(content) if is_ranks(content) else {"tokenizer.model": content}
    beside = {name: (file.parent / name).read_bytes() for name in BESIDE if (file.parent / name).is_file()}
    if "tokenizer.model" in files and (added := _added(beside)) is not None:
        files = from_sentencepiece(content, **added)
    return {**files, **beside}


def _added(beside: dict[str, bytes]) -> dict[str, Any] | None:
    """What a SentencePiece model's neighbours change about it: tokens added later, and whether text behind one begins with a space.

    None if nothing: then SentencePiece reads the model itself.
    """
    config = json.loads(beside.get("tokenizer_config.json", b"{}"))
    listed = {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
    tokens = {id: (token["content"], bool(token.get("special"))) for id, token in listed.items()}
    tokens = {id: (text, True) for text, id in json.loads(beside.get("added_tokens.json", b"{}")).items()} | tokens
    legacy = config.get("legacy") is not False
    return None if legacy and all(text in ("<unk>", "<s>", "</s>") for text, _ in tokens.values()) else {"added": tokens, "legacy": legacy}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `.model`, `tokenizer.json` or tiktoken file, in GPT-2's pair of files, or in a folder that holds one.

    Raises ValueError if there is none, or it is damaged or lacks an end token.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in FILES if (file / name).is_file()]
        if not found:
            raise ValueError(f"the folder {file} holds no tokenizer: it needs one of {', '.join(FILES)}")
        file = found[0]
    if not file.is_file():
        raise ValueError(f"the tokenizer {file} is missing: give a SentencePiece .model, a tokenizer.json, or a folder that holds one")
    try:
        files = _read(file)
        tokenizer: Tokenizer = JsonTokenizer(files) if "tokenizer.json" in files else SentencePieceTokenizer(files)
        tokenizer.encode("a")
        eos = tokenizer.eos
    except ValueError as error:
        raise ValueError(f"the tokenizer {file} cannot be read: {error}") from None
    except Exception as error:  # both libraries raise bare Exception and RuntimeError on damaged files
        raise ValueError(f"the tokenizer {file} cannot be read ({error}): the file is damaged, or no .model or tokenizer.json") from None
    if eos < 0:
        raise ValueError(f"the tokenizer {file} has no end token: train it with one")
    return tokenizer
