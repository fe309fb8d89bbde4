"""What the tests of survival share: a warm process, small runs, and their comparison."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from mpsae.training.state import checkpoints


class Survivor:
    """Has `mpsae` run by children of a warm process, see survivor.py."""

    def __init__(self, model, text):
        self.settings = settings(model, text)
        path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("survivor.py")), *self.settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip

    def train(self, out, *more, **order):
        """Start a run or resume it; what survivor.py says of it."""
        arguments = [*self.settings, "--out", str(out), *more]
        if checkpoints(out):
            arguments.append("--resume")
        line = json.dumps({"arguments": arguments, "watched": str(out), **order})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


def settings(model, text):
    """Arguments of a run of twelve steps with two SAEs, checkpoints after 3, 6, 9 and 12."""
    numbers = {
        "k": 3, "expansion_factor": 4, "max_tokens": 12 * 64, "batch_tokens": 64, "context": 24,
        "buffer_tokens": 512, "model_batch": 8, "warmup_steps": 3, "log_every": 1,
        "checkpoint_every": 3, "keep_checkpoints": 3,
    }  # fmt: skip
    found = ["train", str(model), str(text), "--hookpoints", "layers.1"]
    for name, value in numbers.items():
        found += [f"--{name}", str(value)]
    return [*found, "--architecture", "matching_pursuit", "batch_topk"]


def result(out):
    """All that a run leaves that does not depend on time: tensors, counters and metrics."""
    tensors = {}
    for folder in [path.parent for path in out.rglob("cfg.json")]:
        for path in folder.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                tensors[f"{path.relative_to(out)}: {name}"] = tensor
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_s"]
    return tensors, lines, [p.name for p in checkpoints(out)]


def assert_same_result(out, whole):
    tensors, lines, names = result(out)
    assert lines == whole[1]
    assert names == whole[2]
    assert tensors.keys() == whole[0].keys()
    for name, tensor in tensors.items():
        assert tensor.equal(whole[0][name]), name
    assert not list(out.rglob(".*"))
