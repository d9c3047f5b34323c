"""Data sets: a name, a length and samples by number. Reading one decodes no image."""

import difflib
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from neva.config import from_json
from neva.data.sample import MARKER, Sample, SampleError, Turn

ROLES: dict[str, Literal["system", "user", "assistant"]] = {"human": "user", "gpt": "assistant", "system": "system"}
"""LLaVA's names of the two sides, and ours."""
ROW_KEYS = ("id", "image", "conversations", "kind")
TURN_KEYS = ("from", "value")
MEANT: dict[str, str] = {
    "images": "did you mean 'image'? It takes a path or a list of paths",
    "system": "write it as a first turn, {from: system, value: …}",
    "mask": "the human and system turns carry no loss, and every gpt turn does",
    "turn.weight": "every gpt turn carries loss",
    "turn.loss": "every gpt turn carries loss",
    "video": "videos are not read: leave these samples out",
    "videos": "videos are not read: leave these samples out",
}
"""Keys that mean something elsewhere, those of turns behind `turn.`, and what to do."""
FORMAT = "expected the LLaVA format, [{id, image, conversations: [{from, value}]}]"


@runtime_checkable
class Source(Protocol):
    """What the loader reads. Must be picklable: each worker process gets a copy."""

    @property
    def name(self) -> str:
        """What errors and reports call it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`. Raises SampleError if it is not usable."""
        ...


@runtime_checkable
class DataSet(Source, Protocol):
    """A source that can be trained on."""

    @property
    def fingerprint(self) -> str:
        """Differs from that of other samples, so that a run does not go on with them. Turns and
        the names of images count, what the images show does not."""
        ...


