"""Pictures of what a lesson makes, from images that are float (N, C, H, W) in [0, 1] with C = 1 (gray) or 3 (RGB)."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.errors import LessonError
from common.files import atomic_write

PADDING = 2  # pixels between the images of a grid
PADDING_GRAY = 64  # darker than ink and lighter than paper, so that the edges of black images show


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, scale: int | None = None) -> None:
    """Writes images (N, C, H, W) as one PNG, row by row; columns=None is the smallest square that holds them.

    Values outside [0, 1] are clamped. Each pixel becomes scale x scale; None is the least for a width of 56.
    Raises ValueError for NaN, for integers and for other shapes, LessonError if path cannot be written.
    """
    grid = Image.fromarray(_grid(images, columns, scale))
    with atomic_write(path) as temporary:
        grid.save(temporary, format="PNG")


def check_finite(images: Tensor) -> None:
    """Raises LessonError, one line that says what to do, if a sampler left numbers that are not finite."""
    if not images.isfinite().all():
        raise LessonError("the sampled images are not finite: train again with a lower --learning-rate")


def evenly(L: int, n: int) -> Tensor:
    """Indices (n,) long of n of the levels 0, ..., L - 1, evenly chosen, both ends included; all if n is larger."""
    return torch.linspace(0, L - 1, min(n, L), dtype=torch.float64).round().long()


def save_strip(frames: Sequence[Tensor], path: str | Path) -> None:
    """Writes eight of the frames (N, C, H, W), evenly chosen, as a PNG: a row for each image. Raises as save_grid."""
    chosen = torch.stack([frames[k] for k in evenly(len(frames), 8)], dim=1)
    save_grid(chosen.flatten(0, 1), path, columns=chosen.shape[1])


def save_gif(frames: Sequence[Tensor], path: str | Path, milliseconds=100, hold=1500, max_frames=36, **how) -> None:
    """Writes frames, each (N, C, H, W), as a GIF of grids that repeats for ever; `how`: columns and scale of save_grid.

    Each frame shows for `milliseconds`, the last for `hold` milliseconds. At most max_frames are evenly chosen, the
    first and the last included, and fewer if the file would be larger than 2 MB. Raises as save_grid does.
    """
    while True:  # noise hardly compresses, so the size is known only when the file is there
        pictures = [_few_colors(_grid(frames[k], **how)) for k in evenly(len(frames), max_frames)]
        times, file = [milliseconds] * (len(pictures) - 1) + [hold], io.BytesIO()
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)
        if file.tell() <= 2_000_000 or len(pictures) <= 2:
            break
        max_frames = max(2, int(0.95 * len(pictures) * 2_000_000 / file.tell()))
    with atomic_write(path) as temporary:
        temporary.write_bytes(file.getvalue())


def some_frames(frames: Iterable[Tensor], most: int = 72) -> list[Tensor]:
    """The first frame, the last two, and evenly chosen ones between: about `most`, however many there are."""
    kept, every, last = [], 1, []
    for n, frame in enumerate(frames):
        last = [*last[-1:], frame]
        if n % every == 0:
            kept.append((n, frame))
        if len(kept) > most:
            kept, every = kept[::2], 2 * every
    return [frame for k, frame in kept if k <= n - len(last)] + last


def save_table(
    images: Tensor, path: str | Path, rows: Sequence[str], columns: Sequence[str], captions: Sequence[str] = ()
) -> None:
    """Writes images (R K, C, H, W), row by row, as a PNG with the R names of the rows and K of the columns beside them.

    captions: R K texts, or none, to write above the images. Raises as save_grid does.
    """
    from matplotlib.figure import Figure

    pixels, R, K = _pixels(images), len(rows), len(columns)
    above = pixels.shape[2] // 3 if captions else 1
    pixels = F.pad(pixels.expand(-1, 3, -1, -1), (1, 1, above, 1), value=255)
    H, W = pixels.shape[2:]
    figure = Figure(figsize=(0.8 * K, 0.8 * R * H / W))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.imshow(rearrange(pixels, "(r k) c h w -> (r h) (k w) c", k=K).numpy(), interpolation="nearest")
    panel.xaxis.tick_top()
    panel.set_xticks(W * (torch.arange(K) + 0.5), columns, fontsize=9)
    panel.set_yticks(H * torch.arange(R) + (H + above) / 2, rows, fontsize=9)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    for n, caption in enumerate(captions):
        panel.text(W * (n % K + 0.5), H * (n // K) + above - 1, caption, fontsize=8, ha="center", va="bottom")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")  # with the names, which are outside


def save_loss_plot(rows: Sequence[Sequence[float]], bands: Sequence[str], path: str | Path, reference: float) -> None:
    """Writes a PNG of two panels: the training loss over the steps, and the loss in each band of noise levels.

    rows: (step, loss, loss of each band), NaN where a step had no sample of a band; bands: their names.
    reference: the loss of a network that returns zero, is a dashed line; NaN is none. LessonError if path cannot be
    written.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps global state; here, because importing it is slow
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):  # 0.02, not 2e-02
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    steps, losses, *columns = np.asarray(rows, dtype=float).reshape(-1, 2 + len(bands)).T
    figure = Figure(figsize=(13, 4.5))
    left, right = figure.subplots(1, 2, gridspec_kw={"left": 0.07, "right": 0.77, "top": 0.92, "wspace": 0.24})
    left.plot(steps, losses, linewidth=0.5, alpha=0.4, label="ten steps each")
    left.plot(*_running_mean(steps, losses), linewidth=2, label="running mean")
    for k, (name, column) in enumerate(zip(bands, columns, strict=True)):
        color = (0.9 - 0.8 * k / len(bands), 0.3, 0.1 + 0.8 * k / len(bands))  # from red to blue
        right.plot(*_running_mean(steps, column), color=color, label=name)
    if math.isfinite(reference):
        right.axhline(reference, color="black", linestyle="--", label="network that returns zero")
    for panel, title in ((left, "training loss"), (right, "loss by noise level (running means)")):
        panel.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")  # 200, not 2 x 10^2
        panel.yaxis.set_minor_formatter(PlainNumbers(minor_thresholds=(2, 0.5)))
        panel.grid(alpha=0.3, which="both")
    left.legend()
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _pixels(images):
    """The images as uint8 on the CPU."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape or not images.is_floating_point():
        raise ValueError(f"not float images (N, 1 or 3, H, W): {images.dtype} {tuple(images.shape)}")
    if images.isnan().any():
        raise ValueError("the images hold NaN")
    return (images.detach().float().clamp(0, 1) * 255).round().byte().cpu()


def _grid(images, columns=None, scale=None):
    """uint8 array (height, width) for C = 1, (height, width, 3) for C = 3."""
    columns, scale = columns or math.ceil(math.sqrt(len(images))), scale or math.ceil(56 / images.shape[-1])
    pixels = repeat(_pixels(images), "n c h w -> n c (h a) (w b)", a=scale, b=scale)
    pixels = F.pad(pixels, (PADDING, 0, PADDING, 0), value=PADDING_GRAY)  # left and above
    pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, -len(pixels) % columns), value=PADDING_GRAY)  # fills the last row
    pixels = rearrange(pixels, "(r k) c h w -> (r h) (k w) c", k=columns)
    return F.pad(pixels, (0, 0, 0, PADDING, 0, PADDING), value=PADDING_GRAY).squeeze(2).numpy()  # right and below


def _few_colors(pixels):
    """A picture of 16 grays, or of 6 x 6 x 6 colors."""
    if pixels.ndim == 2:
        return Image.fromarray((np.rint(pixels / 17) * 17).astype(np.uint8))
    return Image.fromarray(pixels).convert("P", palette=Image.Palette.WEB, dither=Image.Dither.NONE)


def _running_mean(steps, values):
    """The steps that have a value and, from the point where there are enough, the mean of the values before them."""
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    window = max(1, len(values) // 50)
    sums = np.cumsum(np.insert(values, 0, 0.0))  # np.convolve would refuse a band that never had a sample
    return steps[window - 1 :], (sums[window:] - sums[:-window]) / window
