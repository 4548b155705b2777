"""How good are the digits? `python -m common.evaluate CHECKPOINT`, or a tensor of samples, prints a table.

The checkpoint says of which lesson it is.
"""

import os
from argparse import ArgumentParser

import torch

from common.checkpoint import load_checkpoint, load_file, load_lesson, load_network
from common.cli import by_product, run
from common.config import check_choice, check_range, flag_of
from common.digit_metrics import digit_report, gray, print_report
from common.errors import LessonError
from common.files import atomic_write, check_writable
from common.machine import choose_device, sampling_precision
from common.play import sample_all


def main() -> None:
    """Reads the flags, samples if a checkpoint is given, and prints the table."""
    description = (__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog="python -m common.evaluate", description=description, allow_abbrev=False)
    add, path = parser.add_argument, os.path.expanduser
    add("path", type=path, help="a checkpoint, or samples (N, 1 or 3, 28, 28) in [0, 1] saved by torch.save")
    add("--num", type=int, default=1000, help="how many samples to make (default: 1000)")
    add("--seed", type=int, default=1, help="image k is the sample of seed + k (default: 1)")
    add("--sampler", help="(default: the paper's)")
    add("--calls", type=int, help="network calls for each sample (default: by the training's T, L or N)")
    add("--save", metavar="PATH", type=path, help="also write the samples, as a tensor, to this file")
    options = parser.parse_args()
    named = [flag_of(name) for name, value in vars(options).items() if value != parser.get_default(name)]
    check_range("--num", options.num, 4, 10_000)
    check_range("--seed", options.seed, 0, 2**62)
    if options.calls is not None:
        check_range("--calls", options.calls)
    if options.save:
        check_writable(options.save)  # now, not after the work

    samples = load_file(options.path)
    if not isinstance(samples, torch.Tensor):
        device = choose_device()
        lesson = load_lesson(load_checkpoint(options.path)["lesson"])
        network, config, checkpoint = load_network(lesson, options.path, device)
        gray(torch.zeros(1, *checkpoint["image_shape"]))  # raises if they are no digits, now
        if config.images or config.dataset not in ("mnist", "color_mnist"):
            raise LessonError(f"{options.path} was not trained on digits, and the judge knows nothing else")
        sampler = options.sampler or lesson.SAMPLERS[-1]
        check_choice("--sampler", sampler, lesson.SAMPLERS)
        calls = options.calls or lesson.number_of_calls(network, config, sampler, quick=False)
        precision = sampling_precision("auto", config.precision, device)
        print(f"{lesson.LESSON}, step {checkpoint['step']}, {sampler}, at most {calls} network calls, {precision}")
        shape = (options.num, *checkpoint["image_shape"])
        samples, _ = sample_all(lesson, network, config, shape, options.seed, sampler, calls, precision)
        if options.save:
            with by_product(options.save), atomic_write(options.save) as temporary:
                torch.save(samples, temporary)
    elif named[1:]:  # the first is the path
        raise LessonError(f"{options.path} has the samples already: leave out {', '.join(named[1:])}")
    elif not (samples.numel() and samples.is_floating_point()):
        raise LessonError(f"{options.path} holds no samples: save floats (N, 1 or 3, 28, 28) in [0, 1]")
    elif samples.min() < -0.05 or samples.max() > 1.05:
        low, high = samples.min(), samples.max()
        print(f"values from {low:.2f} to {high:.2f} are clamped to [0, 1]; if black is -1, save (x + 1) / 2")
    print_report(digit_report(samples.clamp(0, 1)))


if __name__ == "__main__":
    run(main)
