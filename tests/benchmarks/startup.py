"""How long kdcli takes to start: `kdcli --help` and a whole distill of one step, beside `import torch`; JSON out.

    python tests/benchmarks/startup.py [--rounds 7]

Each is a process of its own, all taken in turn. The distill trains one step on the digits from a mentor with random
weights; what counts is how its time compares with importing torch, which it cannot do without.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = """
import torch
from kdcli.models import cards as zoo, registry as names
from kdcli.data import open_data
from kdcli.recipe import DataConfig
from kdcli.models.cards import Card
data = open_data(DataConfig(name="digits"))
net = names.create(names.resolve("cifar_resnet8"), 10).module
zoo.add(net.state_dict(), Card(name="x", architecture="zoo:cifar_resnet8", dataset="digits", data_hash=data.hash,
        num_classes=10, image_size=16, mean=data.mean, std=data.std, top1=None, epoch=None))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "KDCLI_HOME": folder}
        subprocess.run([sys.executable, "-c", CODE], env=env, check=True)
        distill = ["--student", "cifar_resnet10_xxs", "--teacher", "cifar_resnet8", "--data", "digits", "--epochs", "1"]
        sets = ["--set", "data.per_class=4", "--set", "train.batch_size=40"]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "kdcli --help": [sys.executable, "-m", "kdcli", "--help"],
            "kdcli distill": [sys.executable, "-m", "kdcli", "distill", *distill, *sets],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for n in range(args.rounds + 1):
            for name, command in commands.items():
                out = ["--out", str(Path(folder) / f"run-{n}")] if name == "kdcli distill" else []
                began = time.perf_counter()
                subprocess.run([*command, *out], env=env, check=True, capture_output=True)
                if n:  # the first fills the caches of the disk
                    times[name].append(time.perf_counter() - began)
    base = statistics.median(times["import torch"])
    rows = {
        name: {"s": round(statistics.median(t), 2), "times import torch": round(statistics.median(t) / base, 2)}
        for name, t in times.items()
    }
    print(json.dumps({"rounds": args.rounds, "commands": rows}, indent=1))


if __name__ == "__main__":
    main()
