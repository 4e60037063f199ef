"""A map of features: which samples lie near each other before the last layer, on a plane. It judges nothing.

Each model is drawn on the plane of its own: the two directions in which its features vary most (principal components).
On the original's directions a retrained model would be drawn along ones that mean nothing to it, for two trainings
share no axes. What that leaves free, turning and mirroring, is set so that the picture lies on the original's as nearly
as can be, and each is scaled to the same spread: which way an axis points, and how long it is, says nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.audits.core import Audit, AuditData, Context, Found, Subject
from expunge.errors import InputError
from expunge.metrics.uncertainty import of_values

EACH = 150  # samples of either side, drawn at random: what an eye can tell apart
DECIMALS = 2  # of a place: the spread is one, a figure some 300 pixels wide


def map_features(subject: Subject, data: AuditData, context: Context) -> Found:
    """Return the places of samples of forgotten and of retained classes on the plane of a model: see `FEATURE_MAP`.

    The plane is fitted on the samples that are drawn, as many of forgotten as of retained classes where there are.
    """
    parts = [data.part("test", forget=side, most=EACH, seed=context.seed) for side in (True, False)]

    def plane(model: Subject) -> tuple[Tensor, Tensor, Tensor]:
        found = [model.features(part) for part in parts]
        return *plane_of(torch.cat([one.values for one in found])), torch.cat([one.labels for one in found])

    places, kept, labels = plane(subject)
    if subject is not context.original:
        places = laid_on(places, plane(context.original)[0])
    rounded = (places * 10**DECIMALS).round().long()
    points: dict[str, dict[str, list[float]]] = {}
    for (x, y), label in zip(rounded.tolist(), labels.tolist(), strict=True):
        name = data.class_names[label] if data.class_names else str(label)
        held = points.setdefault(name, {"x": [], "y": []})
        held["x"].append(x / 10**DECIMALS)
        held["y"].append(y / 10**DECIMALS)
    return Found({"share of variance": of_values(kept)}, {"points": points})


def plane_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return places (N, 2) on the plane of the two directions of most variance, and what of the variance is there.

    Places are scaled to a root mean square of one over both axes. The share is one value a sample, (N,) float64, whose
    mean is the share of all variance that the plane holds, in [0, 1].

    Args:
        values: (N, D) features, one row a sample.

    Raises:
        InputError: they are NaN or infinite, or all the same.
    """
    features = values.double()
    if not bool(features.isfinite().all()):
        raise InputError("expected finite features, got NaN or infinite ones: the model makes those")
    centred = features - features.mean(0)
    total = centred.square().sum().item()
    if total <= 1e-12 * max(1.0, features.square().sum().item()):
        raise InputError("the features of all samples are the same: there is nothing to draw")
    count = min(2, *centred.shape)
    from sklearn.decomposition import PCA  # a second that only an audit shall take

    found = torch.from_numpy(PCA(count, svd_solver="full").fit_transform(centred.numpy()))
    places = torch.zeros((len(features), 2), dtype=torch.float64)
    places[:, :count] = found
    kept = places.square().sum(1) * len(features) / total
    return places / places.square().mean().sqrt(), kept


def laid_on(places: Tensor, reference: Tensor) -> Tensor:
    """Return places (N, 2), turned and mirrored so that they lie as near as can be to the reference's, row by row."""
    from scipy.linalg import orthogonal_procrustes

    turn, _ = orthogonal_procrustes(places.numpy(), reference.numpy())
    return places @ torch.from_numpy(turn)


FEATURE_MAP = Audit(
    name="feature_map",
    says="Where held-out samples lie before the last layer, on the plane of the two directions in which the features "
    "of each model vary most; the figure is the share of their variance that this plane holds.",
    source="Pearson, Philosophical Magazine 1901; scikit-learn's PCA; turned by orthogonal Procrustes, scipy",
    needs=("forget test", "retain test"),
    targets={"share of variance": "none"},
    run=map_features,
)
