"""neva beside transformers, on the example's model.

    python -m examples.real.compare text START DECODER RESULT        # before training
    python -m examples.real.compare answers EXPORTED DATA AFTER RESULT

`text`: token ids of 3,000 lines and the greedy text of the six prompts, against the decoder's
folder. `answers`: transformers is asked the held-out questions, with their pictures, and the six
prompts, and its answers are held against neva's.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from examples.real.pictures import PROMPTS
from examples.real.place import read_lines, write

LINES = 3000
WORDS = 60
"""Longest text that is compared, in tokens."""
SOME = 4
"""Of the held-out questions every fourth is asked: transformers answers one at a time."""


def lines() -> list[str]:
    """Real lines: Python's manual of its language, which comes with it, and neva's own pages."""
    from pydoc_data.topics import topics

    root = Path(__file__).parents[2]
    pages = [page.read_text(encoding="utf-8") for page in sorted(root.glob("docs/*.md"))]
    texts = [(root / "README.md").read_text(encoding="utf-8"), *pages, *topics.values()]
    found = dict.fromkeys(line for text in texts for line in text.splitlines() if line.strip())
    return list(found)[:LINES]


def compare_text(start: Path, decoder: Path) -> dict:
    """How many of the lines get equal ids, and of the prompts equal text."""
    import neva

    tokenizer, theirs = text_model(decoder)
    loaded = neva.load(start)
    given = lines()
    ids = loaded.encoder.tokenizer.encode
    equal = sum(ids(line) == tokenizer.encode(line, add_special_tokens=False) for line in given)
    said = list(theirs)
    ours = [next(neva.generate(loaded, prompt=p, max_new_tokens=WORDS))["text"] for p in PROMPTS]
    same = sum(mine == their for mine, their in zip(ours, said, strict=True))
    return {"lines": len(given), "ids_equal": equal, "prompts": len(PROMPTS), "text_equal": same}


def text_model(folder: Path) -> tuple:
    """The tokenizer of a text model, and its answers to the prompts."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)

    def answers() -> Iterator[str]:
        for prompt in PROMPTS:
            asked = [{"role": "user", "content": prompt}]
            given = tokenizer.apply_chat_template(
                asked,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
            said = model.generate(**given, max_new_tokens=WORDS, do_sample=False)
            new = said[0, given["input_ids"].shape[1] :]
            yield tokenizer.decode(new, skip_special_tokens=True).strip()

    return tokenizer, answers()


def compare_answers(exported: Path, data: Path, after: Path) -> dict:
    """How many of neva's answers transformers gives too, and those that differ."""
    counts = {}
    apart = []
    ask = vision_model(exported, data)
    for name, longest, every in (("heldout", 8, SOME), ("prompts", WORDS, 1)):
        rows = json.loads((data / f"{name}.json").read_text(encoding="utf-8"))[::every]
        answers = [answer for answer in read_lines(after / f"{name}.jsonl") if not answer["blank"]]
        said = {answer["id"]: answer["text"] for answer in answers}
        ours = {row["id"]: said[row["id"]] for row in rows}
        theirs = {row["id"]: ask(row, longest) for row in rows}
        counts[name] = {"equal": sum(ours[id] == theirs[id] for id in ours), "of": len(ours)}
        for id in ours:
            if ours[id] != theirs[id]:
                apart.append({"id": id, "neva": ours[id], "transformers": theirs[id]})
    return {**counts, "apart": apart}


def vision_model(folder: Path, data: Path):
    """A function (row of a LLaVA file, longest answer in tokens) -> transformers' answer."""
    import transformers
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(
        folder,
        backend="pil",
        trust_remote_code=False,
    )
    read = transformers.LlavaForConditionalGeneration.from_pretrained
    model = read(folder, trust_remote_code=False).eval()

    def ask(row: dict, longest: int) -> str:
        text = row["conversations"][0]["value"].removeprefix("<image>\n")
        content = [{"type": "text", "text": text}]
        pictures = {}
        if "image" in row:
            content.insert(0, {"type": "image"})
            pictures = {"images": Image.open(data / row["image"]).convert("RGB")}
        asked = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
        given = processor(text=prompt, return_tensors="pt", **pictures)
        said = model.generate(**given, max_new_tokens=longest, do_sample=False)
        new = said[0, given["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True).strip()

    return ask


def main() -> None:
    """Compare, say the result and keep it."""
    import transformers

    transformers.logging.disable_progress_bar()
    what, *folders, result = sys.argv[1:]
    compare = {"text": compare_text, "answers": compare_answers}[what]
    found = compare(*map(Path, folders))
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    print(text, end="")
    write(Path(result), text)


if __name__ == "__main__":
    main()
