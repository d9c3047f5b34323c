"""Peak memory and time of bringing a checkpoint in: `neva import` beside transformers' from_pretrained and save_pretrained.

Work: a synthetic Llama of about 6 GB in bf16, random weights, in shards of 2 GB. Each side runs in a process of its own, whose peak resident
memory is read at its end. `import` is the whole command: streaming, and the parity gate, which compares layer by layer since two fp32 copies
do not fit; `import_no_parity` leaves the gate out. The goal is a peak of at most the largest shard + 2 GiB.

Prints JSON lines; progress goes to stderr.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from pair import emit, machine
from safetensors.torch import save_file

SHARD = 2 * 10**9
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2560, "intermediate_size": 8704,
    "num_hidden_layers": 32, "num_attention_heads": 20, "num_key_value_heads": 20, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_theta": 10000.0,
}  # fmt: skip
SIDES = {
    "import": "from neva import api; api.import_checkpoint([SRC], OUT, say=lambda text: None)",
    "import_no_parity": "from neva import api; api.import_checkpoint([SRC], OUT, parity=False, say=lambda text: None)",
    "peer": "import torch, transformers as t; t.AutoModelForCausalLM.from_pretrained(SRC, dtype=torch.bfloat16).save_pretrained(OUT)",
}


def write(folder: Path, layers: int) -> tuple[int, int]:
    """The synthetic checkpoint; bytes of all and of the largest shard."""
    c = {**CONFIG, "num_hidden_layers": layers}
    d, f = c["hidden_size"], c["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], d)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (d, d) for n in "qkvo"} | {f"{at}mlp.{n}_proj.weight": (f, d) for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (d, f), f"{at}input_layernorm.weight": (d,), f"{at}post_attention_layernorm.weight": (d,)}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (c["vocab_size"], d)}
    chunks: list[list[str]] = [[]]
    room = SHARD
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if size > room:
            chunks.append([])
            room = SHARD
        chunks[-1].append(name)
        room -= size
    generator, listed = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(chunks):
        file = f"model-{number + 1:05d}-of-{len(chunks):05d}.safetensors"
        state = {}
        for name in names:
            deviation = shapes[name][-1] ** -0.5 if len(shapes[name]) > 1 else 0.1
            state[name] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(float(len(shapes[name]) == 1), deviation, generator=generator)
            listed[name] = file
        save_file(state, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sum(sizes), max(sizes)


def measure(code: str, source: Path, out: Path) -> tuple[float, float]:
    """Peak GiB and seconds of a process that runs the code."""
    script = f"import resource\nSRC, OUT = {str(source)!r}, {str(out)!r}\n{code}\nprint('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.rsplit("PEAK", 1)[1]) * 1024 / 2**30, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="32 are 6 GB")
    parser.add_argument("--only", action="append", choices=[*SIDES], help="run this side; may be given several times")
    chosen = parser.parse_args()
    emit(machine())
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        total, largest = write(source, chosen.layers)
        print(f"wrote {total / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB, peak {_own():.2f} GiB", file=sys.stderr)
        found = {}
        for name, code in SIDES.items():
            if chosen.only and name not in chosen.only:
                continue
            found[name] = measure(code, source, Path(scratch) / name)
            print(f"{name}: {found[name][0]:.2f} GiB, {found[name][1]:.0f} s", file=sys.stderr)
        for name in ("import", "import_no_parity"):
            if name in found and "peer" in found:
                goal = largest / 2**30 + 2
                ours, peer = found[name], found["peer"]
                row = {"name": name, "ours": round(ours[0], 2), "peer": round(peer[0], 2), "ratio": round(ours[0] / peer[0], 3)}
                emit({**row, "unit": "GiB, peak of the process", "goal": round(goal, 2), "seconds": round(ours[1]), "peer_seconds": round(peer[1])})


def _own() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


if __name__ == "__main__":
    main()
