"""Mutation testing: would the tests see that the method is no longer what it says? Each mutant is one change of its
meaning, made in a copy of the tree, where the tests run until the first fails. A mutant that no test sees survives.

    python experiments/mutants.py                              all of mutants.txt, two at a time: an hour or so
    python experiments/mutants.py --only "seed" "token floor"  those whose name holds one of these

First the unchanged copy must pass. At the end: a Markdown table, and exit status 1 if a mutant survives.
mutants.txt lists the changes below the file that they are made in; a text may have several lines:

    == file
    # what is wrong, in plain English
    - a text that the file holds exactly once
    + what stands there instead
"""

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    f"tests/{name}.py"
    for name in ("method/test_oracle", "method/test_drawn", "machinery/test_reported", "machinery/test_run")
]
AT_ONCE = 2
TIME_LIMIT = 300  # seconds, or three times what the unchanged copy takes


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """The file's text with the change. Raises ValueError where it does not apply."""
        times = text.count(self.old)
        if times != 1:
            raise ValueError(f"{self.name}: its text is {times} times in {self.file}")
        return text.replace(self.old, self.new)

    def tests(self, copy: Path) -> list[str]:
        """The test files that should see it: its own file's first, test_run.py, which takes longest, last."""
        names = list(TESTS)
        for own in sorted(copy.glob(f"tests/*/test_{Path(self.file).stem}.py")):
            name = str(own.relative_to(copy))
            if name not in names:
                names.insert(0, name)
        return [name for name in names if (copy / name).exists()]


def read_mutants() -> list[Mutant]:
    entries, file = [], ""
    for line in (ROOT / "experiments/mutants.txt").read_text(encoding="utf-8").splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "==":
            file = rest
        elif mark == "#":
            entries.append({"name": rest, "file": file, "-": [], "+": []})
        elif line:
            entries[-1][mark].append(rest)
    return [Mutant(e["name"], e["file"], "\n".join(e["-"]), "\n".join(e["+"])) for e in entries]


def copy_tree(to: Path) -> Path:
    """The tree as it is now, uncommitted changes and new files included, without what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def run_tests(copy: Path, tests: list[str], limit: float) -> tuple[str, float, str]:
    """What failed first in the copy ("" where all passed), the seconds it took, and what pytest printed."""
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={copy}-tmp"]
    # The copy's modules, not the installed ones; and no .pyc, which could be of the file before it was changed
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=copy, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
        os.killpg(process.pid, signal.SIGKILL)  # and whatever its tests have started
        process.communicate()
        if isinstance(stop, KeyboardInterrupt):
            raise
        return "the time limit", limit, ""
    status = f"pytest's exit status {process.returncode}" if process.returncode else ""
    failed = re.search("^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", printed, re.MULTILINE)
    if status and failed:
        status = failed[1]
    no_name = re.search("^E +((?:Attribute|Import|Name|UnboundLocal)Error)", printed, re.MULTILINE)
    if status and no_name:  # it may be no mutant, but a text that names what is not there
        status += f" ({no_name[1]})"
    return status, time.monotonic() - began, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="those whose name holds one of these")
    words = parser.parse_args().only
    mutants = [mutant for mutant in read_mutants() if not words or any(w in mutant.name for w in words)]
    for mutant in mutants:
        mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))  # an error now, not in an hour
    if not mutants:
        sys.exit("no mutant's name holds that")

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for i in range(AT_ONCE):
            copies.put(copy_tree(Path(folder).resolve() / f"copy-{i}"))
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests(copies.queue[0])))
        print(f"{len(mutants)} mutants; the unchanged copy first: {', '.join(tests)}", flush=True)
        failed, seconds, printed = run_tests(copies.queue[0], tests, limit=3600)
        if failed:
            sys.exit(f"{printed}\nthe unchanged copy fails: {failed}")
        limit = max(TIME_LIMIT, 3 * seconds)

        def run_mutant(mutant: Mutant) -> tuple[str, float]:
            copy = copies.get()
            file = copy / mutant.file
            unchanged = file.read_text(encoding="utf-8")
            try:
                file.write_text(mutant.applied(unchanged), encoding="utf-8")
                killer, seconds, _ = run_tests(copy, mutant.tests(copy), limit)
                bar.update()
                tqdm.write(f"{killer or 'SURVIVES'} <- {mutant.name}")
                return killer, seconds
            finally:
                file.write_text(unchanged, encoding="utf-8")
                copies.put(copy)

        with ThreadPoolExecutor(AT_ONCE) as pool, tqdm(total=len(mutants), desc="mutants", unit="mutant") as bar:
            outcomes = list(pool.map(run_mutant, mutants))

    print("\n| mutant | killed by | seconds |\n|---|---|---:|")
    for mutant, (killer, seconds) in zip(mutants, outcomes):
        print(f"| {mutant.name} | {killer or '**nothing**'} | {seconds:.0f} |")
    survivors = [mutant.name for mutant, (killer, _) in zip(mutants, outcomes) if not killer]
    print(f"\n{len(survivors)} of {len(mutants)} mutants survive", *survivors, sep="\n- ")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
