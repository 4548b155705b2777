import sys

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import common.digit_metrics
from common.data import load_images, load_labels
from common.digit_classifier import WEIGHTS, DigitClassifier, load_classifier
from common.digit_metrics import (
    digit_features,
    digit_report,
    entropy,
    frechet_distance,
    nearest_training_digit,
    precision_recall,
    print_report,
)
from common.errors import LessonError
from tests import warm
from tests.running import ENVIRONMENT, ROOT

sys.path.append(str(ROOT / "docs"))

from measure import DAMAGES, damaged
from train_judge import accuracy, jitter


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def train():
    return load_images("mnist", split="train")


@pytest.fixture(scope="module")
def test():
    return load_images("mnist", split="test")


@pytest.fixture(scope="module")
def test_features(test):
    return digit_features(test / 255)


@pytest.fixture(scope="module")
def report(train):
    return digit_report(train[:100] / 255)  # copies of training digits


def test_the_shipped_weights_know_the_test_digits(test):
    assert accuracy(load_classifier(), test, load_labels("mnist", split="test")) >= 0.99


def test_the_shipped_weights_are_small():
    assert WEIGHTS.stat().st_size < 1e6


def test_accuracy_counts(test):
    labels = load_labels("mnist", split="test")
    always_three = lambda x: torch.eye(10)[torch.full((len(x),), 3)]
    assert accuracy(always_three, test, labels) == (labels == 3).sum().item() / 10_000


def test_jitter_moves_digits_a_little(train):
    def centre(x):  # (N, 2)
        pixels = torch.arange(28.0)
        return torch.stack([x.sum(2) @ pixels, x.sum(3) @ pixels], dim=2).squeeze(1) / x.sum((2, 3))

    x = train[:500] / 255
    torch.manual_seed(0)
    moved = (centre(jitter(x)) - centre(x)).abs()
    assert 0.5 < moved.mean() < 1.5 and moved.max() < 4  # uniform in [-2, 2] is 1 on average


def test_missing_and_damaged_weights_are_one_line(tmp_path):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(WEIGHTS.read_bytes()[:1000])
    for path in (tmp_path / "missing.pt", damaged):
        with pytest.raises(LessonError, match="python docs/train_judge.py"):
            load_classifier(path)


def test_features_lead_to_the_logits(test):
    x = test[:8] / 255
    model = load_classifier()
    assert torch.equal(model(x), model.classes(digit_features(x)))
    assert digit_features(x).shape == (8, DigitClassifier().classes.in_features)


def test_frechet_distance_agrees_with_torchmetrics(train, test):
    class Features(nn.Module):
        num_features = DigitClassifier().classes.in_features

        def forward(self, x):
            return digit_features(x)

    real = test[:600] / 255
    for fake in (train[:40] / 255, train[:500] / 255, torch.rand(500, 1, 28, 28, generator=generator())):
        oracle = FrechetInceptionDistance(feature=Features(), normalize=True)
        oracle.update(real, real=True)
        oracle.update(fake, real=False)
        distance = frechet_distance(digit_features(fake), digit_features(real))
        assert distance == pytest.approx(oracle.compute().item(), rel=1e-4)


def test_frechet_distance_of_gaussians():
    # Standardised, so that mean and covariance are exactly 0 and the identity; then moved: S = R diag(s^2) R^T.
    x = torch.randn(500, 4, dtype=torch.float64, generator=generator())
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator(1)))[0]
    s, t, shift = torch.tensor([1.0, 2, 3, 0]), torch.tensor([2.0, 2, 0, 0]), torch.tensor([3.0, 0, 4, 0])
    a, b = x * s @ rotation, (x * t + shift) @ rotation
    assert frechet_distance(a, b) == pytest.approx(25 + (s - t).square().sum().item(), rel=1e-9)
    assert frechet_distance(x * s, x * s @ rotation) > 0.1  # the same variances in other directions


def test_frechet_distance_with_fewer_samples_than_features():
    few = torch.randn(5, 64, generator=generator())
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few + 2) == pytest.approx(4 * 64, rel=1e-5)
    with pytest.raises(LessonError, match="two samples"):
        frechet_distance(few[:1], few)


def test_precision_and_recall_by_hand():
    real, fake = torch.tensor([[0.0], [1], [10], [12]]), torch.tensor([[2.0], [4], [14], [15], [30]])
    # k = 1: the real radii are 1 1 2 2, which reach 2 (just) and 14 (just); the fake ones 2 2 1 1 15 reach 0 (just), 1.
    assert precision_recall(real, fake, k=1) == (2 / 5, 2 / 4)
    # k = 2: the real radii are 10 9 9 11, which reach all but 30; the fake ones 12 10 10 11 16 reach all.
    assert precision_recall(real, fake, k=2) == (4 / 5, 1)