class LlavaSource:
    """LLaVA's format: a list, or lines, of {id, image, conversations: [{from, value}]}.

    `from` is human, gpt or system. `image` (a path or a list of paths) is relative to
    `image_folder` and never read from outside it, but through links if `links` allows it, as those
    of a Hub cache; it may be absent. `id` is the row number if absent, and an optional `kind` names
    what the loss is reported under; other keys are `Sample.unread`. Whether a file holds a list or
    lines is seen from its content, not from its name. Only where each row stands in the file is
    kept in memory, so that a copy in each worker is small.

    With `questions` a conversation may end with a question, or with an empty answer, which is left
    out: what is asked needs no answer.

    Raises ValueError for a file or folder that is missing, empty, or not in this format;
    SampleError for a bad row, when it is read. A row that is not JSON costs no other row.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path = "",
        name: str = "",
        *,
        questions: bool = False,
        links: bool = False,
    ) -> None:
        self.path = Path(path)
        self.links = links
        self.name = name or self.path.stem
        self._questions = questions
        self.folder = Path(image_folder).resolve() if str(image_folder) else None
        if not self.path.is_file():
            raise ValueError(f"the data file {self.path} is missing: check the source's path")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"the image folder {self.folder} is missing: check the source's image_folder")
        data = self.path.read_bytes()
        self.fingerprint = hashed(data)
        self._lines = _holds_lines(data, self.path)
        self._rows = _line_rows(data) if self._lines else _list_rows(data, self.path)
        if not len(self._rows):
            raise ValueError(f"the data file {self.path} holds no sample: {FORMAT}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index} in '{self.name}', which has {len(self)}")
        row = self._read(index)
        given = row.get("id")
        id = str(index) if given is None or isinstance(given, list | dict) else str(given)
        try:
            turns = _turns(row.get("conversations"), questions=self._questions)
            names = _image_names(row.get("image"))
            _check_markers(turns, len(names))
            kind = row.get("kind", "")
            if not isinstance(kind, str):
                raise ValueError(f"'kind' is {reprlib.repr(kind)}: write a text")
            images = tuple(self._image(name) for name in names)
        except ValueError as error:
            hints = "".join(f"; {unread(key)}" for key in _unread(row))
            raise SampleError(self.name, id, f"{error}{hints}") from None
        return Sample(
            source=self.name,
            id=id,
            kind=kind,
            turns=turns,
            images=images,
            unread=_unread(row),
        )

    def _read(self, index: int) -> dict[str, Any]:
        start, end, line = (int(x) for x in self._rows[index])
        place = f"{self.path}:{line}" if self._lines else f"{self.path}, row {index}"
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        try:
            row = from_json(data)
        except ValueError as error:  # includes text that is not UTF-8
            raise SampleError(self.name, str(index), f"{place} is not JSON ({error}): repair or remove it") from None
        if not isinstance(row, dict):
            raise SampleError(self.name, str(index), f"{place} holds a {type(row).__name__}, not an object: {FORMAT}")
        return row

    def _image(self, name: str) -> Path:
        if self.folder is None:
            raise ValueError(f"it has the image '{name}' but the source has no image_folder: set it")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"the image path '{name}' is absolute or holds '..': write it relative to image_folder")
        try:
            path = (self.folder / name).resolve()
        except RuntimeError:  # before Python 3.13
            raise ValueError(f"the image path '{name}' is a link that leads to itself: put the image itself inside") from None
        if not self.links and not path.is_relative_to(self.folder):
            leads = f"the image path '{name}' leads outside the image folder {self.folder}"
            raise ValueError(
                f"{leads}: put the image itself inside, or allow such links with data.links=true",
            )
        return path


@dataclass(frozen=True)
class MockSource:
    """Made-up samples, each a function of (seed, index): words in a question with its images, and in an answer."""

    samples: int
    words: tuple[int, int] = (20, 200)
    """Fewest and most words in a sample; half of them are the question's."""
    images: int = 1
    image_size: tuple[int, int] = (64, 48)
    """Width and height in pixels."""
    text_only_every: int = 0
    """Every n-th sample has no image; 0 gives all samples their images."""
    seed: int = 0
    name: str = "mock"

    def __post_init__(self) -> None:
        low, high = self.words
        if self.samples < 1 or not 2 <= low <= high or self.images < 0 or min(self.image_size) < 1:
            raise ValueError(f"{self} cannot be made: samples >= 1, 2 <= words[0] <= words[1], images >= 0 and sides >= 1 are needed")

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.samples:
            raise IndexError(f"no sample {index} in '{self.name}', which has {self.samples}")
        random = np.random.default_rng([self.seed, index])
        count = int(random.integers(self.words[0], self.words[1] + 1))
        words = [WORDS[i] for i in random.integers(0, len(WORDS), count)]
        text_only = self.text_only_every > 0 and index % self.text_only_every == self.text_only_every - 1
        images = tuple(self._image(random) for _ in range(0 if text_only else self.images))
        question = f"{MARKER}\n" * len(images) + " ".join(words[: count // 2])
        turns = (Turn(role="user", text=question), Turn(role="assistant", text=" ".join(words[count // 2 :])))
        return Sample(source=self.name, id=str(index), turns=turns, images=images)

    @property
    def fingerprint(self) -> str:
        """What the samples are a function of."""
        return repr(self)

    def _image(self, random: np.random.Generator) -> Image.Image:
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize(self.image_size, Image.Resampling.NEAREST)


WORDS = ("a", "the", "red", "blue", "green", "small", "large", "round", "star", "tree", "house", "river", "dog", "sees", "holds", "under", "near")


def unread(key: str) -> str:
    """A clause on a key of `Sample.unread`."""
    of_turns = key.startswith("turn.")
    name = key.removeprefix("turn.")
    known = TURN_KEYS if of_turns else ROW_KEYS
    close = difflib.get_close_matches(name, known, n=1)
    hint = MEANT.get(key, f"did you mean '{close[0]}'?" if close else "")
    where = "of its turns " if of_turns else ""
    what = f"its key {name!r} {where}is not read"
    return f"{what}: {hint}" if hint else what


def _unread(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a row and, behind `turn.`, of its turns that are not read and hold something."""
    found = [key for key, value in row.items() if key not in ROW_KEYS and _says(value)]
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            more = (key for key, value in turn.items() if key not in TURN_KEYS and _says(value))
            found += [f"turn.{key}" for key in more]
    return tuple(key[:KEY_LENGTH] for key in dict.fromkeys(found))[:MOST_KEYS]


def _says(value: object) -> bool:
    return value is not None and value not in ("", [], {})


MOST_KEYS = 8
"""Keys of a row that are told; a stranger's file may hold any number."""
KEY_LENGTH = 60


def hashed(content: bytes) -> str:
    """A checksum to compare contents by."""
    return f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"


OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a Parquet file", "write its rows as lines of JSON"),
    (b"ARROW1", "an Arrow file", "write its rows as lines of JSON"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it"),
    (b"BZh", "compressed by bzip2", "unpack it"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"SQLite format 3", "an SQLite database", "write its rows as lines of JSON"),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save it as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file: git lfs pull"),
)
"""How files begin that are not JSON, what they are, and what to do."""


def _holds_lines(data: bytes, path: Path) -> bool:
    """Does a data file hold an object per line, not one list? By its content: names mislead.

    Raises ValueError for another kind of file.
    """
    for start, what, fix in OTHERS:
        if data.startswith(start):
            raise ValueError(f"the data file {path} is {what}: {fix}. neva {FORMAT}")
    if data[257:262] == b"ustar":
        raise ValueError(f"the data file {path} is a tar archive: unpack it. neva {FORMAT}")
    text = data.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    if text.startswith(b"["):
        return False
    if not text.startswith(b"{"):
        return path.suffix.lower() != ".json"  # not JSON: the error of that kind of file
    if path.suffix.lower() != ".json":
        return True
    first, _, rest = text.partition(b"\n")
    return bool(rest.strip()) and _is_json(first)


def _is_json(text: bytes) -> bool:
    try:
        from_json(text)
    except ValueError:
        return False
    return True


def _line_rows(data: bytes) -> np.ndarray:
    """[rows, 3]: start, end and line number of each line of a .jsonl file that is not blank."""
    rows, start = [], 3 if data.startswith(b"\xef\xbb\xbf") else 0
    for number, line in enumerate(data[start:].splitlines(keepends=True), 1):
        if line.strip():
            rows.append((start, start + len(line), number))
        start += len(line)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _list_rows(data: bytes, path: Path) -> np.ndarray:
    """[rows, 3]: start and end of each element of a JSON list, and 0."""
    if not data.strip():
        raise ValueError(f"the data file {path} is empty: {FORMAT}")
    fault: UnicodeDecodeError | None = None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = error
        text = data.decode("utf-8", "surrogateescape")  # an error of its row, when that is read
    decoder, rows = json.JSONDecoder(), []
    position = _after_space(text, 1 if text.startswith("\ufeff") else 0)
    if text[position : position + 1] != "[":
        if fault is not None:
            raise ValueError(f"the data file {path} is not UTF-8 ({fault}): save it as UTF-8")
        wanted = f"{FORMAT}, or one such object per line"
        raise ValueError(f"the data file {path} is not a list: {wanted}")
    ascii = text.isascii()  # then characters are bytes
    byte, seen = position, position
    if not ascii:
        byte = len(_bytes(text[:position]))
    try:
        position = _after_space(text, position + 1)
        while text[position : position + 1] != "]" or rows:  # at the top, a "]" behind rows means a comma before it: an error
            end = _end(decoder, text, position)
            byte += (position - seen) if ascii else len(_bytes(text[seen:position]))
            size = (end - position) if ascii else len(_bytes(text[position:end]))
            rows.append((byte, byte + size, 0))
            byte, seen = byte + size, end
            position = _after_space(text, end)
            if text[position : position + 1] == "]":
                break
            position = _after_space(text, position + 1)  # behind the comma
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, position + 1)
    except json.JSONDecodeError as error:
        raise ValueError(f"the data file {path} is not JSON ({error}): repair it") from None
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _end(decoder: json.JSONDecoder, text: str, start: int) -> int:
    """The place behind the value that begins at `start`.

    Of one that is not JSON, or nests too deep, it is where its brackets close or, if that comes
    first, where the next row begins: it is an error of that row, which is found when it is read.
    JSONDecodeError where neither can be told.
    """
    try:
        end = decoder.raw_decode(text, start)[1]
        if _ends_a_row(text, end):
            return end
        fault = json.JSONDecodeError("Expecting ',' delimiter", text, _after_space(text, end))
    except RecursionError:
        fault = json.JSONDecodeError("Expecting an end of the value", text, start)
    except json.JSONDecodeError as error:
        fault = error
    found = (_closed(text, start), _before_next(decoder, text, start))
    ends = [end for end in found if end is not None]
    if not ends:
        raise fault
    return min(ends)


def _ends_a_row(text: str, end: int) -> bool:
    after = _after_space(text, end)
    return text[after : after + 1] in (",", "]")


def _closed(text: str, start: int) -> int | None:
    """The place behind the bracket that closes the one at `start`; None where brackets of unlike
    kinds meet, none closes it, or something else than the next row follows."""
    open_kinds: list[str] = []
    for found in _BRACKETS.finditer(text, start) if text[start : start + 1] in ("{", "[") else ():
        sign = found[0]
        if sign in ("{", "["):
            open_kinds.append(sign)
        elif sign in ("}", "]"):
            if open_kinds.pop() + sign not in ("{}", "[]"):
                return None
            if not open_kinds:
                return found.end() if _ends_a_row(text, found.end()) else None
    return None


def _before_next(decoder: json.JSONDecoder, text: str, start: int) -> int | None:
    """The place before the next object with `conversations`, and the comma in front of it."""
    for found in _COMMAS.finditer(text, start):
        with suppress(json.JSONDecodeError, RecursionError):
            if "conversations" in decoder.raw_decode(text, found.end())[0]:
                return found.start()
    return None


_COMMAS = re.compile(r",[ \t\n\r]*(?=\{)")
_BRACKETS = re.compile(r'"(?:[^"\\\n]|\\.)*+"|[\[\]{}]')
"""Strings, in which brackets do not count and lines do not end, and brackets."""


def _after_space(text: str, position: int) -> int:
    """The first place from `position` on that is not JSON's white space."""
    found = re.compile(r"[^ \t\n\r]").search(text, position)
    return found.start() if found else len(text)


def _turns(conversations: object, *, questions: bool) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise ValueError("'conversations' is missing, empty or no list: write [{from: human, value: …}, {from: gpt, value: …}]")
    turns = []
    for number, entry in enumerate(conversations):
        if not isinstance(entry, dict) or not isinstance(entry.get("from"), str) or not isinstance(entry.get("value"), str):
            raise ValueError(f"turn {number} is not {{from: text, value: text}}")
        if entry["from"] not in ROLES:
            raise ValueError(f"turn {number} is from '{entry['from']}': the roles are human, gpt and system")
        try:
            entry["value"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text of turn {number} is not valid Unicode ({error.reason}): repair it") from None
        turns.append(Turn(role=ROLES[entry["from"]], text=entry["value"]))
    if questions and len(turns) > 1 and turns[-1].role == "assistant" and not turns[-1].text.strip():
        turns.pop()
    talk = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(talk, len(turns) - len(talk)):
        expected = ("user", "assistant")[(number - len(turns) + len(talk)) % 2]
        if turn.role != expected:
            raise ValueError(f"turn {number} is the {turn.role}'s, not the {expected}'s: human and gpt alternate, human first")
        if turn.role == "assistant" and not turn.text.strip():
            raise ValueError(f"the answer in turn {number} is empty: there is nothing to learn; leave the sample out")
    if questions and not talk:
        raise ValueError("the conversation holds no question: write a human turn")
    if not questions and (len(talk) < 2 or len(talk) % 2):
        raise ValueError("the conversation does not end with an answer: end it with a gpt turn")
    return tuple(turns)


def _image_names(image: object) -> tuple[str, ...]:
    if image is None:
        return ()
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise ValueError(
            f"'image' is {reprlib.repr(image)}: write a path or a list of paths, or leave it out",
        )
    return tuple(names)


def _check_markers(turns: tuple[Turn, ...], images: int) -> None:
    markers = sum(turn.text.count(MARKER) for turn in turns)
    if any(MARKER in turn.text for turn in turns if turn.role != "user"):
        raise ValueError(f"{MARKER} stands outside the human turns: an answer or system message cannot hold an image")
    if images and not markers:
        raise ValueError(f"it has {images} image(s) but no {MARKER} in its turns: add {MARKER} where the image belongs, as before the first question")
    if markers != images:
        raise ValueError(f"its turns hold {markers} {MARKER} but it has {images} image(s): add or remove {MARKER}, or the image")
