"""Compare distillation strategies on the demo's student: equal budget, paired over seeds.

For each seed the demo's teacher is trained, and from one common start the demo's student, in
float: without distillation, and with every strategy. The setting of a strategy (examples/
distillation_strategies.py) is the one of its grid with the best validation accuracy of seed 0; the
epoch is the best on validation images as well, for the control too. The test images are used once,
with what was chosen.

    make distillation-study WORKERS=8

Finished runs are skipped, also after an interruption; whatever is complete then is in the summary.
Results: runs/distillation-study/summary.json (every run), summary.md and summary.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import distill_and_quantize as demo
import distillation_runs as runs
import distillation_summary
import distillation_teachers as teachers
from compression_manager import CompressionError
from distillation_runs import Run
from distillation_strategies import BY_NAME, CONTROL, SLOWEST, STRATEGIES
from distillation_teachers import Setup
from study_statistics import check_same_settings

Results = dict[Run, float]  # finished runs -> best validation accuracy


def chosen_point(name: str, results: Results) -> int | None:
    """Return the index of a strategy's best setting on seed 0, or None while runs are missing."""
    strategy = BY_NAME[name]
    grid = [Run(name, point, 0) for point in range(len(strategy.grid))]
    if strategy.like:
        return chosen_point(strategy.like, results)
    if any(run not in results for run in grid):
        return None
    return max(grid, key=lambda run: results[run]).point


def wanted(names: Sequence[str], seeds: int, results: Results) -> list[Run]:
    """Return the runs that can be started now, finished ones included, and will be needed."""
    found: list[Run] = []
    for name in names:
        strategy = BY_NAME[name]
        found += [Run(name, point, 0) for point in range(len(strategy.grid))]
        point = chosen_point(name, results)
        if point is not None:
            found += [Run(name, point, seed) for seed in range(1 - bool(strategy.like), seeds)]
    return found


def count_runs(names: Sequence[str], seeds: int) -> int:
    """Return how many students the whole study trains."""
    return sum(len(BY_NAME[name].grid) or 1 for name in names) + len(names) * (seeds - 1)


def finished_runs(setup: Setup, candidates: Sequence[Run]) -> Results:
    """Return those of the runs whose result lies in the folder."""
    return {
        run: json.loads(run.path(setup).read_text())["best_validation"]
        for run in candidates
        if run.path(setup).exists()
    }


