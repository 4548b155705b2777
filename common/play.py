"""What `python sample.py` can do with a trained network: flags and pictures. The mathematics is in sampler.py."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from common.cli import check_positive, check_range
from common.data import load_mask, load_picture, load_pictures
from common.errors import LessonError
from common.files import atomic_write, check_writable
from common.images import check_finite, save_gif, save_grid, save_strip, save_table
from common.machine import PRECISIONS
from common.nearest import nearest_training_digit
from common.noise import InterpolatedNoise, JoinedNoise, SeededNoise

MASKS = ("left", "right", "top", "bottom", "center")
VERBS = {"drawn": 64, "inpaint": 8, "interpolate": 8, "nearest": 8, "denoise": 4, "info": 1}  # and what --num is then
COMPLETIONS, STEPS, SIGMAS = 6, 10, 8  # pictures in a row of --inpaint, --interpolate and --denoise
AT_ONCE = 1000  # images: of many more, all moments of the way from noise would not fit into memory


def read_flags(description: str, samplers: tuple[str, ...]) -> Namespace:
    """The flags of sample.py, checked. samplers: the names that --sampler may have, the lesson's default first."""
    parser = ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", help="what train_mnist.py wrote (default: output/checkpoint.pt, or else pretrained.pt)")
    add("--num", type=int, help="how many images, or rows of them (default: 64 images, 8 rows, 4 for --denoise)")
    add("--seed", type=int, default=1, help="image k is the sample of seed + k, always the same (default: 1)")
    add("--sampler", choices=samplers, help=f"(default: {samplers[0]}; langevin for --inpaint)")
    add("--calls", type=int, help="network calls for each image (default: as many as the sampler needs)")
    add(
        "--precision",
        default="auto",
        choices=PRECISIONS,
        help="(default: that of the training, if this machine is fast in it)",
    )
    add("--output", metavar="PATH.png", help="the picture (default: output/drawn.png, output/inpaint.png, ...)")
    add("--save-tensor", metavar="PATH", help="also write the images, float (N, C, H, W), for torch.load")
    add("--gif", nargs="?", const="output/drawn.gif", metavar="PATH.gif", help="also the way from noise to images")
    add("--strip", nargs="?", const="output/strip.png", metavar="PATH.png", help="also eight moments of eight images")
    verb = parser.add_mutually_exclusive_group()
    verb.add_argument(
        "--inpaint", metavar=f"{'|'.join(MASKS)}|PATH.png", help="fill in a part, or what a mask has black"
    )
    verb.add_argument("--interpolate", action="store_true", help="walk from one image to another, a pair in each row")
    verb.add_argument("--nearest", action="store_true", help="show the training images that are nearest to samples")
    verb.add_argument("--denoise", nargs="?", const="", metavar="PATH", help="add noise and take it away in one step")
    verb.add_argument("--info", action="store_true", help="print what is in the checkpoint")
    options = parser.parse_args()
    options.verb = next((name for name in VERBS if vars(options).get(name) not in (None, False)), "drawn")
    options.num = VERBS[options.verb] if options.num is None else options.num
    options.output = options.output or f"output/{options.verb}.png"
    options.sampler = options.sampler or ("langevin" if options.inpaint else samplers[0])
    check_range(options, "num", 1, 100_000)
    check_range(options, "seed", 0, 2**62)
    if options.calls is not None:
        check_positive(options, "calls")
    if options.inpaint and options.sampler != "langevin":
        raise LessonError("--inpaint follows Algorithm 2, which is Langevin dynamics: leave out --sampler")
    if options.verb != "drawn" and (options.gif or options.strip):
        raise LessonError(f"--gif and --strip show the way of plain samples: leave out --{options.verb}")
    for flag, path, ending in (
        ("output", options.output, ".png"),
        ("gif", options.gif, ".gif"),
        ("strip", options.strip, ".png"),
    ):
        if path and Path(path).suffix.lower() != ending:
            raise LessonError(f"--{flag} {path}: the name must end in {ending}")
    return options


def langevin_steps(calls: int, L: int, more: int = 0) -> int:
    """T, how many steps at each of L noise scales make, with `more` calls besides, at most `calls` network calls.

    LessonError for less than one.
    """
    if calls < L + more:
        raise LessonError(f"--calls {calls}: Langevin dynamics needs at least {L + more}, with {L} noise scales")
    return (calls - more) // L


