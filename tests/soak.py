"""Kills a chain at random moments until it is done, again and again: python -m tests.soak ROUNDS [SEED].

Each round runs `tests/tiny_chain.py` (digits; MAE, distillation, fine-tuning with an average) with SIGKILL or SIGTERM after a
random time, and starts it again until it ends. Weights, results and logs are compared, bit for bit, with those of a run
that nobody disturbed. Prints one JSON object: rounds, kills by phase and signal, differences.
"""

import collections
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import jax
import numpy as np

from tests.processes import ROOT, command, environment, log
from tinymim_jax.weights import checkpoint

OPTIONS = "steps=12,every=3,workers={}"
STAGES = ("mae", "distill", "finetune")
MAX_STARTS = 40


class Watched:
    """A run on a terminal of its own, so that its bar says where it is."""

    def __init__(self, workdir: Path, workers: int):
        own, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 120))  # of no size, it would show no bar
        env = {**environment(), "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache")}
        self.process = subprocess.Popen(
            command(workdir, OPTIONS.format(workers)), env=env, cwd=ROOT, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.workdir, self.text = workdir, ""
        threading.Thread(target=self._listen, args=(own,), daemon=True).start()

    def _listen(self, terminal: int) -> None:
        while True:
            try:
                self.text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:
                return

    def phase(self) -> str:
        """Where the run is, as far as one can see from outside."""
        if any(self.workdir.glob("*/checkpoints/*tmp*")):
            return "save"
        bars = re.findall(r"(\w+)(, evaluation)?: +(\d+)%", self.text)
        headers = re.findall(r"(\w+): \d+ steps of", self.text)
        if not headers:
            return "start-up"
        if not bars or bars[-1][0] != headers[-1]:
            return "hand-over"
        if bars[-1][1] or bars[-1][2] == "100":
            return "evaluate"
        return "train" if int(bars[-1][2]) else "compile"


def differences(whole: Path, cut: Path) -> list[str]:
    """What two finished workdirs differ in."""
    found = []
    for name in STAGES:
        trees = [checkpoint.read_model(folder / name) for folder in (whole, cut)]
        same = jax.tree.leaves(jax.tree.map(np.array_equal, *trees))
        found += [] if all(same) else [f"{name}: weights"]
        found += [] if log(whole / name) == log(cut / name) else [f"{name}: log"]
    results = [(folder / "results.json").read_text() for folder in (whole, cut)]
    return found + ([] if results[0] == results[1] else ["results.json"])


def run_round(workdir: Path, rng: random.Random, duration: float, kills: collections.Counter) -> int:
    """One chain, killed until it is done; returns how often it was started."""
    for starts in range(1, MAX_STARTS):
        run = Watched(workdir, workers=rng.choice([0, 0, 2]))
        deadline = time.monotonic() + rng.uniform(0, 1.3) * duration
        while run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if run.process.poll() is None:
            number = rng.choice([signal.SIGKILL, signal.SIGTERM])
            kills[f"{run.phase()}, {number.name}"] += 1
            run.process.send_signal(number)
        status = run.process.wait(300)
        if status == 0:
            return starts
        if status not in (-signal.SIGKILL, -signal.SIGTERM, 75):
            raise SystemExit(f"exit status {status}:\n{run.text[-3000:]}")
    raise SystemExit("never done")


def main(rounds: int, seed: int) -> None:
    """Runs the soak; exit status 1 if anything differs."""
    rng, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="soak"))
    for name in ("warm", "whole"):  # the first fills the compilation cache
        begin = time.monotonic()
        run = Watched(folder / name, workers=0)
        if run.process.wait() != 0:
            raise SystemExit(run.text[-3000:])
        duration = time.monotonic() - begin
    kills, starts, differ = collections.Counter(), 0, []
    for i in range(rounds):
        workdir = folder / f"round{i}"
        starts += run_round(workdir, rng, duration, kills)
        differ += [f"round {i}: {what}" for what in differences(folder / "whole", workdir)]
        shutil.rmtree(workdir)
        print(f"round {i + 1}: {sum(kills.values())} kills, {len(differ)} differences", file=sys.stderr, flush=True)
    report = {"rounds": rounds, "starts": starts, "kills": dict(sorted(kills.items())), "differences": differ}
    print(json.dumps({"undisturbed run": f"{duration:.1f} s", **report}, indent=2))
    shutil.rmtree(folder)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
