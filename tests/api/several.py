"""Several commands one after another in the same processes:  torchrun -m tests.api.several COMMANDS.json

COMMANDS.json: a list of argument lists of `mimscale`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mimscale.__main__ import main
from mimscale.distributed import world
from mimscale.distributed.end_process import end_process

if __name__ == "__main__":
    close_process_group = world.close_process_group
    world.close_process_group = lambda: None  # DeepSpeed keeps the first group, so all runs share it
    code = max(main(words) for words in json.loads(Path(sys.argv[1]).read_text()))
    close_process_group()
    end_process(code)
