"""What lesson 7 measures: `python docs/score_sde.py`, or names of some of its experiments.

All take the network of lesson_07_score_sde/pretrained.pt; `conditioning` and `encoding` need one more, of a run with
other flags, which they name. Adds lines to docs/score_sde.csv after each measurement, and leaves out those that are
there; `python docs/figures_sde.py` makes pictures of them.
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import origin
from ddpm import measure
from techniques import Table, fid, judged, noise_in

from common.checkpoint import load_lesson, load_network, load_weights
from common.cli import run
from common.digit_classifier import load_classifier as load_judge
from common.errors import LessonError
from common.machine import InBatches, choose_device, sampling_precision
from common.play import MASKS, read_mask
from lesson_07_score_sde.likelihood import bits_per_dim, dequantise, log_likelihood_terms
from lesson_07_score_sde.loss import denoising_score_matching_loss
from lesson_07_score_sde.sampler import (
    decode,
    denoise,
    encode,
    inpaint,
)
from lesson_07_score_sde.sde import VE

LESSON = "lesson_07_score_sde"
OTHERS = {  # runs that two experiments need besides pretrained.pt, and where
    "untold": "output_untold/checkpoint.pt",  # python train_mnist.py --no-conditional --output output_untold
    "seed_1": "output_1/checkpoint.pt",  # python train_mnist.py --seed 1 --output output_1
}


def load(name: str, path: str, smoke: bool = False) -> SimpleNamespace:
    """What the lesson has learned: `network` in batches, `float32`, the same in float32, `config`, and its sample.py.

    `smoke` puts a tiny network, which has learned nothing, in its place.
    """
    lesson = load_lesson(name)
    network, config, found = load_network(lesson, path, choose_device())
    origin.check_gray_digits(path, found)
    if smoke:
        config.width, config.N = 4, 4
        network = lesson.make_network(config, 1, {"sigma_max": network.sigma_max}).to(choose_device()).eval()
    precision = sampling_precision("auto", config.precision, choose_device())
    config.digit = config.guidance = None
    return SimpleNamespace(
        network=InBatches(network, precision), float32=InBatches(network, "float32"), config=config, lesson=lesson,
        smoke=smoke, sigma_max=float(network.sigma_max),
    )  # fmt: skip


def other(seven: SimpleNamespace, name: str) -> SimpleNamespace:
    """One of OTHERS. LessonError that says how to make it, if it is not there."""
    path = ROOT / LESSON / OTHERS[name]
    if seven.smoke:
        return seven
    if not path.is_file():
        raise LessonError(f"{path} is missing: the comment beside OTHERS in docs/score_sde.py says how to make it")
    return load(LESSON, str(path))


def few(seven: SimpleNamespace, number: int) -> int:
    """The number of network calls or of steps, or no more than three in a smoke test."""
    return min(number, 3) if seven.smoke else number


def sample(seven: SimpleNamespace, table: Table, sampler: str, calls: int, excess=1.0, way=None, **changes) -> tuple:
    """n images before and after the last denoising step, by a sampler of sample.py, with changes of the configuration.

    excess: how much noise there is at the start, over that of sigma_max. way: how far the eta of consistent sampling is
    from DDPM's, 0, to 1; lesson 4's is 0.5, and None that of lesson 7's sample.py.
    """
    lesson, config = seven.lesson, SimpleNamespace(**{**vars(seven.config), **changes})
    noise = table.noise()
    x = noise.like(torch.empty(table.n, 1, 28, 28)).to(choose_device())
    sigmas, ms = lesson.schedule_for_calls(seven.network, config, sampler, calls)
    x = excess * sigmas[0] * x
    if way is None:
        *_, x = lesson.follow(sampler, seven.network, x, sigmas, ms, config, noise)
    else:
        eta = 1 - (1 - way) * float(sigmas[1] / sigmas[0]) ** 2
        *_, x = lesson.consistent_sampling(seven.network, x, sigmas, eta, noise)
    return x.cpu(), denoise(seven.network, x, sigmas[-1]).cpu()


def calls(table: Table, seven: SimpleNamespace) -> None:
    """How many network calls does each sampler need? (the paper's Table 1)"""
    pc = "predictor_corrector"
    runs = {
        "Heun": ("heun", (13, 25, 35, 49, 97), {}),
        "Euler": ("euler", (13, 25, 49, 97), {}),
        "consistent": ("consistent", (13, 25, 49, 97), {}),
        "consistent, eta of lesson 4": ("consistent", (13, 25, 49, 97), {"way": 0.5}),
    }
    for predictor, some, corrected in (
        ("reverse_diffusion", (49, 97, 193), (25, 49, 97, 193)),
        ("ancestral", (49, 97, 193), (97, 193)),
        ("euler_maruyama", (49, 97, 193), (97, 193)),
        ("ode", (49, 97), (97, 193)),
    ):
        name = predictor.replace("_", " ")
        runs[name] = pc, some, {"predictor": predictor, "corrector": False}
        runs[f"{name}, corrector"] = pc, corrected, {"predictor": predictor, "corrector": True}
    for sde in ("vp", "sub_vp"):
        runs[f"{sde}: Heun"] = "heun", (35,), {"sde": sde}
        for predictor, with_corrector in (
            ("ancestral", False),
            ("reverse_diffusion", False),
            ("reverse_diffusion", True),
        ):
            name = f"{sde}: {predictor.replace('_', ' ')}{', corrector' if with_corrector else ''}"
            runs[name] = pc, (97,), {"sde": sde, "predictor": predictor, "corrector": with_corrector}
    for name, (sampler, some, changes) in runs.items():
        for K in table.missing(name, [few(seven, K) for K in some]):
            before, after = sample(seven, table, sampler, K, **changes)
            table.add(name, K, fid=fid(after), noise=noise_in(before))


def eta(table: Table, seven: SimpleNamespace) -> None:
    """How far from DDPM's eta, 0, to 1 should consistent sampling go? (lesson 4 goes half-way)"""
    for K in (few(seven, 49), few(seven, 97)):
        for way in table.missing(f"eta, {K} calls", (0, 0.15, 0.25, 0.35, 0.5, 0.75)):
            before, after = sample(seven, table, "consistent", K, way=way)
            table.add(f"eta, {K} calls", way, fid=fid(after), noise=noise_in(before))


def corrector(table: Table, seven: SimpleNamespace) -> None:
    """Which r is best, with 97 calls and reverse diffusion?"""
    for r in table.missing("corrector", (0.05, 0.1, 0.16, 0.25)):
        before, after = sample(seven, table, "predictor_corrector", few(seven, 97), corrector=True, r=r)
        table.add("corrector", r, fid=fid(after), noise=noise_in(before))


def takeover(table: Table, seven: SimpleNamespace) -> None:
    """Where does fresh noise help? x: the noise scale at which one sampler takes over from the other; 97 calls.

    At sigma_L the first has gone all the way. Each sampler has as many calls for a factor of sigma as it has alone.
    PREDICTION. Alone, Heun has 12.8 and consistent sampling 7.4. Below 0.2 neither does anything for the other; taking
    over at 1, each order gains half of the difference, since digits are decided above and their strokes below.
    """
    whole = math.log(seven.sigma_max / seven.config.sigma_L)
    for first, then in (("heun", "consistent"), ("consistent", "heun")):
        for sigma in table.missing(f"{first}, then {then}", (4.0, 2.0, 1.0, 0.5, 0.2, seven.config.sigma_L)):
            noise = table.noise()
            x = seven.sigma_max * noise.like(torch.empty(table.n, 1, 28, 28)).to(choose_device())
            for sampler, ends in ((first, (seven.sigma_max, sigma)), (then, (sigma, seven.config.sigma_L))):
                if ends[0] == ends[1]:
                    break
                steps = few(seven, round(96 * math.log(ends[0] / ends[1]) / whole / (2 if sampler == "heun" else 1)))
                sigmas = VE(ends[1], ends[0]).std(torch.linspace(1, 0, steps + 1)).to(x.device)
                *_, x = seven.lesson.follow(sampler, seven.network, x, sigmas, None, seven.config, noise)
            after = denoise(seven.network, x, sigmas[-1]).cpu()
            table.add(f"{first}, then {then}", sigma, **judged(after))


def loss(table: Table, seven: SimpleNamespace) -> None:
    """Is the loss at each noise scale lower than lesson 4's, on the same test digits with the same noise?"""
    names, sigmas = ("conditioned", "not conditioned", "lesson 4"), (5.0, 2.5, 1.0, 0.4, 0.1, 0.03, 0.01)
    if not any(table.missing(name, sigmas) for name in names):
        return
    untold = other(seven, "untold")
    networks = {"conditioned": seven.network, "not conditioned": untold.network}
    if not seven.smoke:
        weights = torch.load(ROOT / "lesson_04_ncsnv2" / "pretrained.pt", weights_only=True)["ema"]
        weights = {name: w.float() for name, w in weights.items()}
        weights["sigma_max"] = weights.pop("sigmas")[0]
        four = seven.lesson.make_network(untold.config, 1, weights)
        load_weights(four, weights, "lesson_04_ncsnv2/pretrained.pt")
        networks["lesson 4"] = InBatches(four.to(choose_device()).eval(), seven.network.precision)
    x, _ = table.digits()
    z = table.noise().like(x)
    for name, network in networks.items():
        for sigma in table.missing(name, sigmas):
            with torch.no_grad():
                each = denoising_score_matching_loss(network, x, torch.full((len(x),), sigma, device=x.device), z)
            table.add(name, sigma, loss=each.mean())


def conditioning(table: Table, seven: SimpleNamespace) -> None:
    """Does the ODE correct an error of the noise level? (the untold network's cannot)

    x: how much noise there is at sigma_max, over what is right.
    """
    for name in ("conditioned", "not conditioned"):
        for sampler in ("euler", "heun", "consistent", "predictor_corrector"):
            setting = f"{name}, {sampler.replace('_', ' ')}"
            for excess in table.missing(setting, (1.0, 1.05)):
                trained = seven if name == "conditioned" else other(seven, "untold")
                way = 0.5 if sampler == "consistent" else None
                before, after = sample(trained, table, sampler, few(seven, 97), excess, way)
                table.add(setting, excess, fid=fid(after), noise=noise_in(before))


def probes(x: Tensor, seed: int) -> torch.Generator:
    """Where the signs of `likelihood.py` come from: never from the numbers that dequantised an image."""
    return torch.Generator(x.device).manual_seed(10**6 + seed)


def bits(table: Table, seven: SimpleNamespace) -> None:
    """How many bits per dimension do test digits have, and where do they come from?

    x: the smallest noise scale. mean, its standard error over the digits, and that over probes for one digit.
    """
    images, _ = table.digits()
    x, D = dequantise(images, table.noise()), images[0].numel()
    for sigma in table.missing("test digits", (0.001, 0.003, 0.01)):
        parts = []
        for part, k in zip(x.split(100), range(len(x))):
            generator = probes(x, table.seed + k)
            parts.append(
                torch.stack(
                    log_likelihood_terms(seven.float32, part, sigma, seven.sigma_max, few(seven, 24), generator)
                )
            )
        prior, divergence = torch.cat(parts, dim=1) / (D * math.log(2))
        each = 8 - prior - divergence
        table.add("test digits", sigma, bits=each.mean(), error=each.std() / len(each) ** 0.5, prior=-prior.mean(),
                  divergence=-divergence.mean(), floor=math.log2(256 * sigma * math.sqrt(2 * math.pi)))  # fmt: skip
    for steps in table.missing("steps of the solver", (12, 24, 48)):
        generator = probes(x, table.seed)
        terms = log_likelihood_terms(seven.float32, x[:50], 0.001, seven.sigma_max, few(seven, int(steps)), generator)
        table.add("steps of the solver", steps, bits=bits_per_dim(sum(terms), D).mean())
    for k in table.missing("probes of 10 digits", range(1, 9)):
        generator = probes(x, int(k))
        terms = log_likelihood_terms(seven.float32, x[:10], 0.001, seven.sigma_max, few(seven, 24), generator)
        table.add("probes of 10 digits", k, bits=bits_per_dim(sum(terms), D).mean())


def encoding(table: Table, seven: SimpleNamespace) -> None:
    """Do two networks encode a digit alike (App. D.5)? And does it come back?"""
    if not table.missing("latents", [0]):
        return
    x = dequantise(table.digits()[0], table.noise())
    two = [encode(each.float32, x, 0.001, each.sigma_max, few(each, 24)) for each in (seven, other(seven, "seed_1"))]
    z, other_z = (each.flatten(1) for each in two)
    with torch.no_grad():
        back = decode(seven.float32, two[0], 0.001, seven.sigma_max, few(seven, 24))
    unlike = torch.corrcoef(torch.stack([z.flatten(), other_z.roll(1, 0).flatten()]))[0, 1]
    table.add(
        "latents", 0, same_digit=torch.cosine_similarity(z, other_z).mean(), other_digit=unlike,
        length=(z.norm(dim=1) / (seven.sigma_max * 28)).mean(), back=(back - x).square().mean().sqrt(),
    )  # fmt: skip


def recognised(x: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, 28, 28) that the judge puts into the classes `labels` (N,)."""
    with torch.no_grad():
        found = torch.cat([load_judge()(part.clamp(0, 1)).argmax(1) for part in x.split(500)])
    return float((found == labels).float().mean())


def guidance(table: Table, seven: SimpleNamespace) -> None:
    """How many samples are the digit that was asked for? x: guidance; by Heun with 35 calls, as many of each digit."""
    labels = torch.arange(table.n) % 10
    for scale in table.missing("Heun", (0.0, 0.5, 1.0, 2.0, 4.0)):
        config = SimpleNamespace(**{**vars(seven.config), "digit": labels, "guidance": scale})
        shape = (table.n, 1, 28, 28)
        *_, x = seven.lesson.draw(seven.network, config, shape, table.noise(), "heun", few(seven, 35))
        table.add("Heun", scale, recognised=recognised(x.cpu(), labels), fid=fid(x.cpu()))


def inpainting(table: Table, seven: SimpleNamespace) -> None:
    """Do completed digits keep their class? x: network calls; half of the picture is known."""
    y, labels = table.digits()
    for part in MASKS[:4]:
        known = read_mask(part, 28, 28).to(y.device)
        for with_corrector in (False, True):
            setting = f"{part}, {'with' if with_corrector else 'without'} corrector"
            for K in table.missing(setting, [few(seven, 97)]):
                sigmas, _ = seven.lesson.schedule(seven.network, seven.config, 1 + (K - 1) // (1 + with_corrector))
                noise = table.noise()
                how = seven.config.predictor, int(with_corrector), seven.config.r, noise
                *_, x = inpaint(seven.network, y, known, sigmas[0] * noise.like(y), sigmas, *how)
                x = denoise(seven.network, x, sigmas[-1]) * (1 - known) + y * known
                table.add(setting, K, same_class=recognised(x.cpu(), labels), fid=fid(x.cpu()))


EXPERIMENTS = {
    "calls": (calls, 500),
    "eta": (eta, 500),
    "takeover": (takeover, 500),
    "loss": (loss, 500),
    "corrector": (corrector, 250),
    "conditioning": (conditioning, 250),
    "bits": (bits, 500),
    "encoding": (encoding, 200),
    "guidance": (guidance, 500),
    "inpainting": (inpainting, 250),
}


if __name__ == "__main__":
    run(lambda: measure(__doc__, LESSON, "score_sde.csv", EXPERIMENTS, load))
