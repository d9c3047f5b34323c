"""Speed of cached greedy decoding of one request: neva next to transformers' `generate`, with the same model and weights in fp32.

One request has one image (64 tokens) and 64 text tokens; 64 new tokens are generated, and no side may stop early. Ours is
`neva.infer.generate`; the peer is `generate(do_sample=False, use_cache=True)` with SDPA attention and its default cache. Both sides must give
the same tokens. A repeat runs each side once, in turn; `ours` and `peer` are medians, `ratio` is the median of the repeats' ratios.

* `generate`: new tokens per second of the whole request, from its prompt and pixels to the last token.
* `decode`: tokens per second after the first, from the times of this request and of one that ends at its first token.
* `prefill`: requests per second up to their first token.

Prints JSON lines; progress goes to stderr.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pair import IMAGE_ID, IMAGE_TOKENS, VISION, emit, load_ours, load_peer, machine, write

from neva.batch import IGNORE, IMAGE
from neva.data.encode import Encoder
from neva.data.sample import Encoded
from neva.data.tokenizer import Tokenizer
from neva.infer.generate import Loaded, Sampling, generate_encoded, lay_out_for_decoding
from neva.models.vit import VisionConfig, normalise
from neva.models.vlm import VLM

PROMPT, NEW = 64, 64
ROWS = {"generate": "new tokens/s", "decode": "tokens/s after the first", "prefill": "requests/s"}


class NoText(Tokenizer):
    """A tokenizer without an end token: the request is token ids, and so is the answer."""

    bos, eos, pad, size = None, -1, 0, IMAGE_ID
    own_size = IMAGE_ID
    specials = ()
    gap = ""

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def spell(self, id: int) -> str:
        return str(id)


def make_request() -> Encoded:
    """A start token, the image, text."""
    rng = np.random.default_rng(0)
    text = torch.from_numpy(rng.integers(3, IMAGE_ID, PROMPT))
    tiles = torch.from_numpy(rng.integers(0, 256, (1, 3, VISION["image_size"], VISION["image_size"]), dtype=np.uint8))
    tokens = torch.cat((text[:1], torch.full((IMAGE_TOKENS,), IMAGE), text[1:]))
    return Encoded.plain(tokens, torch.full_like(tokens, IGNORE), tiles, group="bench", key=("bench", "0"))


class Ours:
    """neva."""

    def __init__(self, folder: Path):
        config, weights = load_ours(folder)
        with torch.device("meta"):
            model = VLM(config)
        model.load_state_dict(weights, assign=True)
        lay_out_for_decoding(model)
        encoder = Encoder(tokenizer=NoText({}), template="v1", system=None, layout=config.layout)
        self.loaded = Loaded(model=model.eval().requires_grad_(False), encoder=encoder, device=torch.device("cpu"), folder=folder)

    def generate(self, request: Encoded, new: int) -> list[int]:
        """The new tokens."""
        return list(generate_encoded(self.loaded, [request], Sampling(max_new_tokens=new))[0].tokens)


class Peer:
    """transformers."""

    def __init__(self, folder: Path):
        self.model = load_peer(folder).eval().requires_grad_(False)

    def generate(self, request: Encoded, new: int) -> list[int]:
        """The new tokens."""
        ids = request.tokens.masked_fill(request.tokens == IMAGE, IMAGE_ID)[None]
        pixels = normalise(request.tiles, VisionConfig.mean, VisionConfig.std)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            do_sample=False,
            use_cache=True,
            min_new_tokens=new,
            max_new_tokens=new,
        )
        return out[0, ids.shape[1] :].tolist()


def seconds(side: Ours | Peer, request: Encoded, new: int) -> float:
    """Time of one request."""
    started = time.perf_counter()
    side.generate(request, new)
    return time.perf_counter() - started


def measure(ours: Ours, peer: Peer, request: Encoded, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Of each row the rates of both sides, repeat by repeat."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    for _ in range(repeats):
        first = [seconds(side, request, 1) for side in (ours, peer)]
        whole = [seconds(side, request, NEW) for side in (ours, peer)]
        rates["generate"].append((NEW / whole[0], NEW / whole[1]))
        rates["decode"].append(((NEW - 1) / (whole[0] - first[0]), (NEW - 1) / (whole[1] - first[1])))
        rates["prefill"].append((1 / first[0], 1 / first[1]))
    return rates


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="requests of each side")
    parser.add_argument("--only", action="append", choices=[*ROWS], help="print this row; may be given several times")
    chosen = parser.parse_args()
    emit(machine())
    with tempfile.TemporaryDirectory() as made:
        write(Path(made))
        ours, peer = Ours(Path(made)), Peer(Path(made))
    request = make_request()
    answers = ours.generate(request, NEW), peer.generate(request, NEW)  # also warms up
    assert answers[0] == answers[1] and len(answers[0]) == NEW, f"the sides disagree: {answers}"
    print(f"both sides gave {NEW} tokens, {len(set(answers[0]))} of them different", file=sys.stderr)
    for name, pairs in measure(ours, peer, request, chosen.repeats).items():
        if name in (chosen.only or ROWS):
            ratios = [a / b for a, b in pairs]
            emit({
                "name": name, "ours": round(statistics.median(a for a, _ in pairs), 1), "peer": round(statistics.median(b for _, b in pairs), 1),
                "ratio": round(statistics.median(ratios), 3), "unit": ROWS[name], "ratios": [round(ratio, 3) for ratio in ratios],
            })  # fmt: skip


if __name__ == "__main__":
    main()
