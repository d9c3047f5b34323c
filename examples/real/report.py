"""What came out: report.json, answers.png, and the figures of docs/real.md."""

import json
import random
import re
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.real import pictures
from examples.real.place import read_lines, write

KINDS = {
    "shape": "Which shape is it? (3)",
    "colour": "Which colour? (8)",
    "yes_no": "Is there a …? (yes or no)",
    "sign": "Which digit does the hand show? (10)",
}
"""Kind of question -> what it asks, and how many answers there are."""
COLUMNS = 5
RIGHT = 10
WRONG = 5
"""Answers that are shown."""
CELL = (220, 250)
SHOWN = 128
"""Side of a picture in a cell, in pixels."""
GREEN = (4, 120, 87)
RED = (185, 28, 28)
INK = (31, 41, 55)


def make(out: Path, page: Path | None = None) -> None:
    """Write report.json and answers.png into `out`, print the tables, and write them into `page`
    between its marks."""
    found = gather(out)
    write(out / "report.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    draw(out)
    trained = "Trained for {} and {} steps.".format(*found["trained"])
    tables = [table(found) for table in (scores, facts, prompts, proofs, times)]
    text = "\n\n".join((trained, *tables))
    print(f"\n{text}\n\nSee {out / 'answers.png'}; ask it yourself:")
    ask = f"--image {out}/data/signs/3_07.jpg --prompt 'Which digit does the hand show?'"
    print(f"neva generate {out / 'run'} {ask}")
    if page is not None:
        old = page.read_text(encoding="utf-8")
        marked = re.compile(r"(<!-- made by examples.real -->\n).*(<!-- end -->)", re.DOTALL)
        write(page, marked.sub(lambda match: f"{match[1]}{text}\n{match[2]}", old))


def kept(out: Path, when: str) -> str:
    """As JSON: of how many facts the model tells the word, and its answers to the prompts."""
    said = read_lines(out / when / "facts.jsonl")
    told = {answer["id"]: answer["text"] for answer in said}
    facts = enumerate(pictures.facts())
    knows = sum(pictures.knows(fact, told[f"fact-{number}"]) for number, fact in facts)
    prompts = [answer["text"] for answer in read_lines(out / when / "prompts.jsonl")]
    return json.dumps({"facts": knows, "of": len(said), "prompts": prompts}, indent=2) + "\n"


def gather(out: Path) -> dict:
    """All figures of a run."""
    found = {}
    for name in ("decoder", "before", "after", "transformers", "trained"):
        found[name] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    told = json.loads((out / "after/heldout.report.json").read_text(encoding="utf-8"))
    return {**found, "scores": told["score"], "parts": read_lines(out / "parts.jsonl")}


def scores(found: dict) -> str:
    """Accuracy beside what can be had without looking."""
    s = found["scores"]
    rows = ["| question | model | images blanked | best answer without the image |"]
    rows.append("|---|---:|---:|---:|")
    for kind, words in KINDS.items():
        shares = (s["accuracy"][kind], s["blank_image"][kind], s["baselines"][kind])
        rows.append(f"| {words} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(rows)


def facts(found: dict) -> str:
    """What the decoder knew before, and knows now."""
    before = found["before"]
    after = found["after"]
    asked = f"Of {before['of']} facts asked without a picture"
    return f"{asked} it tells {before['facts']} before training and {after['facts']} after."


def prompts(found: dict) -> str:
    """The six prompts' answers."""
    rows = ["| prompt | before | after |", "|---|---|---|"]
    pairs = zip(found["before"]["prompts"], found["after"]["prompts"], strict=True)
    for prompt, pair in zip(pictures.PROMPTS, pairs, strict=True):
        cells = (" ".join(text.split()).replace("|", "\\|") for text in (prompt, *pair))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def proofs(found: dict) -> str:
    """What is equal to transformers."""
    d = found["decoder"]
    t = found["transformers"]
    rows = (
        ("token ids of lines of text", d["ids_equal"], d["lines"]),
        ("greedy text of the decoder before training", d["text_equal"], d["prompts"]),
        ("answers about pictures, of the export", t["heldout"]["equal"], t["heldout"]["of"]),
        ("greedy text, of the export", t["prompts"]["equal"], t["prompts"]["of"]),
    )
    listed = [f"| {what} | {equal:,} of {of:,} |" for what, equal, of in rows]
    return "\n".join(["| neva beside transformers | equal |", "|---|---:|", *listed])


def times(found: dict) -> str:
    """Seconds of each part; one that was cut off and gone on with counts from its last start."""
    rows = ["| part | seconds | CPU seconds |", "|---|---:|---:|"]
    for part in found["parts"]:
        rows.append(f"| {part['part']} | {part['seconds']:.0f} | {part['cpu_seconds']:.0f} |")
    wall, cpu = (sum(part[key] for part in found["parts"]) for key in ("seconds", "cpu_seconds"))
    return "\n".join([*rows, f"| all | {wall:.0f} | {cpu:.0f} |"])


def draw(out: Path) -> None:
    """answers.png: pictures with what was asked, what was said and, where that is wrong, what is
    right."""
    asked = {row["id"]: row for row in json.loads((out / "data/heldout.json").read_text())}
    answers = [a for a in read_lines(out / "after/heldout.jsonl") if not a["blank"]]
    random.Random(0).shuffle(answers)  # else one picture after the other is asked all questions
    wrong = spread([a for a in answers if not a["right"]], WRONG)
    right = spread([a for a in answers if a["right"]], RIGHT)
    shown = right + wrong
    height = -(-len(shown) // COLUMNS) * CELL[1]
    sheet = Image.new("RGB", (COLUMNS * CELL[0], height), "white")
    for number, answer in enumerate(shown):
        corner = (number % COLUMNS * CELL[0], number // COLUMNS * CELL[1])
        row = asked[answer["id"]]
        draw_one(sheet, corner, out / "data" / row["image"], answer | {"row": row})
    part = out / "answers.part.png"
    sheet.save(part)
    part.replace(out / "answers.png")


def spread(answers: list[dict], count: int) -> list[dict]:
    """Some of the answers, the kinds of questions in turn."""
    kinds: dict[str, list[dict]] = {}
    for answer in answers:
        kinds.setdefault(answer["kind"], []).append(answer)
    most = max(map(len, kinds.values()), default=0)
    turns = [rows[n] for n in range(most) for _, rows in sorted(kinds.items()) if n < len(rows)]
    return turns[:count]


def draw_one(sheet: Image.Image, corner: tuple[int, int], picture: Path, answer: dict) -> None:
    """A picture, and below it question and answer."""
    x, y = corner
    pen = ImageDraw.Draw(sheet)
    with Image.open(picture) as image:
        shown = image.convert("RGB").resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
    sheet.paste(shown, (x + (CELL[0] - SHOWN) // 2, y + 10))
    question = answer["row"]["conversations"][0]["value"].removeprefix("<image>\n")
    said = answer["text"] if answer["right"] else f"{answer['text']}  (it is {answer['truth']})"
    middle = x + CELL[0] // 2
    at = y + SHOWN + 20
    for line in textwrap.wrap(question, 26):
        pen.text((middle, at), line, fill=INK, font=ImageFont.load_default(15), anchor="ma")
        at += 20
    for line in textwrap.wrap(said, 24):
        colour = GREEN if answer["right"] else RED
        pen.text((middle, at + 4), line, fill=colour, font=ImageFont.load_default(17), anchor="ma")
        at += 22
