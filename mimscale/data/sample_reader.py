"""Sample id -> image, with retries, and with a substitute for a sample that cannot be used."""

from __future__ import annotations

import time
from contextlib import suppress
from math import inf

from mimscale.data import noise
from mimscale.data.decode import AnyImage, BadImage, Decoder, Wanted
from mimscale.data.manifest import Ints
from mimscale.data.mixture import Indexed
from mimscale.errors import Stopped
from mimscale.types import Damage

RETRY_PAUSES_S = (0.1, 1.0)  # between the tries to read one sample: errors of shared file systems are often temporary
NO_RETRY_S = 60.0  # for this long after a failed read, reads of the same shard are not retried
SUBSTITUTES = 32


class DamagedSample(Stopped):
    """A sample that cannot be read or decoded after several tries; the message names its shard and key."""


class SampleReader:
    """Reads and decodes samples. Remembers damaged ones, so that each costs its retries once per process.

    They are still tried again: less than the whole image may be wanted, and what is made of a sample must not depend on
    what this process has met before.
    """

    def __init__(self, manifest: Indexed, decode: Decoder):
        self.manifest, self.decode = manifest, decode
        self._damaged: set[int] = set()
        self._failed_at_s: dict[int, float] = {}  # shard -> time of its last read error

    def load(self, sample: int) -> AnyImage:
        """Raises DamagedSample."""
        result = self._try_load(sample)
        if isinstance(result, Damage):
            raise self._error(result)
        return result

    def load_or_substitute(
        self, sample: int, seed: int, epoch: int, index: int, *, wanted: Wanted | None = None
    ) -> tuple[int, AnyImage, list[Damage]]:
        """(id of the sample that is used, its image, the samples that could not be used).

        Substitutes are drawn from the whole data set, keyed by (seed, epoch, index in the epoch): the same for any
        number of ranks and workers. wanted: see decode.Decoder. Raises DamagedSample if all of them are damaged too.
        """
        found: list[Damage] = []
        result = self._try_load(sample, wanted)
        if isinstance(result, Damage):
            for candidate in substitutes(self.manifest.samples, seed, epoch, index).tolist():
                found.append(result)
                sample, result = candidate, self._try_load(candidate, wanted)
                if not isinstance(result, Damage):
                    break
            else:
                raise self._error(found[0])
        return sample, result, found

    def _try_load(self, sample: int, wanted: Wanted | None = None) -> AnyImage | Damage:
        """After a failure the shard is opened again for the next try."""
        shard = self.manifest.shard_of(sample)
        retry = not self._failed_at_s or time.monotonic() - self._failed_at_s.get(shard, -inf) > NO_RETRY_S
        retry = retry and sample not in self._damaged
        for pause_s in RETRY_PAUSES_S if retry else ():
            with suppress(OSError, BadImage):
                return self.decode(self.manifest.read(sample), wanted)
            self.manifest.reopen(sample)
            time.sleep(pause_s)
        try:
            return self.decode(self.manifest.read(sample), wanted)
        except (OSError, BadImage) as error:
            damage = Damage(sample, self.manifest.shards[shard].name, self._key(sample), str(error))
            if isinstance(error, OSError):
                self._failed_at_s[shard] = time.monotonic()
            else:
                self._damaged.add(sample)
            return damage

    def _key(self, sample: int) -> str:
        try:
            return self.manifest.key(sample)
        except Exception:  # the header itself may be damaged
            return "unreadable"

    def _error(self, damage: Damage) -> DamagedSample:
        folder = self.manifest.location
        return DamagedSample(
            f"sample {damage.sample} (key '{damage.key}') of shard '{folder}/{damage.shard}' cannot be used: "
            f"{damage.reason}; `python -m data_prep verify {folder} --decode` lists all damage"
        )


def substitutes(samples: int, seed: int, epoch: int, index: int) -> Ints:
    """int64 [SUBSTITUTES]: sample ids to try, in this order, if the sample at this index of the epoch is damaged."""
    return (noise.raw(seed, "substitute", epoch, index, n=SUBSTITUTES) % samples).astype(int)
