"""What `python sample.py` can do with a trained network: flags and pictures. The mathematics is the lesson's.

A lesson's sample.py holds what is used here, with the same names in every lesson:

LESSON, its name in checkpoints; WEIGHTS, which weights of a checkpoint to sample with; SAMPLERS, the names of its
samplers, one for a quick look first, the paper's last; FILLS_IN, the one that fill_in follows;
OPTIONS, {field of config: values, or a type} that only samplers use: they become flags, and are None if neither the
training's configuration nor a flag has them; PICTURES, {flag: function(network, config, n, seed, calls, x)}, with pairs
of test images x (n, 2, C, H, W), which returns images and how many are a row; its docstring is the flag's help;
ONLY_FOR, {flag: the samplers and pictures that it has an effect on}, where these are not all;
make_network(config, channels, weights) -> the network, before weights are loaded into it;
number_of_calls(network, config, sampler, quick) -> how often the network is called for each image, if nobody says;
draw(network, config, shape, generator, sampler, calls) -> yields images (N, C, H, W) on the way, the last final;
fill_in(network, config, y, known, generator, calls) -> y (N, C, H, W) with other pixels where known (1, 1, H, W) is 0;
noise_levels(network, config) -> the names of the noise levels, from the noisiest on;
noise_and_guess(network, config, x, z, k) -> x with noise z of level k, and the network's guess of the clean images.

config is that of the training. Images are in [0, 1].
"""

import math
import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from types import ModuleType

import torch
from einops import rearrange, repeat
from torch import Tensor

from common import cli
from common.checkpoint import load_network
from common.config import check_range, flag_of
from common.data import load_mask, load_picture, load_pictures, nearest_training_digit
from common.errors import LessonError
from common.files import atomic_write, check_writable
from common.images import check_finite, evenly, save_gif, save_grid, save_strip, save_table, some_frames
from common.machine import InBatches, choose_device, sampling_precision
from common.noise import SeededNoise

MASKS = ("left", "right", "top", "bottom", "center")
VERBS = {"drawn": 64, "inpaint": 8, "interpolate": 8, "nearest": 8, "denoise": 4, "info": 1}  # and what --num is then
COMPLETIONS, STEPS, LEVELS = 6, 10, 8  # pictures in a row of --inpaint, --interpolate and --denoise
TABLE = 16  # columns of a table of panels, which takes long to draw
AT_ONCE = 1000  # images: of many more, the noise for one step would not fit into memory


def main(lesson: ModuleType) -> None:
    """Ends the program after making the pictures that the flags ask for."""
    cli.run(lambda: play(lesson, read_flags(lesson)))