def test_precision_and_recall_tell_what_is_missing():
    real = torch.randn(1500, 2, generator=generator()) + torch.tensor([[0.0, 0], [50, 0]]).repeat(750, 1)
    one_of_two_modes = torch.randn(1200, 2, generator=generator(1)) / 2
    precision, recall = precision_recall(real, one_of_two_modes)
    assert precision > 0.98 and 0.2 < recall < 0.5
    assert precision_recall(one_of_two_modes, real) == (recall, precision)
    assert precision_recall(real, real + 1000) == (0, 0)
    with pytest.raises(LessonError, match="more than 3"):
        precision_recall(real, real[:3])


def test_entropy():
    assert entropy(torch.full((10,), 3)) == pytest.approx(2.302585)
    assert entropy(torch.tensor([5, 0, 0])) == 0
    assert entropy(torch.tensor([1, 1, 0, 2])) == pytest.approx(1.5 * 0.693147, rel=1e-5)


def test_copies_are_found_at_distance_zero(train):
    images = train[:9000] / 255
    rows = torch.tensor([0, 4095, 4096, 8999])
    distances, indices = nearest_training_digit(images[rows], images)
    assert torch.equal(distances, torch.zeros(4)) and torch.equal(indices, rows)
    moved = (images[rows] - 0.001).clamp(min=0)
    distances, indices = nearest_training_digit(moved, images)
    assert (distances > 0).all() and torch.equal(indices, rows)


def test_nearest_digit_is_the_exact_one(train, test):
    color = train[:4200].repeat(1, 3, 1, 1) / 255
    x = test[:5].repeat(1, 3, 1, 1) / 255
    distances, indices = nearest_training_digit(x, color)
    every = (x[:, None] - color[None, :]).flatten(2).norm(dim=2)  # (5, 4200)
    assert torch.equal(indices, every.argmin(dim=1))
    torch.testing.assert_close(distances, every.amin(dim=1))


def test_real_is_far_better_than_corrupted_and_corrupted_than_noise(train, test_features):
    real = train[10_000:11_000] / 255
    noise = torch.rand(real.shape, generator=generator())
    corrupted = torch.cat([real[:500], (real[500:] + 0.5 * (noise[500:] - 0.5)).clamp(0, 1)])
    floor, middle, ceiling = (frechet_distance(digit_features(x), test_features) for x in (real, corrupted, noise))
    assert floor < 10 and ceiling > 500
    assert 3 * floor < middle < ceiling / 3


STRENGTHS = {
    "noise": (0.02, 0.05, 0.1),
    "thinner": (0.28, 0.55, 1),
    "missing": (1, 2, 5),
    "broken": (1, 2, 4),
    "non-digits": (0.1, 0.2, 0.4),
}


@pytest.mark.parametrize("damage", STRENGTHS)
def test_digit_fid_rises_with_the_damage(damage, test_features):
    several = [damaged("noise", 0, 400, seed=0)] + [damaged(damage, s, 400, seed=0) for s in STRENGTHS[damage]]
    fids = [frechet_distance(digit_features(x), test_features) for x in several]
    assert fids == sorted(set(fids)), fids


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_digits_are_images(damage):
    for strength in DAMAGES[damage][2]:
        x = damaged(damage, strength, 12, seed=1)
        assert x.shape == (12, 1, 28, 28) and 0 <= x.min() and x.max() <= 1
        assert torch.equal(x, damaged(damage, strength, 12, seed=1))


def test_a_share_of_the_digits_is_damaged():
    real = damaged("noise", 0, 40, seed=0)
    for damage, strength, most in (("broken", 0.25, 10), ("non-digits", 0.3, 12)):
        changed = (damaged(damage, strength, 40, seed=0) != real).flatten(1).any(1)
        assert changed[:most].all() and not changed[most:].any()
    gap = (damaged("broken", 1, 40, seed=0) != real).flatten(1).sum(1)
    assert gap.min() > 0 and gap.max() <= 25


def test_digits_without_missing_classes_are_the_floor(report, test_features):
    fid = frechet_distance(digit_features(damaged("noise", 0, 100, seed=0)), test_features)
    assert fid == pytest.approx(report["floor"]["fid"])
    classes = load_classifier()(damaged("missing", 5, 400, seed=0)).argmax(dim=1)
    assert (classes.bincount(minlength=10) < 10).sum() == 5


def test_color_digits_are_judged_as_the_gray_ones(train, test_features):
    gray, color = train[:300] / 255, load_images("color_mnist", split="train")[:300] / 255
    assert torch.equal(digit_features(gray.repeat(1, 3, 1, 1)), digit_features(gray))
    torch.testing.assert_close(digit_features(color), digit_features(gray))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(4, 1, 32, 32),
        torch.zeros(4, 2, 28, 28),
        torch.zeros(4, 28, 28),
        torch.zeros(0, 1, 28, 28),
        torch.zeros(4, 1, 28, 28, dtype=torch.uint8),
        torch.full((4, 1, 28, 28), 1.5),
        torch.full((4, 1, 28, 28), -0.1),
        torch.full((4, 1, 28, 28), torch.nan),
    ],
)
def test_what_cannot_be_judged_is_refused(images):
    with pytest.raises(LessonError, match="digit metrics need") as error:
        digit_features(images)
    assert "\n" not in str(error.value)


