"""Every benchmark, one after the other, into one JSON file.

    python tests/benchmarks/all.py OUT.json [--quick] [--device cuda]

--quick: three rounds each. It takes most of an hour on two cores without it; nothing else should run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WAYS = {"step": ["--compile"], "others": [], "scaling": [], "startup": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    found = {}
    for name, flags in WAYS.items():
        command = [sys.executable, str(HERE / f"{name}.py"), *flags, *(["--rounds", "3"] if args.quick else [])]
        command += ["--device", args.device] if args.device and name != "startup" else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found[name] = {"failed": done.stderr.strip().splitlines()[-1:]} if done.returncode else json.loads(done.stdout)
        print(name, "failed" if done.returncode else "done", flush=True)
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
