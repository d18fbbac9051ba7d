"""Launches whose ranks were not given the same, in the same processes:  python -m tests.training.ranks_apart CASES.json

CASES.json: for each case, for each rank, {"words": arguments of `mimscale train`, "folder": where that rank stands,
"package": a version that it seems to have}. Each rank writes CASES.json.RANK: the exit code and what was printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from mimscale.__main__ import main
from mimscale.checkpoint import run_folder
from mimscale.distributed.end_process import end_process

if __name__ == "__main__":
    rank, outcomes = int(os.environ["RANK"]), []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        mine = case[rank]
        os.makedirs(mine["folder"], exist_ok=True)
        os.chdir(mine["folder"])
        real = run_folder._version
        changed = mine.get("package")
        run_folder._version = lambda package: changed if changed and package == "timm" else real(package)  # noqa: B023
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            code = main(["train", *mine["words"]])
        run_folder._version = real
        outcomes.append({"code": code, "stderr": printed.getvalue()})
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(outcomes))
    end_process(0)