def test_report_puts_samples_between_floor_and_ceiling(report):
    samples, floor, ceiling = report["samples"], report["floor"], report["ceiling"]
    assert samples["n"] == floor["n"] == ceiling["n"] == 100
    assert max(samples["fid"], floor["fid"]) < 0.1 * ceiling["fid"]
    assert min(samples["precision"], floor["precision"]) > 0.8 and ceiling["precision"] < 0.1
    assert min(samples["recall"], floor["recall"]) > 0.3 and ceiling["recall"] < 0.1
    assert min(samples["entropy"], floor["entropy"]) > 2.2 > ceiling["entropy"]
    assert sum(samples["histogram"]) == 100


def test_report_compares_with_the_test_digits(train, test_features, report):
    features = digit_features(train[:100] / 255)
    assert report["samples"]["fid"] == pytest.approx(frechet_distance(features, test_features))
    precision, recall = precision_recall(test_features, features)
    assert (report["samples"]["precision"], report["samples"]["recall"]) == (precision, recall)


def test_report_unmasks_copies_and_its_floor_is_not_one(report):
    assert report["samples"]["nearest"] == 0
    assert 3 < report["floor"]["nearest"] < 9 < report["ceiling"]["nearest"]


def test_report_has_the_median_distance_to_the_nearest(train, test, monkeypatch):
    """Of copies that are brighter in a corner, which is black in all digits: so far is each from the nearest."""
    few = {"train": train[:50], "test": test[:50]}
    monkeypatch.setattr(common.digit_metrics, "load_images", lambda name, split: few[split])
    images = train[:5] / 255
    images[:, 0, 0, 0] = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.9])
    assert digit_report(images)["samples"]["nearest"] == pytest.approx(0.2)


def test_report_draws_real_digits_and_noise_by_its_seed(train, test, monkeypatch):
    few = {"train": train[:50], "test": test[:50]}
    monkeypatch.setattr(common.digit_metrics, "load_images", lambda name, split: few[split])
    one, other = (digit_report(train[50:54] / 255, seed=seed) for seed in (0, 1))
    assert one["samples"] == other["samples"]
    for row in ("floor", "ceiling"):
        assert one[row]["fid"] != other[row]["fid"] and one[row]["nearest"] != other[row]["nearest"]


def test_report_is_the_same_every_time_and_leaves_the_random_state_alone(train, report):
    state = torch.get_rng_state()
    assert digit_report(train[:100] / 255) == report
    assert torch.equal(torch.get_rng_state(), state)


def test_report_needs_a_sensible_number_of_images():
    for n in (3, 10_001):
        with pytest.raises(LessonError, match=f"4 to 10 000 .* not {n}"):
            digit_report(torch.zeros(n, 1, 28, 28))


@pytest.mark.parametrize("n", [4, 10_000])
def test_report_takes_the_fewest_and_the_most(n, monkeypatch):
    def enough(name, split):
        raise ValueError("enough")

    monkeypatch.setattr(common.digit_metrics, "load_images", enough)
    with pytest.raises(ValueError, match="enough"):
        digit_report(torch.zeros(n, 1, 28, 28))


def test_printed_table(report, capsys):
    print_report(report)
    header, *rows, classes = capsys.readouterr().out.splitlines()[:5]
    assert "digit FID" in header
    for row, key, name in zip(rows, ("samples", "floor", "ceiling"), ("samples", "real digits", "noise"), strict=True):
        assert row.startswith(name) and len(row) == len(header)
        assert row.split()[-6:] == [
            str(report[key]["n"]),
            f"{report[key]['fid']:.1f}",
            *(f"{report[key][column]:.3f}" for column in ("precision", "recall", "entropy")),
            f"{report[key]['nearest']:.2f}",
        ]
    counts = report["samples"]["histogram"]
    assert classes.startswith(f"classes 0 to 9 of the samples: {counts}; ") and counts != report["floor"]["histogram"]


def test_training_and_sampling_never_see_the_judge(lesson, tmp_path):
    """In a process of its own: nothing that train_mnist.py and sample.py import is the judge."""
    script = tmp_path / "imports.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / lesson.name)!r})\n"
        "import sample, train_mnist; print(*(name for name in sys.modules if 'digit' in name or name == 'sample'))"
    )
    ran = warm.run(script, cwd=tmp_path, env=ENVIRONMENT)
    assert ran.status == 0 and ran.stdout == "sample\n", ran.stderr