def read_flags(lesson: ModuleType) -> Namespace:
    """The flags of sample.py, checked."""
    usage = "%(prog)s [--FLAG VALUE ...], with these flags"
    parser = ArgumentParser(description=(lesson.__doc__ or "").split("\n")[0], usage=usage, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="of a training (default: output/checkpoint.pt, or else pretrained.pt)")
    add("--num", type=int, help="how many images, or rows of them (default: 64 images, 8 rows, 4 for --denoise)")
    add("--seed", type=int, default=1, help="image k is the sample of seed + k, always the same (default: 1)")
    add("--sampler", choices=lesson.SAMPLERS, help=f"(default: {lesson.SAMPLERS[0]}; {lesson.FILLS_IN} for --inpaint)")
    add("--calls", type=int, help="network calls for each image (default: enough for a quick look)")
    add("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="(default: that of the training)")
    add("--output", metavar="PATH.png", help="the picture (default: output/drawn.png, output/inpaint.png, ...)")
    add("--save-tensor", metavar="PATH", help="also write the images, float (N, C, H, W), for torch.load")
    add("--images", metavar="FOLDER", help="where the pictures of the training are now, if they have been moved")
    add("--gif", nargs="?", const="output/drawn.gif", metavar="PATH.gif", help="also the way from noise to images")
    add("--strip", nargs="?", const="output/strip.png", metavar="PATH.png", help="also eight moments of eight images")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--inpaint", metavar=f"{'|'.join(MASKS)}|PATH.png", help="fill in a part, or what a mask has black")
    add("--interpolate", action="store_true", help="go from one image to another, a pair in each row")
    add("--nearest", action="store_true", help="show the training images that are nearest to samples")
    add("--denoise", nargs="?", const="", metavar="PATH", help="add noise and take it away in one step")
    add("--info", action="store_true", help="print what is in the checkpoint")
    for name, function in lesson.PICTURES.items():
        add(flag_of(name), action="store_true", help=function.__doc__)
    for name, values in lesson.OPTIONS.items():
        if isinstance(values, type):
            how = {"type": values, "metavar": values.__name__.upper()}
        else:
            kind = type(values[0])
            how = {"action": BooleanOptionalAction} if kind is bool else {"choices": values, "type": kind}
        parser.add_argument(flag_of(name), **how, help="(default: as in the training, or none)")
    options = parser.parse_args()
    named = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    for name, value in vars(options).items():
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))
    verbs = {**VERBS, **dict.fromkeys(lesson.PICTURES, 8)}
    options.verb = next((name for name in verbs if vars(options).get(name) not in (None, False)), "drawn")
    options.num = verbs[options.verb] if options.num is None else options.num
    options.output = options.output or f"output/{options.verb}.png"
    options.sampler = options.sampler or (lesson.FILLS_IN if options.inpaint else lesson.SAMPLERS[0])
    check_range("--num", options.num, 1, 100_000)
    check_range("--seed", options.seed, 0, 2**62)
    if options.calls is not None:
        check_range("--calls", options.calls)
    if options.inpaint and options.sampler != lesson.FILLS_IN:
        raise LessonError(f"--inpaint follows {lesson.FILLS_IN}: leave out --sampler")
    check_effects(lesson, options, named - {"checkpoint", "gif", "strip", options.verb})
    if options.verb != "drawn" and (options.gif or options.strip):
        raise LessonError(f"--gif and --strip show how plain samples come about: leave out {flag_of(options.verb)}")
    for flag, ending in (("output", ".png"), ("gif", ".gif"), ("strip", ".png")):
        path = getattr(options, flag)
        if path and Path(path).suffix.lower() != ending:
            raise LessonError(f"--{flag} {path}: the name must end in {ending}")
    return options


def check_effects(lesson: ModuleType, options: Namespace, named: set[str]) -> None:
    """LessonError, one line that says where it has one, for the first of the named flags that would have no effect."""
    sampled, own = ("drawn", "interpolate", "nearest"), tuple(lesson.PICTURES)
    only_for = {name: (*sampled, "inpaint", "denoise", *own) for name in vars(options)}  # all but --info
    only_for |= {"sampler": (*sampled, "inpaint"), "calls": (*sampled, "inpaint", *own)}
    only_for |= {"images": ("nearest", "inpaint", "denoise", *own)} | getattr(lesson, "ONLY_FOR", {})
    if options.denoise:  # a picture of one's own
        only_for |= dict.fromkeys(("num", "images"), ("nearest", "inpaint"))
    here = {options.verb, options.sampler} if options.verb in sampled else {options.verb}
    for name in sorted(named):
        if not here & set(only_for[name]):
            raise LessonError(f"{flag_of(name)} has no effect here, only for {', '.join(only_for[name])}: leave it out")


