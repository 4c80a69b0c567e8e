"""Engines side by side: ours against whichever peers are installed, on the same weights, prompts and threads.

    python -m benchmarks.bench --models DIR [--engines ours,llama.cpp:Q4_0] [--workloads decode,serve_8] [--quick]

Engines take turns, one at a time; each repeat starts every one anew, so that a machine whose speed drifts drifts for
all. Each finished measurement is appended to a file of JSON lines: --resume FILE goes on where an interrupted run
stopped, --report-only FILE renders what is there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import engines as known
from benchmarks import growth, machine, report
from benchmarks.prompts import Prompts
from benchmarks.records import Journal, Results, read
from benchmarks.running import measure, started
from benchmarks.workloads import WARM_UP, WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.engines import Engine, Setup
    from benchmarks.running import InProcess, Server

HERE = Path(__file__).parent
SCRATCH = HERE.parent / "build" / "bench"


class Bench:
    """One run: what is to be measured, and what has been."""

    def __init__(self, args: argparse.Namespace, engines: list[Engine], prompts: Prompts, journal: Journal) -> None:
        self._args = args
        self._engines = [engine for engine in engines if not engine.missing]
        self._journal = journal
        self._log_folder = journal.path.parent / "logs"
        self._log_folder.mkdir(exist_ok=True)
        self._prompts = prompts

    def run(self) -> None:
        """All that is not in the journal yet."""
        for repeat in range(self._args.repeats):
            for engine in self._engines:
                for setup in engine.setups:
                    self._measure_setup(engine, setup, repeat)
        self._measure_growth()

    def _measure_setup(self, engine: Engine, setup: Setup, repeat: int) -> None:
        names = [name for name in (setup.start, *setup.workloads) if name in self._args.workloads]
        key = {"engine": engine.name, "setup": setup.name, "repeat": repeat}
        todo = [name for name in names if not self._journal.has("measurement", workload=name, **key)]
        if not todo:
            return
        what = f"repeat {repeat + 1} of {self._args.repeats}: {engine.name} {setup.name}".rstrip()
        _read_files(engine)
        try:
            with started(setup, self._log(engine)) as (running, start):
                _say(f"{what}: first token after {start['first_token_s']:.2f} s")
                if setup.start in todo:
                    self._journal.add("measurement", workload=setup.start, **key, figures=start)
                measure(running, WARM_UP, self._prompts, "warm-up")
                for name in todo:
                    if name != setup.start:
                        self._measure_workload(running, name, key, what)
                    running.child.check()
        except Exception as error:  # whatever befalls a peer, the others are measured all the same
            self._fail(error, what, **key)

    def _measure_workload(self, running: Server | InProcess, name: str, key: dict[str, Any], what: str) -> None:
        workload = WORKLOADS[name].quick() if self._args.quick else WORKLOADS[name]
        try:
            figures = measure(running, workload, self._prompts, str(key["repeat"]))
        except Exception as error:
            self._fail(error, f"{what}: {name}", workload=name, **key)
        else:
            self._journal.add("measurement", workload=name, **key, figures=figures)
            _say(f"{what}: {name}: {report.brief(name, figures)}")

    def _fail(self, error: Exception, what: str, **key: Any) -> None:
        while isinstance(error, ExceptionGroup) and isinstance(error.exceptions[0], Exception):
            error = error.exceptions[0]
        why = f"{type(error).__name__}: {error}"[:500]
        self._journal.add("failure", why=why, **key)
        _say(f"{what}: FAILED: {why}")

    def _measure_growth(self) -> None:
        engine = growth.subject(self._engines)
        for name, study in growth.STUDIES.items():
            if engine is None or name not in self._args.workloads or self._journal.has("growth", study=name):
                continue
            _say(f"growth: {name}")
            try:
                rows = study(engine, self._prompts, self._log(engine), self._args.quick)
                self._journal.add("growth", study=name, engine=engine.name, rows=rows)
            except Exception as error:
                self._fail(error, f"growth: {name}", engine=engine.name, setup=name)

    def _log(self, engine: Engine) -> Path:
        return self._log_folder / (engine.name.replace(":", "-") + ".log")


def _read_files(engine: Engine) -> None:
    """Into the page cache, so that the first start finds its files as the later ones do."""
    for file in [engine.model] if engine.model.is_file() else sorted(engine.model.iterdir()):
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass


def _say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    everything = ["start", "load", *WORKLOADS, *growth.STUDIES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=f"{__doc__}\n{known.__doc__}\nWorkloads: {', '.join(everything)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", type=Path, default=os.environ.get("BENCH_MODELS", HERE / "models"), help="the models' folder")
    add("--engines", default="", metavar="NAMES", help="families or engines, such as ours,llama.cpp:Q4_0; default: all")
    add("--workloads", default="", metavar="NAMES", help="default: all that are of the device")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="what all engines run on")
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine; default: one per core")
    add("--quick", action="store_true", help="one repeat with few, short requests: whether all works, not how fast")
    add("--out", type=Path, help="where measurements go; default: a new file in build/bench/")
    add("--resume", type=Path, metavar="FILE", help="go on with an interrupted run, started with the same options")
    add("--report-only", type=Path, metavar="FILE", help="measure nothing, render what an earlier run measured")
    add("--results", type=Path, metavar="DIR", help="for RESULTS.md and serving.png; default: that of this file (its "
        "cuda/ for --device cuda), or of the measurements if --quick")  # fmt: skip
    args = parser.parse_args(argv)
    of_device = [name for name in everything if args.device == "cpu" or name not in growth.STUDIES]
    args.workloads = [name.strip() for name in args.workloads.split(",") if name.strip()] or of_device
    if unknown := sorted({*args.workloads} - {*everything}):
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(everything)}")
    if args.quick:
        args.repeats = 1
    return args


def run(args: argparse.Namespace, path: Path) -> None:
    """Measure into the file. Raises ValueError where there is nothing to measure, or nothing to measure it on."""
    if args.device == "cuda" and (problem := machine.gpu_problem()):
        raise ValueError(f"--device cuda: {problem}")
    found = known.find_engines(args.models, args.threads, args.device)
    engines = known.select(found, args.engines)
    for engine in engines:
        _say(f"{engine.name}: {engine.missing or 'found'}")
    if all(engine.missing for engine in engines):
        raise ValueError("nothing to measure")
    prompts = Prompts.of_model(str(known.readable_model(found)))
    journal = Journal(path)
    _say(f"measurements go to {path}")
    journal.add(
        "machine", date=f"{datetime.now():%Y-%m-%d}", quick=args.quick, **machine.describe(args.threads, args.device)
    )
    for engine in engines:
        commands = {setup.name: setup.shown() for setup in engine.setups}
        described = {} if engine.missing else {"version": engine.version(), "model_bytes": engine.model_bytes}
        journal.add("engine", engine=engine.name, missing=engine.missing, commands=commands, **described)
    begin = time.monotonic()
    Bench(args, engines, prompts, journal).run()
    _say(f"measured for {(time.monotonic() - begin) / 60:.1f} minutes")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; the exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are stopped
    path = args.report_only or args.resume or args.out or SCRATCH / f"{datetime.now():%Y-%m-%dT%H-%M-%S}.jsonl"
    try:
        if not args.report_only:
            run(args, path)
    except KeyboardInterrupt:
        _say(f"interrupted; go on with --resume {path}")
        return 130
    except ValueError as error:
        _say(str(error))
        return 2
    home = HERE / "cuda" if args.device == "cuda" else HERE
    folder = args.results or (path.parent if args.quick else home)
    print(report.write(Results(read(path)), folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
