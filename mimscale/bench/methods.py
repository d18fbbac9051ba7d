"""Every method against its base and its controls on real images (Fashion-MNIST): five measures, several seeds."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mimscale.files.command_line import print_json, stdout_kept, tables_json

if TYPE_CHECKING:
    from mimscale.bench._methods_rows import Preset

PLACES = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))
Cell = tuple[str, int]  # row, seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mimscale.bench._methods_rows import PRESETS, ROWS

    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="sizes (default cpu; gpu: one H100)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="IDX files of Fashion-MNIST (default: Debian's place)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default runs/methods-PRESET; continued if it is there")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: the preset's)")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time (default: the preset's)")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no cell after this time (default: preset's)")
    parser.add_argument("--forecast", action="store_true", help="measure step times, print the forecast, run nothing")
    parser.add_argument("--table", action="store_true", help="print the table of the finished cells, run nothing")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where a cell failed; its row is in the table all the same."""
    from mimscale.bench._methods_data import find_source, prepare
    from mimscale.bench._methods_report import publish
    from mimscale.bench._methods_rows import PRESETS, ROWS
    from mimscale.bench._report import table as markdown

    preset = PRESETS[args.preset]
    out = (args.out or Path("runs") / f"methods-{args.preset}").resolve()
    _check_preset(out, preset)
    rows, seeds = args.rows or list(ROWS), args.seeds or preset.seeds
    if args.table:
        publish(out, preset, args.json)
        return 0
    _check_device(preset)
    cells = [(row, seed) for seed in range(seeds) for row in rows]  # a whole table of one seed first
    jobs, minutes = args.jobs or preset.jobs, args.minutes or preset.minutes
    with stdout_kept(args.json):
        prepare(out, find_source(args.data, PLACES), preset)
        table, line = _forecast(out, preset, cells, jobs, minutes)
        if not (args.json and args.forecast):
            print("\n\n".join([*(markdown(*one) for one in table), line]), flush=True)
        failed = [] if args.forecast else run_cells(out, cells, jobs, minutes)
    if args.forecast:
        if args.json:
            print_json({"bench": args.bench, "tables": tables_json(("", *one) for one in table), "notes": [line]})
        return 0
    publish(out, preset, args.json)
    for row, seed in failed:
        print(f"failed: {row}, seed {seed}; see {_log(out, row, seed)}", file=sys.stderr)
    return 1 if failed else 0


def _check_preset(out: Path, preset: Preset) -> None:
    """Cells of other sizes are not mixed. Raises UserError."""
    from mimscale.errors import UserError
    from mimscale.files.atomic import atomic_write

    path, text = out / "preset.json", json.dumps(asdict(preset), indent=1) + "\n"
    if path.is_file() and path.read_text() != text:
        raise UserError(f"{out} holds cells of other sizes (see its preset.json); give another folder with --out")
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text.encode())


def _check_device(preset: Preset) -> None:
    import torch

    from mimscale.errors import UserError

    if preset.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--preset {preset.name} needs a GPU and torch sees none here; use --preset cpu")


def _forecast(
    out: Path, preset: Preset, cells: list[Cell], jobs: int, minutes: float
) -> tuple[list[tuple[list[str], list[list[str]]]], str]:
    """(the table, where anything is left to run; a line that sums it up)."""
    from mimscale.bench._methods_forecast import forecast

    left = [cell for cell in cells if not _done(out, *cell)]
    if not left:
        return [], "every cell is finished"
    lines, total_s = forecast(out, preset, left, jobs)
    ends = "" if total_s / 60 <= minutes else f"; cells that would start after {minutes:g} min are left for later"
    words = f"forecast: {len(left)} cells in {total_s / 60:.0f} min with {jobs} at a time on idle cores{ends}"
    return [(["row", "cells left", "ms per step", "s per cell"], lines)], words


def run_cells(out: Path, cells: list[Cell], jobs: int, minutes: float) -> list[Cell]:
    """Run what is not finished, each in its own process; returns those that failed.

    The processes are forked from one that has imported everything, which would take each of them ten seconds.
    """
    end_s = time.monotonic() + 60 * minutes
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["mimscale.bench._methods_cell"])

    def one(cell: Cell) -> bool:
        if _done(out, *cell):
            return True
        if time.monotonic() > end_s:
            print(f"not started: {cell[0]}, seed {cell[1]} (--minutes {minutes:g})", flush=True)
            return True
        start_s = time.monotonic()
        process = server.Process(target=_cell, args=(out, *cell), daemon=True)  # ends with this one
        process.start()
        process.join()
        word = "done" if not process.exitcode else f"FAILED (exit code {process.exitcode})"
        print(f"{word} {time.monotonic() - start_s:6.0f} s  {cell[0]}, seed {cell[1]}", flush=True)
        return process.exitcode == 0

    with ThreadPoolExecutor(jobs) as pool:
        try:
            ended = list(pool.map(one, cells))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return [cell for cell, well in zip(cells, ended, strict=True) if not well]


def _cell(out: Path, row: str, seed: int) -> None:
    """In a process of its own, whose output goes to the cell's log."""
    from mimscale.bench._methods_cell import write_cell
    from mimscale.distributed.end_process import end_process

    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with(caller: multiprocessing.process.BaseProcess) -> None:
        caller.join()
        os._exit(1)

    threading.Thread(target=end_with, args=(parent,), daemon=True).start()  # a killed call leaves nothing
    log = _log(out, row, seed)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        write_cell(out, row, seed)
    except BaseException:
        traceback.print_exc()
        end_process(1)
    end_process(0)


def _done(out: Path, row: str, seed: int) -> bool:
    return (out / "cells" / row / f"seed-{seed}.json").is_file()


def _log(out: Path, row: str, seed: int) -> Path:
    return out / "logs" / f"{row}-{seed}.log"