def choose_noise_scales(sigmas: Tensor, n: int) -> Tensor:
    """Indices (n,) long of n >= 2 of the noise scales, evenly chosen, from sigma_1 to sigma_L; all if n is larger."""
    return torch.linspace(0, len(sigmas) - 1, min(n, len(sigmas)), device=sigmas.device).round().long()


def find_checkpoint(path: str | None, lesson: Path) -> Path:
    """The path if one is given, or output/checkpoint.pt if there is one, or the lesson's pretrained.pt."""
    if path:
        return Path(path)
    trained = Path("output/checkpoint.pt")
    if not trained.is_file():
        print("no output/checkpoint.pt here: using pretrained.pt, the lesson run that comes with the repository")
        return lesson / "pretrained.pt"
    return trained


def play(
    options: Namespace,
    checkpoint: dict,
    sigmas: Tensor,
    calls: int,
    sample: Callable,
    fill_in: Callable,
    guess: Callable,
) -> None:
    """Makes the pictures that the flags ask for.

    sample(shape, noise, bar) -> the images (N, C, H, W) after each noise scale, the last ones final;
    fill_in(y, known, noise, bar) -> y (N, C, H, W) with other pixels where known (1, 1, H, W) is 0;
    guess(x, i) -> the clean images that the network sees in x (N, C, H, W) with noise sigma_i, i (N,);
    calls: how many network calls `sample` and `fill_in` make for each image.
    """
    for path in (options.output, options.save_tensor, options.gif, options.strip):
        if path:
            check_writable(path)  # now, not after the work
    shape, n, seed, output = tuple(checkpoint["image_shape"]), options.num, options.seed, options.output
    data = SimpleNamespace(**{"images": "", "image_size": shape[1], "channels": shape[0], **checkpoint["config"]})

    def pictures(split, count=None):
        """The images of a split in [0, 1]: all of them, or `count` that the seed chooses."""
        images = load_pictures(data, split)
        if count:
            images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
        return images.to(sigmas.device) / 255

    def progress(images):
        return tqdm(total=images * calls, unit=" calls", unit_scale=True)

    def draw(count):
        """`count` samples, and the frames of the first of them."""
        samples, first_frames = [], None
        with progress(count) as bar:
            for start in range(0, count, AT_ONCE):
                N = min(AT_ONCE, count - start)
                frames = sample((N, *shape), SeededNoise(seed + start, N), bar)
                samples.append(frames[-1].cpu())
                first_frames = first_frames or [frame[:64].cpu() for frame in frames]
        return torch.cat(samples), first_frames

    if options.verb == "drawn":
        images, frames = draw(n)
        save_grid(images, output)
        if options.gif:
            save_gif(frames, options.gif)
        if options.strip:
            save_strip([frame[:8] for frame in frames], options.strip)
    elif options.verb == "inpaint":
        known = read_mask(options.inpaint, *shape[1:]).to(sigmas.device)
        y = pictures("test", n)
        with progress(n * COMPLETIONS) as bar:
            each = repeat(y, "n c h w -> (n k) c h w", k=COMPLETIONS)
            images = fill_in(each, known, SeededNoise(seed, len(each)), bar)
        check_finite(images)
        rows = rearrange(images, "(n k) c h w -> n k c h w", k=COMPLETIONS)
        masked = y * known + 0.5 * (1 - known)
        rows = torch.cat([torch.stack([y, masked], 1), rows], 1)
        save_grid(rearrange(rows, "n k c h w -> (n k) c h w"), output, columns=2 + COMPLETIONS)
    elif options.verb == "interpolate":
        pairs = [InterpolatedNoise(seed + 2 * k, seed + 2 * k + 1, STEPS) for k in range(n)]
        with progress(n * STEPS) as bar:
            images = sample((n * STEPS, *shape), JoinedNoise(pairs, [STEPS] * n), bar)[-1]
        save_grid(images, output, columns=STEPS)
    elif options.verb == "nearest":
        images = draw(n)[0]
        train, test = pictures("train").cpu(), pictures("test", n).cpu()
        show_nearest(images, train, test, output)
    elif options.verb == "denoise":
        if options.denoise:
            y = load_picture(options.denoise, shape[1], shape[0]).to(sigmas.device) / 255
        else:
            y = pictures("test", n)
        images = show_denoising(y, SeededNoise(seed, len(y))(y), sigmas, guess, output)

    if options.save_tensor:
        with atomic_write(options.save_tensor) as temporary:
            torch.save(images.cpu(), temporary)
    print("look at", ", ".join(str(path) for path in (output, options.gif, options.strip) if path))


