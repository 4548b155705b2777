"""How good are generated digits? Numbers for them, between those of real digits and those of noise.

The features compared are those of `common.digit_classifier`, not Inception's; digit FIDs compare only with each other.
The classifier is the judge: nothing in training or sampling may use it, nor choose by it while it runs, or the numbers
measure how well the judge was bribed.

The fewer the samples, the larger their Frechet distance, and even real digits do not score zero. So `digit_report`
measures, in the same call and with the same n, real digits (the floor) and noise (the ceiling).
Everything runs on the CPU in float32 or float64, again so that everybody's numbers compare.
"""

import functools

import torch
from torch import Tensor

from common.data import load_images, nearest_training_digit
from common.digit_classifier import load_classifier
from common.errors import LessonError

COLUMNS = {  # of a report: title, key, format
    "    n": ("n", "d"),
    "digit FID": ("fid", ".1f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "class entropy": ("entropy", ".3f"),
    "nearest train": ("nearest", ".2f"),
}
ROWS = {"samples": "samples", "floor": "real digits (floor)", "ceiling": "noise (ceiling)"}


def gray(images: Tensor) -> Tensor:
    """Float images (N, 1 or 3, 28, 28) in [0, 1], on the CPU, as (N, 1, 28, 28): the brightest channel of each pixel.

    The brightest, because a digit in any full colour on black is then the same white digit as before.
    Raises LessonError for any other shape, for integers, and for values outside [0, 1] or not a number.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2:] != (28, 28) or len(images) == 0:
        raise LessonError(f"the digit metrics need images (N, 1 or 3, 28, 28), not {tuple(images.shape)}")
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise LessonError("the digit metrics need float images in [0, 1]: divide uint8 by 255, clamp samples")
    return images.detach().cpu().float().amax(dim=1, keepdim=True)


@torch.no_grad()
def digit_features(images: Tensor) -> Tensor:
    """Features (N, F) of images (N, 1 or 3, 28, 28) in [0, 1]. Raises LessonError as `gray` does."""
    model = load_classifier()
    return torch.cat([model.features(chunk) for chunk in gray(images).split(500)])


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the normal distributions fitted to features (N, F) and (M, F); N, M >= 2.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)); Heusel et al. 2017, arXiv 1706.08500, Eq. 6.
    """
    a, b = features_a.cpu().double(), features_b.cpu().double()
    if min(len(a), len(b)) < 2:
        raise LessonError("a Frechet distance needs at least two samples on each side")
    R_a, R_b = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b))  # S = R^T R
    # S_a S_b is not symmetric, but it has the eigenvalues of (R_a R_b^T)(R_a R_b^T)^T. So the trace of its root is the
    # sum of the singular values of R_a R_b^T, its nuclear norm: no root of a rounding error, even where n < F.
    squared = (a.mean(0) - b.mean(0)).square().sum() + R_a.square().sum() + R_b.square().sum()
    squared -= 2 * torch.linalg.matrix_norm(R_a @ R_b.T, "nuc")
    return max(squared.item(), 0.0)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: the share of fake among the real; recall: the share of real among the fake. Features (N, F), (M, F).

    "Among" means no farther from some point of the other set than that point's k-th nearest neighbour in its own set.
    Kynkäänniemi et al. 2019, arXiv 1904.06991, Eq. 1 and 2. Raises LessonError unless N, M > k.
    """
    if min(len(real), len(fake)) <= k:
        raise LessonError(f"precision and recall with {k} neighbours need more than {k} images of each kind")
    return _share_among(fake, real, _radii(real, k)), _share_among(real, fake, _radii(fake, k))


def entropy(counts: Tensor) -> float:
    """Entropy in nats of a histogram (K,): ln K if all classes are equally frequent (2.303 for ten), 0 for only one."""
    return torch.special.entr(counts.double() / counts.sum()).sum().item()


def digit_report(images: Tensor, seed: int = 0) -> dict:
    """All the numbers for n images (N, 1 or 3, 28, 28) in [0, 1], for n real digits and for n images of uniform noise.

    {"samples": row, "floor": row, "ceiling": row}, each row {"n", "fid", "precision", "recall", "histogram" (list of
    10), "entropy", "nearest"}. FID, precision and recall are against the 10 000 test digits, nearest is the median
    distance to the nearest of the 60 000 training digits. The floor is n training digits drawn by `seed`; only its
    nearest is of n test digits, because a training digit would find itself.
    Raises LessonError for images that `gray` refuses, and for fewer than 4 or more than 10 000 of them.
    """
    images = gray(images)
    n, generator = len(images), torch.Generator().manual_seed(seed)
    if not 4 <= n <= 10_000:
        raise LessonError(f"the report needs 4 to 10 000 images (the test set has no more), not {n}")
    train, test = load_images("mnist", split="train") / 255, load_images("mnist", split="test") / 255
    real = train[torch.randperm(len(train), generator=generator)[:n]]
    unseen = test[torch.randperm(len(test), generator=generator)[:n]]
    noise = torch.rand(n, 1, 28, 28, generator=generator)
    test_features = digit_features(test)

    def row(images, images_for_nearest):
        features = digit_features(images)
        precision, recall = precision_recall(test_features, features)
        histogram = load_classifier().classes(features).argmax(dim=1).bincount(minlength=10)
        return {
            "n": n,
            "fid": frechet_distance(features, test_features),
            "precision": precision,
            "recall": recall,
            "histogram": histogram.tolist(),
            "entropy": entropy(histogram),
            "nearest": nearest_training_digit(images_for_nearest, train)[0].median().item(),
        }

    return {"samples": row(images, images), "floor": row(real, unseen), "ceiling": row(noise, noise)}


def print_report(report: dict) -> None:
    """Print what `digit_report` returned as a table, with what its columns mean."""
    print(" " * 19 + "".join(f"  {title}" for title in COLUMNS))
    for key, name in ROWS.items():
        cells = [f"  {report[key][column]:{len(title)}{form}}" for title, (column, form) in COLUMNS.items()]
        print(f"{name:19}" + "".join(cells))
    print(f"classes 0 to 9 of the samples: {report['samples']['histogram']}; even classes have entropy 2.303")
    print("digit FID, precision, recall: against the 10 000 test digits; their floor is n training digits.")
    print("nearest train: median distance, in pixels, to the nearest training digit; its floor is n test digits.")


@functools.lru_cache(maxsize=2)  # the slowest part: once for the real digits, whatever is compared with them
def _radii(points, k):
    # k + 1 because each point is its own nearest neighbour
    chunks = [_distances(chunk, points).topk(k + 1, largest=False).values[:, k] for chunk in points.split(1000)]
    return torch.cat(chunks)  # (N,)


def _share_among(points, others, radii):
    inside = [(_distances(chunk, others) <= radii).any(dim=1) for chunk in points.split(1000)]
    return torch.cat(inside).double().mean().item()


def _distances(a, b):
    return torch.cdist(a.double(), b.double())  # by matrix products, whose cancellation float32 would not survive
