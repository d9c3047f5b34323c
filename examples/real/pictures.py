"""The example's data: LLaVA-format files about the pictures of `pictures.zip`, and text.

Pictures of shapes are easy-VQA's, photographs of hand signs are of the Sign Language Digits data
set (NOTICE.txt). The questions are ours: of "Is there a red shape?" half are to be answered with
yes, so that its wording tells nothing. No picture of a held-out question is trained.
"""

import json
import random
import zipfile
from pathlib import Path

from examples.real.place import placed, write

HERE = Path(__file__).parent
HELD_OUT = 60
"""Pictures of shapes, and of signs, of which nothing is trained; as many questions of each kind."""
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
WHICH_SHAPE = ("What shape is in the picture?", "Which shape is this?", "Name the shape.")
WHICH_COLOUR = ("What colour is the shape?", "Which colour is the shape?", "Name the colour.")
WHICH_SIGN = ("Which digit does the hand show?", "Which number is this?", "Read the hand sign.")
IS_COLOUR = ("Is there a {} shape?", "Is the shape {}?", "Does the picture show a {} shape?")
IS_SHAPE = ("Is there a {}?", "Is the shape a {}?", "Does the picture show a {}?")
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the ocean.",
    "Give three tips for staying healthy.",
    "Explain in two sentences why the moon shines.",
    "Translate to French: Good morning, my friend.",
    "What is 2 + 2?",
)
"""Questions without a picture whose whole answers are shown."""


def write_data(folder: Path) -> None:
    """Write pictures, captions.json, shapes.json, signs.json and heldout.json into `folder`, with
    the questions to ask without a picture; it appears whole or not at all."""
    with placed(folder) as part:
        with zipfile.ZipFile(HERE / "pictures.zip") as archive:
            archive.extractall(part)
        lines = (part / "labels.jsonl").read_text(encoding="utf-8").splitlines()
        labels = [json.loads(line) for line in lines]
        random.Random(0).shuffle(labels)
        shapes = [label for label in labels if "shape" in label]
        signs = [label for label in labels if "digit" in label]
        trained = shapes[HELD_OUT:] + signs[HELD_OUT:]
        rows = {
            "captions": [row(label["image"], "caption", "", caption(label)) for label in trained],
            "shapes": about_shapes(shapes[HELD_OUT:]),
            "signs": about_signs(signs[HELD_OUT:]),
            "heldout": held_out(shapes[:HELD_OUT], signs[:HELD_OUT]),
            "facts": [text_row(f"fact-{n}", f["question"]) for n, f in enumerate(facts())],
            "instructions": [text_row(f"do-{n}", text) for n, text in enumerate(instructions())],
            "prompts": [text_row(f"prompt-{n}", text) for n, text in enumerate(PROMPTS)],
        }
        for name, listed in rows.items():
            write_rows(part / f"{name}.json", listed)


def write_text(answers: list[dict], folder: Path) -> None:
    """Write text.json, which is trained beside the pictures: our instructions with the decoder's
    own answers from before training, those that it ended by itself."""
    asked = dict(enumerate(instructions()))
    rows = []
    for answer in answers:
        if answer["finish"] == "stop" and answer["text"].strip():
            number = int(answer["id"].removeprefix("do-"))
            rows.append(text_row(answer["id"], asked[number], answer["text"]))
    write_rows(folder / "text.json", rows)


def write_rows(path: Path, rows: list[dict]) -> None:
    """A LLaVA-format file."""
    write(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def facts() -> list[dict]:
    """Questions with the words of which one must stand in the answer, parted by `|`."""
    lines = (HERE / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def instructions() -> list[str]:
    """Things to say, which the decoder answers in its own words."""
    return (HERE / "instructions.txt").read_text(encoding="utf-8").splitlines()


def knows(fact: dict, answer: str) -> bool:
    """Does one of the fact's words stand in the answer?"""
    words = " " + "".join(c if c.isalnum() else " " for c in answer.lower()) + " "
    return any(f" {word.lower()} " in words for word in fact["answer"].split("|"))


def row(image: str, kind: str, *turns: str) -> dict:
    """A conversation about a picture: question, answer, question, answer …"""
    values = [f"<image>\n{turns[0]}".rstrip(), *turns[1:]]
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(values)]
    return {"id": f"{kind}-{image}", "kind": kind, "image": image, "conversations": said}


def text_row(id: str, question: str, *answer: str) -> dict:
    """A question without a picture, and its answer where there is one."""
    said = [{"from": "human", "value": question}]
    said += [{"from": "gpt", "value": text} for text in answer]
    return {"id": id, "kind": "text", "conversations": said}


def caption(label: dict) -> str:
    """What a picture shows: what the first stage reads."""
    if "digit" in label:
        return f"a hand that shows the digit {label['digit']}"
    return f"a {label['colour']} {label['shape']}"


def about_shapes(labels: list[dict]) -> list[dict]:
    """A conversation about each picture: two questions for yes or no, then what it shows."""
    draw = random.Random(1)
    rows = []
    for label in labels:
        closed = [
            yes_or_no(IS_SHAPE, label["shape"], SHAPES, draw),
            yes_or_no(IS_COLOUR, label["colour"], COLOURS, draw),
        ]
        opened = [which_shape(label, draw), which_colour(label, draw)]
        draw.shuffle(closed)
        draw.shuffle(opened)
        turns = [text for asked in (*closed, *opened) for text in asked]
        rows.append(row(label["image"], "shapes", *turns))
    return rows


def about_signs(labels: list[dict]) -> list[dict]:
    """A question about each photograph."""
    draw = random.Random(2)
    return [row(label["image"], "sign", *which_sign(label, draw)) for label in labels]


def held_out(shapes: list[dict], signs: list[dict]) -> list[dict]:
    """One question of each kind about each picture, by itself: no answer is in another's prompt.

    Of the questions for yes or no exactly half are to be answered with yes.
    """
    draw = random.Random(3)
    rows = []
    for number, label in enumerate(shapes):
        about = (IS_SHAPE, label["shape"], SHAPES)
        if number // 2 % 2:
            about = (IS_COLOUR, label["colour"], COLOURS)
        rows.append(row(label["image"], "shape", *which_shape(label, draw)))
        rows.append(row(label["image"], "colour", *which_colour(label, draw)))
        rows.append(row(label["image"], "yes_no", *yes_or_no(*about, draw, yes=number % 2 == 0)))
    for label in signs:
        rows.append(row(label["image"], "sign", *which_sign(label, draw)))
    return rows


def which_shape(label: dict, draw: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    return draw.choice(WHICH_SHAPE), label["shape"]


def which_colour(label: dict, draw: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    return draw.choice(WHICH_COLOUR), label["colour"]


def which_sign(label: dict, draw: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    return draw.choice(WHICH_SIGN), label["digit"]


def yes_or_no(
    forms: tuple[str, ...],
    true: str,
    all_of_them: tuple[str, ...],
    draw: random.Random,
    *,
    yes: bool | None = None,
) -> tuple[str, str]:
    """A question and its answer, which is yes for half of them."""
    if yes is None:
        yes = draw.random() < 0.5
    named = true if yes else draw.choice([other for other in all_of_them if other != true])
    return draw.choice(forms).format(named), "yes" if yes else "no"