def read_mask(name: str, H: int, W: int) -> Tensor:
    """1 where a pixel is known and 0 where it is to be filled in: float (1, 1, H, W).

    name: the part to fill in, one of MASKS, or a picture of H x W pixels that is black there. LessonError otherwise.
    """
    parts = {
        "left": (slice(None), slice(0, W // 2)),
        "right": (slice(None), slice(W // 2, None)),
        "top": (slice(0, H // 2), slice(None)),
        "bottom": (slice(H // 2, None), slice(None)),
        "center": (slice(H // 4, H - H // 4), slice(W // 4, W - W // 4)),
    }
    if name in parts:
        known = torch.ones(H, W)
        known[parts[name]] = 0
    elif not Path(name).is_file():
        raise LessonError(f"--inpaint {name}: there is no such picture; name one, or one of {', '.join(MASKS)}")
    else:
        known = load_mask(name, (H, W)).float()
    if known.min() == known.max():
        raise LessonError(
            f"--inpaint {name}: a mask needs black, to fill in, and white, to keep; this one has one only"
        )
    return known[None, None]


def show_nearest(samples: Tensor, train: Tensor, test: Tensor, path: str) -> None:
    """Writes samples, then test images, each above its nearest training image, with their distance in pixels."""
    rows, captions = [], []
    for images in (samples, test):
        distances, index = nearest_training_digit(images, train)
        rows += [images, train[index]]
        captions += [""] * len(images) + [f"{distance:.2f}" for distance in distances.tolist()]
        print(f"{('samples', 'test images')[len(rows) > 2]}: median distance {distances.median():.2f}")
    names = ["sample", "nearest\ntraining image", "test image", "nearest\ntraining image"]
    save_table(torch.cat(rows), path, names, [""] * len(samples), captions)


def show_denoising(y: Tensor, z: Tensor, sigmas: Tensor, guess: Callable, path: str) -> Tensor:
    """Writes y + sigma z at SIGMAS noise scales and, below, what the network believes was there; returns that."""
    some = choose_noise_scales(sigmas, SIGMAS).flip(0)
    noisy = [y + sigmas[i] * z for i in some]
    guesses = [guess(x, i.expand(len(x))) for x, i in zip(noisy, some)]
    check_finite(torch.cat(guesses))
    rows = rearrange([torch.stack([y, *noisy], 1), torch.stack([y, *guesses], 1)], "two n k c h w -> (n two k) c h w")
    names = ["clean", *(f"$\\sigma$ = {sigma:.2g}" for sigma in sigmas[some].tolist())]
    save_table(rows, path, ["with noise", "network's guess"] * len(y), names)
    return torch.cat(guesses)


def print_info(checkpoint: dict, network: torch.nn.Module, path: Path) -> None:
    """Prints the checkpoint's lesson, step, configuration, number of parameters and noise ladder."""
    C, H, W = checkpoint["image_shape"]
    print(f"{path}: {checkpoint['lesson']}, step {checkpoint['step']}")
    if "made" in checkpoint:
        print(f"made by     {checkpoint['made']}")
    print(f"images      {C} x {H} x {W}")
    print(f"parameters  {sum(p.numel() for p in network.parameters()):,}")
    for name, value in checkpoint["config"].items():
        print(f"  {name:<16}{value}")
    sigmas = network.sigmas.tolist()
    print(f"noise       {len(sigmas)} scales, each {sigmas[0] / sigmas[1]:.4f} times the next:")
    for start in range(0, len(sigmas), 8):
        print("  " + "".join(f"{sigma:<10.4g}" for sigma in sigmas[start : start + 8]).rstrip())
