"""Kill a run at random moments, resume it, and see that it ends as one that was left alone, bit for bit.

    python experiments/kills.py                50 runs, each killed at least once; some minutes
    python experiments/kills.py --runs 1       what the tests do

A run of three iterations with a checkpoint every second step is killed (SIGKILL) at a random moment, and what is
resumed up to twice more. After each kill every file is read: only one being written (.name) may be in pieces.
At the end every file but config.json (it holds the folder's name) is compared with the undisturbed run's, byte by byte.
Needs fork: Linux or macOS.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

WORK = tempfile.TemporaryDirectory()
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm

with contextlib.suppress(ImportError):  # here, so that no run spends its seconds on it
    importlib.import_module("matplotlib.figure")

import train
from sera_min import playground
from sera_min.machinery import config

tqdm.set_lock(threading.RLock())  # its own is shared with forks: one killed while it holds it would stop all others
HERE = Path(WORK.name)
FLAGS = (
    f"--model_name_or_path {HERE}/model --dataset_name {HERE}/pairs.jsonl --device cpu --max_train_pairs 48 "
    "--per_device_train_batch_size 6 --save_steps 2 --max_length 48 --max_prompt_length 16 --max_new_tokens 24 "
    "--learning_rate 1e-3"
).split()


def fork(flags: list[str], log: Path) -> int:
    """The process id of `python train.py FLAGS`, without the seconds of its imports; what it prints is in `log`."""
    pid = os.fork()
    if pid:
        return pid
    code: object = 99
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        config.command_line(train.main, train.__doc__, flags)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, flush=True)
    os._exit(code if isinstance(code, int) else 1)


def ended(pid: int, seconds: float) -> bool:
    """Whether it ends by itself, with success, within the time; else it is killed. Another end is an error."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "it failed"
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def read_all(out: Path) -> None:
    """Every file that is not just being written can be read to its end."""
    read = {
        ".safetensors": load_file, ".pt": lambda file: torch.load(file, weights_only=True),
        ".json": lambda file: json.loads(file.read_text()),
        ".jsonl": lambda file: [json.loads(line) for line in file.read_text().splitlines()],
        ".png": lambda file: file.read_bytes().index(b"IEND"),
    }  # fmt: skip
    for file in out.rglob("*"):
        if file.suffix in read and not any(part.startswith(".") for part in file.relative_to(out).parts):
            read[file.suffix](file)


def results(out: Path) -> dict[str, bytes]:
    """What must be alike: all files but config.json, which holds the folder's name."""
    files = {str(file.relative_to(out)): file for file in sorted(out.rglob("*")) if file.is_file()}
    return {name: b"" if name == "config.json" else file.read_bytes() for name, file in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="runs, each killed at least once")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--use_peft", action="store_true", help="runs with LoRA")
    arguments = parser.parse_args()
    if arguments.use_peft:
        FLAGS.append("--use_peft")
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread may hold tqdm's lock at a fork, and the child would wait for ever
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = playground.make_sft_policy(0, "cpu", steps=60)
    model.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    rows = playground.preferences(60, "train", seed=0, label_noise=0.3)
    (HERE / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    began = time.monotonic()
    try:
        assert ended(fork([*FLAGS, "--output_dir", f"{HERE}/whole"], HERE / "log"), 600), "it takes too long"
    except AssertionError as error:
        sys.exit(f"{(HERE / 'log').read_text()}\nthe run that is left alone: {error}")
    duration, whole = time.monotonic() - began, results(HERE / "whole")
    rng, kills, at = random.Random(arguments.seed), 0, []
    tries = itertools.count()
    bar = tqdm(total=arguments.runs, desc="runs killed and resumed", unit="run")
    while bar.n < arguments.runs:
        number, killed = next(tries), 0
        out, log = HERE / f"run-{number}", HERE / f"log-{number}"
        while not (out / "policy").exists():
            begun = (out / "config.json").exists()
            flags = [*FLAGS, "--output_dir", str(out)]
            if begun:
                flags = ["--resume_from_checkpoint", str(out)]
            try:
                moment = rng.uniform(0, duration)
                if ended(fork(flags, log), moment if killed < 3 else 60):
                    duration *= 1 if killed else 0.9  # too late to kill it: another run, and sooner
                    break
                read_all(out)
            except Exception:
                sys.exit(f"{log.read_text()}\n{traceback.format_exc()}\nin run {number}, after {kills} kills")
            killed, kills = killed + 1, kills + 1
            done = [file for file in out.glob("state/[a-z]*") if not file.name.endswith(".jsonl")]
            at.append(max(done, key=lambda file: file.stat().st_mtime, default=Path("nothing")).name)
        if (out / "state").exists():  # killed between its last two acts: the next call says that it has ended
            os.waitpid(fork(["--resume_from_checkpoint", str(out)], log), 0)
        if results(out) != whole:
            wrong = [name for name in whole.keys() | results(out).keys() if whole.get(name) != results(out).get(name)]
            sys.exit(f"{log.read_text()}\nrun {number} ends otherwise, in {', '.join(wrong)}")
        bar.update(killed > 0)
    bar.close()
    key = re.compile(r"-[0-9a-f]{12}")
    places = sorted({key.sub("", Path(place).stem) for place in at})
    print(f"{arguments.runs} runs, {kills} kills, {arguments.runs} identical ends; the last thing done before a kill:",
          ", ".join(places))  # fmt: skip


if __name__ == "__main__":
    main()
