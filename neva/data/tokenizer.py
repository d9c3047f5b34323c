"""Text to token ids and back: SentencePiece, Hugging Face and tiktoken files behind one small interface."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from neva.config import from_json
from neva.data.vocabularies import (
    WITHOUT_PREFIX,
    Added,
    check_growth,
    from_gpt2,
    from_ranks,
    from_sentencepiece,
    gap_in_ids,
    is_ranks,
    read_proto,
)

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


IMAGE_PARTS = "text_behind_image_begins"
"""Key that an export adds to tokenizer_config.json for `Tokenizer.image_parts`: a
tokenizer.json cannot say it."""


class Tokenizer(ABC):
    """What the rest needs of a tokenizer. Holds its files' contents, so that it can be saved after they are gone, and pickled."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def __reduce__(self) -> tuple[type, tuple[dict[str, bytes]]]:
        return type(self), (self.files,)

    @abstractmethod
    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Token ids of a text; special tokens spelled in it become their ids, none is added.

        `first` is false for a text that goes on behind a special token: some tokenizers then put no
        space before it.
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
        text = self.files.get("chat_template.json", b"{}")  # a processor's goes before
        beside = json.loads(text)
        own = beside.get("chat_template") if isinstance(beside, dict) else None
        template: Any = own or self._config.get("chat_template") or ""
        if isinstance(template, list):  # several, by name
            named = [t for t in template if isinstance(t, Mapping) and t.get("name") == "default"]
            template = next((t.get("template", "") for t in named), "")
        if not isinstance(template, str):
            raise ValueError("the tokenizer's chat_template is no text: repair tokenizer_config.json or chat_template.json")
        return template

    @property
    @abstractmethod
    def specials(self) -> tuple[str, ...]:
        """Texts that are one token each wherever they stand."""

    @property
    def image_parts(self) -> bool:
        """Is the text behind an image encoded as if a new text began, as LLaVA does? Else as
        behind a special token."""
        return self._config.get(IMAGE_PARTS) is True

    @property
    @abstractmethod
    def gap(self) -> str:
        """What must stand between a special token and a text for the text to have the ids of a
        first one: a space or nothing."""

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

    @property
    @abstractmethod
    def own_size(self) -> int:
        """`size` without the tokens that were added later."""

    @abstractmethod
    def spell(self, id: int) -> str:
        """A token as the vocabulary has it, also a special one; its number where it has none."""

    def save(self, folder: str | Path) -> None:
        """Writes the files from which `load_tokenizer(folder)` gives this tokenizer back."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


class SentencePieceTokenizer(Tokenizer):
    """A `.model` file (Llama-2, Vicuna, Mistral), read by SentencePiece as LLaVA does through
    transformers' slow LlamaTokenizer.

    A text is split at its special and added tokens, and SentencePiece encodes each part between by
    itself. With the file's own setting add_dummy_prefix it puts a space before a part: before every
    one where the folder does not say `legacy: false` ("</s>USER" has the ids of "</s>" and
    " USER"), else before the first alone.
    """

    @property
    def image_parts(self) -> bool:
        return True

    @property
    def model_proto(self) -> bytes:
        """The SentencePiece file, without its space before a text where the folder says so."""
        own = self._config.get("add_prefix_space") is not False
        return self.files["tokenizer.model"] + (b"" if own else WITHOUT_PREFIX)

    @cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model_proto)

    @cached_property
    def _inner(self) -> sentencepiece.SentencePieceProcessor:
        """Encodes a part behind a special token."""
        if self._legacy:
            return self._model
        return sentencepiece.SentencePieceProcessor(model_proto=self.model_proto + WITHOUT_PREFIX)

    @property
    def _legacy(self) -> bool:
        return self._config.get("legacy") is not False

    @property
    def says_legacy(self) -> bool:
        """Does the folder say how text behind a special token is read? Where not, it
        is as in LLaVA's time."""
        return isinstance(self._config.get("legacy"), bool)

    @cached_property
    def _prefix(self) -> bool:
        """Does a text begin with a space?"""
        return read_proto(self.model_proto).prefix

    @cached_property
    def _added(self) -> dict[int, Added]:
        size = self._model.get_piece_size()
        added = _added(self.files)
        beyond = [id for id in added if id >= size]
        for place, id in enumerate(beyond):
            if id != size + place:
                raise ValueError(gap_in_ids(added[id].text, id, size))
        return added

    @cached_property
    def _hidden(self) -> set[int]:
        """Ids that decoded text leaves out."""
        shown = {id for id, token in self._added.items() if not token.special}
        return set(self._special.values()) - shown

    @cached_property
    def _special(self) -> dict[str, int]:
        """What a text is split at, by text: the model's special tokens and
        those that were added."""
        size = self._model.get_piece_size()
        own = [id for id in range(size) if self._model.is_control(id) or id == self._model.unk_id()]
        added = {token.text: id for id, token in self._added.items()}
        return {self._model.id_to_piece(id): id for id in own} | added

    @cached_property
    def specials(self) -> tuple[str, ...]:
        return tuple(self._special)

    @cached_property
    def _split(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        parts = self._split.split(text)
        for at in range(1, len(parts), 2):
            token = self._added.get(self._special[parts[at]])
            if token is not None and token.lstrip:
                parts[at - 1] = parts[at - 1].rstrip()
            if token is not None and token.rstrip:
                parts[at + 1] = parts[at + 1].lstrip()
        ids: list[int] = []
        for at, part in enumerate(parts):
            if at % 2:
                ids.append(self._special[part])
            else:
                model = self._model if at == 0 and first else self._inner
                ids += model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        size = self._model.get_piece_size()
        text = ""
        run: list[int] = []
        for id in (int(id) for id in ids if int(id) not in self._hidden):
            if id in self._added:
                text += self._spelled(run, text) + self._added[id].text
                run = []
            elif 0 <= id < size:
                run.append(id)
        return text + self._spelled(run, text)

    def _spelled(self, run: list[int], before: str) -> str:
        """A part's text, without the space that encoding it would put before it."""
        return (self._inner if before else self._model).decode(run)

    def _named(self, role: str, own: int) -> int:
        """Id of the config's token of this role, else the model's own; -1 if there is none."""
        token = self._config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            return own
        id = self._special.get(token, self._model.piece_to_id(token))
        return own if id == self._model.unk_id() and token != self._model.id_to_piece(id) else id

    @property
    def gap(self) -> str:
        return "" if self._legacy or not self._prefix else " "

    @property
    def bos(self) -> int | None:
        return self.start if self._config.get("add_bos_token", True) else None

    @cached_property
    def start(self) -> int | None:
        id = self._named("bos_token", self._model.bos_id())
        return id if id >= 0 else None

    @cached_property
    def eos(self) -> int:
        return self._named("eos_token", self._model.eos_id())

    @cached_property
    def pad(self) -> int:
        id = self._named("pad_token", self._model.pad_id())
        return id if id >= 0 else self._model.unk_id()

    @cached_property
    def size(self) -> int:
        return max([self.own_size, *(id + 1 for id in self._added)])

    @property
    def own_size(self) -> int:
        return self._model.get_piece_size()

    def spell(self, id: int) -> str:
        if id in self._added:
            return self._added[id].text
        return self._model.id_to_piece(id) if id < self.own_size else str(id)

    def as_json(self) -> dict[str, bytes]:
        """The same tokenizer as a `tokenizer.json` and its config. ValueError for a model
        that has no such form."""
        spelled = {id: text for text, id in self._special.items()}
        return from_sentencepiece(
            self.files["tokenizer.model"],
            added=self._added,
            legacy=self._legacy,
            prefix=self._prefix,
            end=spelled.get(self.eos) or self._model.id_to_piece(self.eos),
            start=None if self.bos is None else spelled[self.bos],
        )


@contextmanager
def _no_panic(doing: str) -> Iterator[None]:
    """ValueError for what the Rust library raises on a damaged or hostile file: bare Exceptions,
    and panics, which are no Exceptions, of a pattern that takes too long."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException" and type(error) is not Exception:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the tokenizer cannot {doing} ({reason}): use the model's own tokenizer.json") from None


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`; its start and end tokens are told by the `tokenizer_config.json` beside it, or else by common names."""

    @cached_property
    def _model(self) -> tokenizers.Tokenizer:
        text = self.files["tokenizer.json"].decode()
        check_growth(from_json(text))
        with _no_panic("be made of its file"):
            model = tokenizers.Tokenizer.from_str(text)
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
            return self._ids(text)
        return self._ids(self._spaced + text)[1:]

    def _ids(self, text: str, *, added: bool = False) -> list[int]:
        """Ids of a text, with `added` those too that the file puts around it."""
        with _no_panic("split a text"):
            return self._model.encode(text, add_special_tokens=added).ids

    @cached_property
    def specials(self) -> tuple[str, ...]:
        added = json.loads(self.files["tokenizer.json"]).get("added_tokens", ())
        return tuple(token["content"] for token in added)

    @cached_property
    def _spaced(self) -> str:
        """A special token behind which text is tokenised otherwise than at the start (SentencePiece with legacy=false); empty if it is not."""
        end = self._model.id_to_token(self.eos) or ""
        return end if self._ids(end + "a")[1:] != self.encode("a") else ""

    @cached_property
    def gap(self) -> str:
        if not self._spaced:
            return ""
        return " " if self.encode("a", first=True) == self.encode(" a", first=False) else ""

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(id) for id in ids if id >= 0]
        with _no_panic("put tokens together to a text"):
            return self._model.decode(known, skip_special_tokens=True)

    @cached_property
    def bos(self) -> int | None:
        named = self._named("bos_token", STARTS)
        if "add_bos_token" in self._config:
            return named if self._config["add_bos_token"] else None
        if self._model.post_processor is None:
            return named
        # What the file itself puts before a text decides: GPT-2 and Qwen name a start token or none, and put none.
        first = self._ids("a", added=True)[:1]
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

    @cached_property
    def own_size(self) -> int:
        return max(self._model.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    def spell(self, id: int) -> str:
        return self._model.id_to_token(id) or str(id)


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
    if shown := _of_processor(file.parent / "processor_config.json"):
        beside["chat_template.jinja"] = shown.encode()
    return {**files, **beside}


def _of_processor(file: Path) -> str:
    """The chat template in a processor's settings, which goes before others;
    empty if there is none."""
    if not file.is_file():
        return ""
    settings = json.loads(file.read_bytes())
    template = settings.get("chat_template") if isinstance(settings, dict) else ""
    return template if isinstance(template, str) else ""


def _added(files: Mapping[str, bytes]) -> dict[int, Added]:
    """The tokens that a SentencePiece model's neighbours add, by id; also names that they give
    to pieces of the model."""
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    listed = json.loads(files.get("added_tokens.json", b"{}"))
    added = {id: Added(text=text) for text, id in listed.items()}
    for id, token in config.get("added_tokens_decoder", {}).items():
        added[int(id)] = Added(
            text=token["content"],
            special=bool(token.get("special")),
            lstrip=bool(token.get("lstrip")),
            rstrip=bool(token.get("rstrip")),
        )
    return dict(sorted(added.items()))


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
