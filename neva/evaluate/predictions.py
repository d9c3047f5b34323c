"""Answers in a file, as they are given, so that an evaluation that was stopped goes on."""

import fcntl
import hashlib
import json
import reprlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from neva.config import write_whole
from neva.evaluate.question import Judged, Question
from neva.infer.generate import Answer

INFORMAL = ("neva", "device", "batch_size")
"""Settings that are told and not compared: answers do not hang on them but for rounding."""
NAMES = {"checkpoint_sha256": "checkpoint", "chat_template": "template"}
"""Setting -> what a user calls it."""
Key = tuple[int, int, bool]
"""Row, turn, and whether the images were blanked."""


def kept(
    out: str | Path | None,
    settings: dict[str, Any],
    asked: Sequence[Question],
) -> AbstractContextManager["Predictions | None"]:
    """The file of answers, None if they are not kept."""
    if out is None:
        return nullcontext()
    return closing(Predictions(Path(out), settings=settings, asked=asked))


class Predictions:
    """A .jsonl file of answers; beside it NAME.report.json says how they were made and scored.

    Raises ValueError for a file that another process writes, for one that is not ours, and, naming
    the setting, for one whose answers were made with other settings. Close it.
    """

    def __init__(self, path: Path, *, settings: dict[str, Any], asked: Sequence[Question]) -> None:
        if path.suffix != ".jsonl":
            raise ValueError(f"--out {path}: give it a name that ends in .jsonl")
        self.path = path
        self.report = path.with_name(f"{path.stem}.report.json")
        self._settings = json.loads(json.dumps(settings))
        self._digests = {(q.row, q.turn): _digest(q) for q in asked}
        self._lines: dict[Key, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _locked(path)
        try:
            self._read()
            self._write_report(None)
        except BaseException:
            self._file.close()
            raise

    def find(self, question: Question, *, blank: bool) -> Judged | None:
        """The answer that the file holds, None if none: then it is still to be asked.

        One that could not be asked is asked again, as its row or image may be mended.
        """
        line = self._lines.get((question.row, question.turn, blank))
        return _judged(question, line) if line is not None and not line.get("error") else None

    def add(self, judged: Iterable[Judged]) -> None:
        """Write answers."""
        lines = [_line(j, self._digests[j.question.row, j.question.turn]) for j in judged]
        self._lines |= {_key(line): line for line in lines}
        self._file.write(b"".join(map(_encoded, lines)))
        self._file.flush()

    def finish(self, score: dict[str, Any] | None) -> None:
        """Put the lines in the order of the rows, each question once, and write the score."""
        lines = [self._lines[key] for key in sorted(self._lines)]
        write_whole(self.path, b"".join(map(_encoded, lines)))
        self._write_report(score)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _read(self) -> None:
        """Take the lines of an earlier run; a last one that is half written is cut off."""
        data = self._file.read()
        if not data and not self.report.exists():
            return
        before = self._settings_before()
        if not data:
            return
        self._check(before)
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        for text in data[:whole].splitlines():
            try:
                line = json.loads(text)
                key = _key(line)
                same = line["asked"] == self._digests.get(key[:2])
                _judged_answer(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # damaged: it is asked again
            if same:
                self._lines[key] = line

    def _settings_before(self) -> dict[str, Any]:
        """The settings of the answers that are there. ValueError where the files are not ours."""
        try:
            before = json.loads(self.report.read_bytes())["settings"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            before = None
        if not isinstance(before, dict):
            lacks = f"{self.path} is there, and no {self.report.name} beside it says how it was made"
            raise ValueError(f"{lacks}: name another --out, or remove both")
        return before

    def _check(self, before: dict[str, Any]) -> None:
        """ValueError naming the settings that are not those of this run."""
        changed = [
            f"{NAMES.get(name, name)} {_short(before, name)}, not {_short(self._settings, name)}"
            for name in dict.fromkeys([*before, *self._settings])
            if name not in INFORMAL and before.get(name) != self._settings.get(name)
        ]
        if changed:
            holds = f"{self.path} holds answers made with {'; '.join(changed)}"
            raise ValueError(f"{holds}: put that back to go on, or name another --out")

    def _write_report(self, score: dict[str, Any] | None) -> None:
        report = {"settings": self._settings, "score": score}
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_whole(self.report, text)


def _locked(path: Path) -> BinaryIO:
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process writes {path}: wait for it, or name another --out") from None
    file.seek(0)
    return file


def _short(settings: dict[str, Any], name: str) -> str:
    return reprlib.repr(settings.get(name))


def _digest(question: Question) -> str:
    """Tells a row that has changed: what is asked, and of which images."""
    sample = question.sample
    turns = [[turn.role, turn.text] for turn in sample.turns]
    said = [sample.source, sample.id, turns, [str(picture) for picture in sample.images]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _key(line: dict[str, Any]) -> Key:
    return int(line["row"]), int(line["turn"]), bool(line["blank"])


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _line(judged: Judged, digest: str) -> dict[str, Any]:
    question, answer = judged.question, judged.answer
    line: dict[str, Any] = {
        "row": question.row,
        "turn": question.turn,
        "id": question.sample.id,
        "kind": question.kind,
        "blank": judged.blank,
        "prompt": judged.prompt,
        "prompt_tokens": judged.prompt_tokens,
        "image_sizes": [list(size) for size in judged.image_sizes],
        "text": answer.text,
        "truth": question.truth,
        "right": None if question.truth is None else judged.right,
        "finish": answer.finish,
        "tokens": list(answer.tokens),
        "asked": digest,
    }
    return line | ({"error": answer.error} if answer.error else {})


def _judged_answer(line: dict[str, Any]) -> Answer:
    tokens = tuple(int(token) for token in line["tokens"])
    return Answer(
        text=str(line["text"]),
        tokens=tokens,
        finish=str(line["finish"]),
        error=str(line.get("error", "")),
    )


def _judged(question: Question, line: dict[str, Any]) -> Judged:
    sizes = tuple((int(width), int(height)) for width, height in line["image_sizes"])
    return Judged(
        question=question,
        answer=_judged_answer(line),
        right=bool(line["right"]),
        prompt=line["prompt"],
        prompt_tokens=line["prompt_tokens"],
        image_sizes=sizes,
        blank=bool(line["blank"]),
    )