def play(lesson: ModuleType, options: Namespace) -> None:
    """Loads the network, and makes the pictures."""
    device, path = choose_device(), Path(options.checkpoint or "output/checkpoint.pt")
    if not options.checkpoint and not path.is_file():
        print("no output/checkpoint.pt here: using pretrained.pt, the lesson run that comes with the repository")
        path = Path(lesson.__file__).parent / "pretrained.pt"
    network, config, checkpoint = load_network(lesson, path, device)
    for name in lesson.OPTIONS:
        chosen = getattr(options, name)
        setattr(config, name, getattr(config, name, None) if chosen is None else chosen)
    config.images = options.images or config.images
    config.channels, config.image_size = checkpoint["image_shape"][:2]  # as which pictures of a folder are read
    if options.info:
        return print_info(checkpoint, network, lesson.noise_levels(network, config), path)
    for name in (options.output, options.save_tensor, options.gif, options.strip):
        if name:
            check_writable(name)  # now, not after the work
    shape, n, seed, output = tuple(checkpoint["image_shape"]), options.num, options.seed, options.output
    precision = sampling_precision(options.precision, config.precision, device)
    calls = options.calls or lesson.number_of_calls(network, config, options.sampler, quick=True)
    how = lesson, network, config

    def test_pictures(count):
        """Test images (count, C, H, W) in [0, 1] that the seed chooses, each again where there are fewer."""
        images = load_pictures(config, "test")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        return images[order[torch.arange(count) % len(order)]] / 255

    def in_batches(total_calls):
        return InBatches(network, precision, cli.progress(total_calls, " calls"))

    if options.verb == "drawn":
        keep = 64 if options.gif or options.strip else 0
        images, frames = sample_all(*how, (n, *shape), seed, options.sampler, calls, precision, keep)
        save_grid(images, output)
        if options.gif:
            save_gif(frames, options.gif)
        if options.strip:
            save_strip([frame[:8] for frame in frames], options.strip)
    elif options.verb == "nearest":
        train = load_pictures(config, "train") / 255  # now, not after the work
        images, _ = sample_all(*how, (n, *shape), seed, options.sampler, calls, precision)
        groups = {"sample": images}
        if config.images:
            print("a folder has no test pictures to compare with")
        else:
            groups["test image"] = test_pictures(n)
        show_nearest(groups, train, output)
    elif options.verb == "inpaint":
        known, y = read_mask(options.inpaint, *shape[1:]), test_pictures(n)
        each = repeat(y, "n c h w -> (n k) c h w", k=COMPLETIONS).to(device)
        noise = SeededNoise(range(seed, seed + len(each)))
        images = lesson.fill_in(in_batches(len(each) * calls), config, each, known.to(device), noise, calls).cpu()
        check_finite(images)
        completions = rearrange(images, "(n k) c h w -> k n c h w", k=COMPLETIONS)
        rows = [y, y * known + 0.5 * (1 - known), *completions]
        save_grid(rearrange(rows, "k n c h w -> (n k) c h w"), output, columns=len(rows))
    elif options.verb == "interpolate":
        first = [seed + 2 * (k // STEPS) for k in range(n * STEPS)]
        noise = SeededNoise(first, [s + 1 for s in first], torch.linspace(0, 1, STEPS).repeat(n))
        many = n * STEPS
        *_, images = lesson.draw(in_batches(many * calls), config, (many, *shape), noise, options.sampler, calls)
        check_finite(images)
        save_grid(images, output, columns=STEPS)
    elif options.verb == "denoise":
        y = load_picture(options.denoise, *shape[1::-1]) / 255 if options.denoise else test_pictures(n)
        images = show_denoising(*how, y.to(device), seed, precision, output)
    elif options.verb in lesson.PICTURES:
        pairs, make = test_pictures(2 * n).unflatten(0, (n, 2)).to(device), lesson.PICTURES[options.verb]
        images, columns = make(in_batches(None), config, n, seed, calls, pairs)
        check_finite(images)
        save_grid(images, output, columns)

    if options.save_tensor:
        with atomic_write(options.save_tensor) as temporary:
            torch.save(images.cpu(), temporary)
    print("look at", ", ".join(str(path) for path in (output, options.gif, options.strip) if path))


def sample_all(lesson, network, config, shape, seed, sampler, calls, precision, keep=0) -> tuple[Tensor, list]:
    """Samples of `shape` (N, C, H, W) on the CPU, image k of seed + k, and what the first `keep` were on the way."""
    samples, frames = [], []
    with cli.progress(shape[0] * calls, " calls") as bar:
        batched = InBatches(network, precision, bar)
        for start in range(0, shape[0], AT_ONCE):
            N = min(AT_ONCE, shape[0] - start)
            noise = SeededNoise(range(seed + start, seed + start + N))
            some = some_frames(lesson.draw(batched, config, (N, *shape[1:]), noise, sampler, calls), 72 if keep else 1)
            frames = frames or [images[:keep].cpu() for images in some]
            samples.append(some[-1].cpu())
            check_finite(samples[-1])
    return torch.cat(samples), frames


def read_mask(name: str, H: int, W: int) -> Tensor:
    """1 where a pixel is known and 0 where it is to be filled in: float (1, 1, H, W).

    name: the part to fill in, one of MASKS, or a picture of H x W pixels that is black there. LessonError otherwise.
    """
    rows, columns = torch.arange(H)[:, None], torch.arange(W)
    middle = (rows >= H // 4) & (rows < H - H // 4) & (columns >= W // 4) & (columns < W - W // 4)
    holes = (columns < W // 2, columns >= W // 2, rows < H // 2, rows >= H // 2, middle)
    if name in MASKS:
        known = ~holes[MASKS.index(name)].expand(H, W)
    elif not Path(name).is_file():
        raise LessonError(f"--inpaint {name}: there is no such picture; name one, or one of {', '.join(MASKS)}")
    else:
        known = load_mask(name, (H, W))
    if known.all() or not known.any():
        raise LessonError(f"--inpaint {name}: a mask needs black, to fill in, and white, to keep; this one has one")
    return known.float()[None, None]


def show_nearest(groups: dict[str, Tensor], train: Tensor, path: str) -> None:
    """Writes the images (N, C, H, W) of each group above their nearest training images, with their distances.

    Of more than a table's width, a grid: each image beside its nearest, and no distances.
    """
    rows, names, captions = [], [], []
    for name, images in groups.items():
        distances, index = nearest_training_digit(images, train)
        rows += [images, train[index]]
        names += [name, "nearest\ntraining image"]
        captions += [""] * len(images) + [f"{distance:.2f}" for distance in distances.tolist()]
        print(f"{name}s: median distance {distances.median():.2f}")
    if len(images) <= TABLE:
        save_table(torch.cat(rows), path, names, [""] * len(images), captions)
    else:
        pairs = rearrange(rows, "(groups two) n c h w -> (groups n two) c h w", two=2)
        save_grid(pairs, path, columns=2 * math.ceil(math.sqrt(len(pairs) / 4)))


def show_denoising(lesson, network, config, y: Tensor, seed: int, precision: str, path: str) -> Tensor:
    """Writes images y with noise of LEVELS levels and, below, what the network takes them for; returns that."""
    names, network = lesson.noise_levels(network, config), InBatches(network, precision)
    some = evenly(len(names), LEVELS).flip(0).tolist()
    z = SeededNoise(range(seed, seed + len(y))).like(y)
    noisy, guesses = zip(*(lesson.noise_and_guess(network, config, y, z, k) for k in some))
    check_finite(torch.cat(guesses))
    rows = [torch.stack([y, *images]) for images in (noisy, guesses)]
    table = rearrange(rows, "two k n c h w -> (n two k) c h w")
    columns = ["clean", *(names[k].replace(" ", "\n") for k in some)]
    save_table(table, path, ["with noise", "network's guess"] * len(y), columns)
    return torch.cat(guesses)


def print_info(checkpoint: dict, network: torch.nn.Module, levels: list[str], path: Path) -> None:
    """Prints the checkpoint's lesson, step, configuration, number of parameters and noise levels."""
    print(f"{path}: {checkpoint['lesson']}, step {checkpoint['step']}")
    if "made" in checkpoint:
        print(f"made by     {checkpoint['made']}")
    print(f"images      {' x '.join(map(str, checkpoint['image_shape']))}")
    print(f"parameters  {sum(p.numel() for p in network.parameters()):,}")
    for name, value in checkpoint["config"].items():
        print(f"  {name:<16}{value}")
    print(f"noise       {len(levels)} levels" + (", among them:" if len(levels) > 100 else ":"))
    levels = [levels[k] for k in evenly(len(levels), 30)] if len(levels) > 100 else levels
    for start in range(0, len(levels), 6):
        print("  " + "".join(f"{name:<18}" for name in levels[start : start + 6]).rstrip())
