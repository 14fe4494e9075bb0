"""How fast is the learner beside TRL's `DPOTrainer`, and in how much memory?

The same pairs of token ids, model, precision and threads; an optimizer step over all of them, and their reference
log-probabilities, which both compute before they train. Each side is a process that keeps its model and waits while
another works. TRL runs in the environment of `make bench-env`, once for each size of its micro-batches, and the faster
of these counts in each round. Both sides warm up with one step. How far the losses of the steps are apart is said.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import gpu
import typer
from common import RESULTS, Load, head, spread, write
from learner_sides import Work

HERE = Path(__file__).parent
SHAPES = {"chat": (66, 157), "judge": (370, 52), "short": (60, 52)}  # tokens of the prompt and of each response
FIRST_PORT = 29610


class Side:
    """A side's processes, one for each rank; the first says what a round came to."""

    def __init__(self, python: str, name: str, work: Work, ranks: int, port: int) -> None:
        self.name = name
        file = Path(work.scratch) / "work.json"
        file.write_text(json.dumps(asdict(work)))
        threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        shared = {
            **os.environ, "OMP_NUM_THREADS": threads, "DS_ACCELERATOR": work.device,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self._log = file.with_suffix(".log").open("w+")
        self.processes = []
        for rank in range(ranks):
            place = {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                [python, str(HERE / "learner_sides.py"), name, str(file)],
                stdin=subprocess.PIPE, stdout=self._log if rank else subprocess.PIPE, stderr=self._log, text=True,
                start_new_session=True, env=shared if name == "trl" and ranks == 1 else {**shared, **place},
            )  # fmt: skip
            self.processes.append(process)

    def answer(self) -> dict[str, Any]:
        """The next that its first rank says."""
        out = self.processes[0].stdout
        assert out
        for line in out:
            if line.startswith("SAID "):
                found: dict[str, Any] = json.loads(line[5:])
                return found
        self._log.seek(0)
        raise SystemExit(f"{self.name} ended: {self._log.read()[-3000:]}")

    def round(self) -> dict[str, Any]:
        for process in self.processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        with Load() as load:
            found = self.answer()
        return {**found, **load.figures()}

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._log.close()


def pairs_of(shape: str, count: int, vocabulary: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Lengths vary by a quarter around those of the shape, as those of real pairs do."""
    rng = random.Random(f"{shape} {count}")

    def tokens(about: int) -> list[int]:
        return [rng.randrange(20, vocabulary) for _ in range(round(about * rng.uniform(0.75, 1.25)))]

    prompt, response = SHAPES[shape]
    return [(tokens(prompt), tokens(response), tokens(response)) for _ in range(count)]


def model_folder(model: str, folder: Path) -> Path:
    """`billion`: random weights of that many parameters, with the built-in model's tokenizer or that of
    RSRLM_GPU_TOKENIZER."""
    from rsrlm.model import folder_of
    from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig

    if model != "billion":
        return folder_of(ModelConfig(path=model))
    if "RSRLM_GPU_TOKENIZER" not in os.environ:
        os.environ["RSRLM_GPU_TOKENIZER"] = str(folder_of(ModelConfig(path=BUILTIN_MODEL)))
    return gpu.model_folder(gpu.Case("", "served", "cuda"), folder)


def matrix_peak(device: str, dtype: str) -> float:
    """FLOP/s of the best of a few large products."""
    import torch

    size = 8192 if device == "cuda" else 2048
    one, other = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def products(folder: Path, pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> float:
    """FLOPs of the products with weights in one optimizer step over these pairs, each prompt once: forward, and twice
    that backward; of attention and of what is computed again, nothing."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    head = config.hidden_size // config.num_attention_heads
    of_layer = config.hidden_size * head * 2 * (config.num_attention_heads + config.num_key_value_heads)
    of_layer += 3 * config.hidden_size * config.intermediate_size
    read = sum(len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs)
    predicted = sum(len(chosen) + len(rejected) for _, chosen, rejected in pairs)
    return 6.0 * (config.num_hidden_layers * of_layer * read + config.vocab_size * config.hidden_size * predicted)


def figures_of(rounds: Sequence[Mapping[str, Any]], count: int, flops: float, peak: float) -> dict[str, Any]:
    """Pairs a second of references and step together; ratios are formed within a round, over the fastest of TRL's."""

    def seconds(row: Mapping[str, Any]) -> float:
        return float(row["reference_s"] + row["step_s"])

    theirs = [min((row[name] for name in row if name.startswith("trl")), key=seconds) for row in rounds]
    ours = [row["rsrlm"] for row in rounds]
    both = list(zip(ours, theirs, strict=True))
    return {
        "ours, pairs/s": spread([count / seconds(one) for one in ours]),
        "theirs, pairs/s": spread([count / seconds(one) for one in theirs]),
        "ratio": spread([seconds(other) / seconds(one) for one, other in both]),
        "ratio of steps": spread([other["step_s"] / one["step_s"] for one, other in both]),
        "ratio of references": spread([other["reference_s"] / one["reference_s"] for one, other in both]),
        "references over step, ours": spread([one["reference_s"] / one["step_s"] for one in ours]),
        "memory, ours over theirs": spread([one["memory_gib"] / other["memory_gib"] for one, other in both]),
        "share of the matrix peak, ours": spread([flops / one["step_s"] / peak for one in ours]),
        "largest difference of losses": max(abs(one["loss"] - other["loss"]) for one, other in both),
        "other cores": max(side["other_cores"] for row in rounds for side in row.values()),
    }


def main(
    shape: Annotated[list[str], typer.Option(help=f"of {', '.join(SHAPES)}")] = list(SHAPES),  # noqa: B006
    rounds: int = 5,
    pairs: Annotated[int, typer.Option(help="of a step")] = 4,
    model: Annotated[str, typer.Option(help="a model, or `billion`: random weights")] = "smollm2-135m-instruct",
    device: str = "cpu",
    dtype: str = "float32",
    ranks: int = 1,
    micro_batch: Annotated[int, typer.Option(help="ours")] = 1,
    theirs: Annotated[list[int], typer.Option(help="TRL's micro-batches")] = [1, 4],  # noqa: B006
    weights: Annotated[str, typer.Option(help="what TRL's optimizer keeps; ours keeps float32")] = "float32",
    peer: Annotated[Path, typer.Option(help="Python that has TRL")] = HERE.parent / ".venv-bench/bin/python",
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    if not peer.exists():
        raise SystemExit(f"{peer} is not there: make bench-env")
    name = f"learner_{device}" + (f"_ranks_{ranks}" if ranks > 1 else "") + ("_bf16" if weights == "bfloat16" else "")
    peak = matrix_peak(device, dtype)
    data: dict[str, Any] = {**head(__doc__.splitlines()[0]), "matrix_peak_gflops": round(peak / 1e9, 1), "shapes": {}}
    with tempfile.TemporaryDirectory(prefix="rsrlm-learner-") as scratch:
        folder = model_folder(model, Path(scratch))
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        sizes = [("rsrlm", sys.executable, micro_batch), *(("trl", str(peer), size) for size in theirs)]
        if wrong := [size for _, _, size in sizes if pairs % (size * ranks)]:
            raise SystemExit(f"micro-batches of {wrong} on {ranks} ranks do not make up a step of {pairs} pairs")
        for number, one in enumerate(shape):
            made = pairs_of(one, pairs, vocabulary)
            sides: dict[str, Side] = {}
            with ExitStack() as stack:
                for side, python, size in sizes:
                    place = Path(scratch) / f"{one}-{side}-{size}"
                    place.mkdir()
                    work = Work(str(folder), made, size, rounds, device, dtype, str(place), weights)
                    port = FIRST_PORT + 10 * number + len(sides)
                    sides[side if side == "rsrlm" else f"{side}-{size}"] = opened = Side(
                        python, side, work, ranks, port
                    )
                    stack.callback(opened.close)
                for opened in sides.values():
                    if not opened.answer().get("ready"):
                        raise SystemExit(f"{opened.name} said something before it was ready")
                found: list[dict[str, Any]] = []
                for turn in range(rounds):
                    order = list(sides) if turn % 2 == 0 else list(reversed(sides))
                    found.append({key: sides[key].round() for key in order})
                    seconds = {key: round(row["reference_s"] + row["step_s"], 2) for key, row in found[-1].items()}
                    print(one, turn, seconds, flush=True)
                    figures = figures_of(found, pairs, products(folder, made), peak)
                    data["shapes"][one] = {"figures": figures, "rounds": found}
                    write(out, name, data)
            print(one, json.dumps(figures, indent=1), flush=True)
    ratios = {one: round(found["figures"]["ratio"]["median"], 2) for one, found in data["shapes"].items()}
    print("pairs/s over TRL's:", ratios)


if __name__ == "__main__":
    typer.run(main)