def train_students(
    pool: ProcessPoolExecutor, setup: Setup, names: Sequence[str], seeds: int
) -> None:
    """Train what is missing, on all workers; a strategy's further seeds follow its choice."""
    results: Results = {}
    running: dict[Future[None], Run] = {}
    with tqdm(total=count_runs(names, seeds), desc="students", unit="run", smoothing=0) as bar:
        while True:
            possible = wanted(names, seeds, results)
            under_way = {*results, *running.values()}
            waiting = [run for run in possible if run not in under_way]
            waiting.sort(key=lambda run: run.strategy != SLOWEST)
            finished = finished_runs(setup, waiting)
            if finished:
                bar.total -= len(finished)  # the estimate is for what is left
                results |= finished
                continue
            for run in waiting:
                running[submit(pool, runs.train_student, setup, run)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                future.result()
                results |= finished_runs(setup, [run])
                bar.set_postfix_str(run.strategy, refresh=False)
                bar.update()


def prepare_teachers(
    pool: ProcessPoolExecutor,
    setup: Setup,
    names: Sequence[str],
    seeds: Sequence[int],
    workers: int,
) -> None:
    """Train the teachers at the same time, and record what they say; finished ones are skipped."""
    sources = {BY_NAME[name].source for name in names}
    forms = sorted(sources & set(teachers.FORMS))
    others = (0, teachers.SECOND_TEACHER) if "ensemble" in forms else (0,)
    members = [seed + other for other in others for seed in seeds]
    untrained = [seed for seed in members if not teachers.is_trained(setup, seed)]
    threads = max(1, workers // max(1, len(untrained)))
    for future in [
        submit(pool, teachers.train_teacher, setup, seed, threads) for seed in untrained
    ]:
        future.result()
    if sources <= {"itself", "nobody"}:
        return
    unrecorded = [seed for seed in seeds if not teachers.is_recorded(setup, seed, forms)]
    for future in [
        submit(pool, teachers.record_teacher, setup, seed, forms) for seed in unrecorded
    ]:
        future.result()


def estimate(setup: Setup, count: int, workers: int) -> str:
    """Return in words how long the students take, by the time of a few steps."""
    images = teachers.variants(setup)[: demo.STUDENT_TRAINING.batch_size]
    labels = torch.zeros(len(images), dtype=torch.long)
    student = runs.untrained_student(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for repeats in (2, 10):  # the first ones warm up
        started = time.process_time()
        for _ in range(repeats):
            F.cross_entropy(student(images), labels).backward()
    step = (time.process_time() - started) / repeats
    torch.set_num_threads(threads)
    steps = setup.student_epochs * (
        len(teachers.load(setup.images_per_class).train) // demo.STUDENT_TRAINING.batch_size
    )
    seconds = DISTILLATION_FACTOR * step * steps
    return (
        f"{count} students of {steps} steps, about {seconds:.0f} s of processor time each: about "
        f"{seconds * count / workers / 60:.1f} minutes on {workers} free cores"
    )


# Of a whole step to the student's forward and backward pass, as measured over all strategies.
DISTILLATION_FACTOR = 1.4


def _prepare_worker() -> None:
    """Compute with one thread, and say nothing that the run next to it would say too."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def submit(pool: ProcessPoolExecutor, task: Callable[..., None], *arguments: Any) -> Future[None]:
    """Submit a task; a process that is started for it inherits that Ctrl-C is blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(task, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes end at once when the block is left by an exception."""
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_prepare_worker
    )
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def run_study(setup: Setup, names: Sequence[str], seeds: int, workers: int) -> None:
    """Train teachers and students."""
    with worker_pool(workers) as pool:
        prepare_teachers(pool, setup, names, range(seeds), workers)
        train_students(pool, setup, names, seeds)


def write_summary(setup: Setup, names: Sequence[str], seeds: int, settings: Any) -> str:
    """Test what was chosen, once; write the summary of all strategies that are complete."""
    candidates = [
        Run(name, point, seed)
        for name in names
        for point in range(len(BY_NAME[BY_NAME[name].like or name].grid))
        for seed in range(seeds)
    ]
    results = finished_runs(setup, candidates)
    tested = {}
    for name in names:
        point = chosen_point(name, results)
        chosen = [Run(name, -1 if point is None else point, seed) for seed in range(seeds)]
        if all(run in results for run in chosen):
            tested[name] = [runs.test_student(setup, run) for run in chosen]
    if CONTROL not in tested:
        return "nothing to compare yet: the control is not finished"
    accuracies = [
        json.loads((teachers.teacher_folder(setup, seed) / "result.json").read_text())["accuracy"]
        for seed in range(seeds)
    ]
    every_run = [json.loads(run.path(setup).read_text()) for run in results]
    summary = distillation_summary.summarize(tested, accuracies, every_run, settings)
    return distillation_summary.write(summary, setup.folder)


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 7))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=Path("runs/distillation-study"))
    parser.add_argument(
        "--student-shift",
        type=int,
        default=demo.STUDENT_TRAINING.shift,
        help="move the students' images by up to so many pixels at random, as the teacher's",
    )
    parser.add_argument("--student-epochs", type=int, default=demo.STUDENT_TRAINING.epochs)
    parser.add_argument("--teacher-epochs", type=int, default=demo.TEACHER_TRAINING.epochs)
    parser.add_argument("--images-per-class", type=int, help="of each split; to try things out")
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=list(BY_NAME),
        default=list(BY_NAME),
        metavar="NAME",
        help=f"some of {', '.join(BY_NAME)}; the control is always there",
    )
    options = parser.parse_args(arguments)

    setup = Setup(
        options.output,
        options.student_shift,
        options.student_epochs,
        options.teacher_epochs,
        options.images_per_class,
    )
    asked = {*options.strategies, CONTROL}
    asked |= {BY_NAME[name].like for name in asked} - {""}
    names = [strategy.name for strategy in STRATEGIES if strategy.name in asked]
    settings = {key: value for key, value in dataclasses.asdict(setup).items() if key != "folder"}
    options.output.mkdir(parents=True, exist_ok=True)
    check_same_settings(options.output / "settings.json", settings)
    print(estimate(setup, count_runs(names, options.seeds), options.workers), flush=True)
    stopped = ""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        run_study(setup, names, options.seeds, options.workers)
    except KeyboardInterrupt:
        stopped = "interrupted; the same command goes on where it stopped"
    finally:
        signal.signal(signal.SIGTERM, before)
    print(write_summary(setup, names, options.seeds, settings))
    if stopped:
        raise SystemExit(stopped)


if __name__ == "__main__":
    try:
        main()
    except CompressionError as error:
        raise SystemExit(f"error: {error}") from error
