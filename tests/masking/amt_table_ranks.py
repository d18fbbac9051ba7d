"""Run on several ranks: the split table reads and writes the same as one table."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from mimscale.masking._amt_table import ImportanceTable

SAMPLES, WIDTH, BATCH = 23, 3, 6


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    table, whole = ImportanceTable(SAMPLES, WIDTH, 7, torch.device("cpu")), np.full(SAMPLES, 7)
    random = np.random.default_rng(0)  # the same on every rank, so that each knows what all do
    for step in range(20):
        everyone = random.integers(0, SAMPLES, (world, BATCH))
        if step % 5 == 0:
            everyone[:] = SAMPLES - 1  # one rank is asked for everything, the others for nothing
        assert (table.gather(everyone[rank]) == everyone).all()
        read = table.read(everyone)
        assert read.shape == (BATCH, WIDTH) and read[:, 1].tolist() == whole[everyone[rank]].tolist()
        counts = random.integers(0, BATCH, world)
        ids = [random.integers(0, SAMPLES, count) for count in counts]
        order = random.permutation(int(counts.sum()))
        places = np.split(order, np.cumsum(counts)[:-1])
        values, valid = random.integers(0, 255, len(order)), random.random(len(order)) < 0.8
        rows = torch.from_numpy(values[places[rank]].astype(np.uint8))[:, None].expand(-1, WIDTH)
        table.write(ids, places, rows, torch.from_numpy(valid[places[rank]]))
        latest: dict[int, int] = {}
        for sample, place in zip(np.concatenate(ids), order, strict=True):
            latest[sample] = max(place, latest.get(sample, -1))
        for sample, place in latest.items():
            whole[sample] = values[place] if valid[place] else whole[sample]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
