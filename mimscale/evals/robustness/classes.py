"""Which outputs of a classifier stand for the classes of another data set: by the names in the manifests alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimscale.data.names import one_line
from mimscale.errors import UserError

BY_NAME, BY_INDEX = "by name", "by index"


def outputs_of(names: Sequence[str], outputs: Sequence[str], where: str) -> tuple[Tensor, str]:
    """(int64 [len(names)]: the output of each class; how they were matched). where: the data set, for the message.

    names: of the data set's classes, in label order. outputs: names of the classes that the classifier was trained on.
    The names match as they are (wnids: ImageNet-A, -R, -Sketch, -C); where all are whole numbers and the classifier's
    are not, they are indices (the folders of ImageNet-V2 are called 0 to 999). Raises UserError for a class that the
    classifier lacks.
    """
    at = {name: number for number, name in enumerate(outputs)}
    missing = [name for name in names if name not in at]
    if not missing:
        return torch.tensor([at[name] for name in names]), BY_NAME
    if all(name.isdecimal() for name in names) and not all(name.isdecimal() for name in outputs):
        indices = [int(name) for name in names]
        if max(indices) < len(outputs) and len(set(indices)) == len(indices):
            return torch.tensor(indices), BY_INDEX
    raise UserError(
        f"{where}: {len(missing):,} of {len(names):,} classes are not among the {len(outputs):,} of the classifier, "
        f"the first is '{one_line(missing[0])}' (it has '{one_line(outputs[0])}'); name the class folders alike, for "
        f"ImageNet by wnid"
    )


def predicted(logits_BC: Tensor, outputs_K: Tensor) -> Tensor:
    """int64 [B]: the best of the outputs that stand for the data set's classes, as one of its labels 0 .. K - 1.

    Outputs of other classes do not count, as in the evaluation of ImageNet-A and -R (Hendrycks et al.): a classifier of
    1,000 classes is asked for the best of their 200.
    """
    return logits_BC.index_select(1, outputs_K.to(logits_BC.device)).argmax(dim=1)
