"""Sample id -> picture, with retries, and what stands in for a sample that cannot be used."""

from __future__ import annotations

import time
from contextlib import suppress
from math import inf

from mimscale.data import noise
from mimscale.data.decode import AnyPicture, BadImage, Decoder
from mimscale.data.manifest import Ints, Manifest
from mimscale.errors import Stopped
from mimscale.types import Damage

PAUSES_S = (0.1, 1.0)  # between the tries to read one sample: shared file systems hiccup
FORGET_S = 60.0  # so long a shard that could not be read is not waited for again
SUBSTITUTES = 32


class DamagedSample(Stopped):
    """A sample that cannot be read or decoded after several tries; the line names its shard and key."""


class Reader:
    """Reads and decodes samples. Remembers what is damaged, so that it costs its retries once per process."""

    def __init__(self, manifest: Manifest, decode: Decoder):
        self.manifest, self.decode = manifest, decode
        self._damaged: dict[int, Damage] = {}
        self._down_s: dict[int, float] = {}

    def load(self, sample: int) -> AnyPicture:
        """Raises DamagedSample."""
        got = self._attempt(sample)
        if isinstance(got, Damage):
            raise self._error(got)
        return got

    def load_or_substitute(
        self, sample: int, seed: int, epoch: int, place: int
    ) -> tuple[int, AnyPicture, list[Damage]]:
        """The sample that is used, its picture, and what could not be used instead.

        The substitutes are drawn by (seed, epoch, place) from the whole data set: the same for any ranks and workers.
        Raises DamagedSample where all of them are damaged too.
        """
        found: list[Damage] = []
        got = self._attempt(sample)
        if isinstance(got, Damage):
            for candidate in substitutes(self.manifest.samples, seed, epoch, place).tolist():
                found.append(got)
                sample, got = candidate, self._attempt(candidate)
                if not isinstance(got, Damage):
                    break
            else:
                raise self._error(found[0])
        return sample, got, found

    def _attempt(self, sample: int) -> AnyPicture | Damage:
        """A failure is tried again from a freshly opened file."""
        if sample in self._damaged:
            return self._damaged[sample]
        shard = self.manifest.shard_of(sample)
        patient = not self._down_s or time.monotonic() - self._down_s.get(shard, -inf) > FORGET_S
        for pause_s in PAUSES_S if patient else ():
            with suppress(OSError, BadImage):
                return self.decode(self.manifest.read(sample))
            self.manifest.distrust(sample)
            time.sleep(pause_s)
        try:
            return self.decode(self.manifest.read(sample))
        except (OSError, BadImage) as error:
            damage = Damage(sample, self.manifest.file.shards[shard].name, self._key(sample), str(error))
            if isinstance(error, OSError):
                self._down_s[shard] = time.monotonic()
            else:
                self._damaged[sample] = damage
            return damage

    def _key(self, sample: int) -> str:
        try:
            return self.manifest.key(sample)
        except Exception:  # the header may be what is damaged
            return "unreadable"

    def _error(self, damage: Damage) -> DamagedSample:
        folder = self.manifest.place
        return DamagedSample(
            f"sample {damage.sample} (key '{damage.key}') of shard '{folder}/{damage.shard}' cannot be used: "
            f"{damage.reason}; `python -m data_prep verify {folder} --decode` lists all damage"
        )


def substitutes(samples: int, seed: int, epoch: int, place: int) -> Ints:
    """int64 [SUBSTITUTES] sample ids to try, in this order, where the sample of this place cannot be used."""
    return (noise.raw(seed, "substitute", epoch, place, n=SUBSTITUTES) % samples).astype(int)
