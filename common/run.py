"""One training run: what a training loop needs besides the paper. The loop itself is in a lesson's train_mnist.py."""

import dataclasses
import json
import re
import shlex
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import torch
from torch import Tensor

from common import cli, ranks
from common.checkpoint import load_checkpoint, save_checkpoint
from common.cli import Stopped, StopRequest, by_product, is_out_of_memory, progress
from common.config import RunConfig, flag_of, learning_rate, parse_config
from common.data import load_pictures
from common.errors import LessonError
from common.files import Claim, atomic_write, check_writable
from common.images import check_finite, save_gif, save_grid, some_frames
from common.machine import InBatches, autocast, choose_device, describe, synchronize, train_as_graph, training_precision
from common.noise import SeededNoise
from common.training_log import TrainingLog

LOG_EVERY = 10  # steps
WARM, TIMED = 2, 10  # the steps between these say how long the run will take
SAMPLES = 64  # pictures in a grid
CALL = 4  # a step with an image takes as long as so many network calls to sample with, about
FILES = re.compile(  # what a run writes
    r"checkpoint\.pt|config\.json|metrics\.csv|loss\.png|trajectory\.gif|samples(_before_denoising|_step_\d{6,})?\.png"
)
FREE_TO_CHANGE = {"steps", "minutes", "preview_every", "device", "precision", "output", "images"}  # by --resume


def start(train, config_class, presets: dict[str, dict], lesson: str) -> None:
    """What `python train_mnist.py` does: reads the flags, calls train(config, run), and ends the program."""

    def main():
        config, named, resume, overwrite = parse_config(config_class, presets)
        checkpoint = None
        if resume:
            config, checkpoint = resume_run(config, named, lesson)
        config.check()
        with closing(Run(config, lesson, checkpoint, overwrite)) as run:
            train(run.config, run)
        print(f"done: look at {run.folder / 'samples.png'}")

    cli.run(main)


class Run:
    """Device, data, random numbers, checkpoints, log, pictures, signals and processes of one training run.

    A loop uses, in this order: `begin`, `steps`, `batch`, `autocast`, `learning_rate`, `record`, `preview_due` and
    `show`; after it, `last_pictures`. `generator` is where training gets its random numbers, the same in all processes
    of `common.ranks`. `images` is the data, uint8 (N, C, H, W) on `device`; `checkpoint` what the run goes on from.
    """

    def __init__(self, config: RunConfig, lesson: str, checkpoint: dict | None = None, overwrite: bool = False):
        self.began, self.stop, self.claim = time.perf_counter(), False, None
        self.lesson, self.checkpoint, self.folder = lesson, checkpoint, Path(config.output)
        self.device = ranks.join(choose_device(config.device))
        if config.batch_size % ranks.world():
            raise LessonError(f"--batch-size {config.batch_size} must be a multiple of the {ranks.world()} processes")
        self.leads, self.earlier, self.ending, self.step = ranks.rank() == 0, [], 0, 0
        images = ranks.agreed(load_pictures(config) if self.leads else None)  # read, or downloaded, once
        self.images, self.image_shape = images.to(self.device), tuple(images.shape[1:])  # (C, H, W)
        self.data = f"{len(images)} pictures, {zlib.crc32(images.numpy()):08x}"
        if checkpoint and checkpoint.get("data", self.data) != self.data:
            raise LessonError(f"{self.folder} is a run on other pictures ({checkpoint['data']}, not {self.data})")
        if self.leads:  # only now, when all that was given has proved usable
            self.earlier = [] if checkpoint else find_earlier_run(self.folder, overwrite)
            self.claim = Claim(self.folder)
            for path in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                path.unlink(missing_ok=True) if FILES.match(path.name[1:]) else None
        torch.manual_seed(config.seed)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.precision = ranks.agreed(training_precision(config.precision, self.device))
        self.config = dataclasses.replace(config, precision=self.precision)

    def close(self) -> None:
        """Gives the run's folder back."""
        self.claim.release() if self.claim else None

    def say(self, what: str) -> None:
        """Tells the person, once, what takes long now."""
        if self.leads:
            print(what, file=sys.stderr, flush=True)

    def begin(self, levels: Sequence[str], calls: tuple[int, int], zero_loss: float, **parts) -> None:
        """Takes what a checkpoint has to hold, and fills it from the one the run goes on from.

        levels: names of the noise levels, from the noisiest on. calls: how often the network is called for each picture
        on the way, and for each of the last ones. zero_loss: the loss of a network that returns zero. parts: networks
        on `device`, and what else has a state_dict.
        """
        self.calls, self.zero_loss, self.log = calls, zero_loss, TrainingLog(levels)
        self.parts = {**parts, "log": self.log}
        if self.checkpoint:
            self._restore()
        # NCCL's own thread would disturb the recording; AMD's GPUs, which are "cuda" too, may hang while they record
        if self.device.type == "cuda" and torch.version.cuda and ranks.world() == 1:
            train_as_graph(parts["network"], self.precision)
        if self.leads:
            print(f"device      {self.device.type} ({describe(self.device)})")
            print(f"processes   {ranks.world()}") if ranks.world() > 1 else None
            print(f"precision   {self.precision}")
            print(f"parameters  {sum(p.numel() for p in parts['network'].parameters()):,}")
            where = self.config.images or self.config.dataset
            print(f"images      {len(self.images)} of {' x '.join(map(str, self.image_shape))} from {where}")
            print(f"noise       {len(levels)} levels, from {levels[0]} to {levels[-1]}")
            for name, value in dataclasses.asdict(self.config).items():
                print(f"  {name:<16}{value}")
            print(f"writes to {self.folder.resolve()}; Ctrl-C saves and stops", flush=True)
        self.first = self.step

    def steps(self) -> Iterator[int]:
        """Yields the number of each step that is left, from 1 on in a new run. Ends the program if it is stopped."""
        B, self.stop = self.config.batch_size, StopRequest()
        with progress(self.config.steps * B, " images", initial=self.step * B, disable=not self.leads) as self.bar:
            while self.step < self.config.steps or self.config.minutes:  # until the steps for them are known
                self.step += 1
                # Dropout has torch's own random numbers: new ones in each step and process, the same after a resume
                torch.manual_seed((self.config.seed + 1_000_003 * (self.step * ranks.world() + ranks.rank())) % 2**63)
                yield self.step
                self.bar.update(B)
                if self.ending:
                    self.bar.close()
                    self._exit(f"stopped and saved after step {self.step}")

    def batch(self) -> Tensor:
        """The images of one step: uint8 (B, C, H, W)."""
        size = (self.config.batch_size,)
        return self.images[torch.randint(len(self.images), size, generator=self.generator, device=self.device)]

    def autocast(self):
        """The context in which the network runs."""
        return autocast(self.device, self.precision)

    @property
    def learning_rate(self) -> float:
        """The learning rate of this step."""
        return learning_rate(self.step, self.config)

    def record(self, loss: Tensor, where: Tensor, weight: Tensor | None = None) -> None:
        """Takes the loss (B,) of each image, and where its noise was: (B,), 0 for the noisiest level, 1 the cleanest.

        weight (B,), None for 1: of a level that comes less or more often than it counts. All are of this process's part
        of the batch. Saves if it is time. LessonError for a loss that is not finite.
        """
        weight = torch.ones_like(loss) if weight is None else weight
        self.log.add(self.step, ranks.gather(torch.stack([loss.detach(), where, weight], dim=1)))
        if self.step == self.first + WARM:
            synchronize(self.device)
            self.clock = time.perf_counter()
        elif self.step == self.first + TIMED:
            synchronize(self.device)
            self._announce((time.perf_counter() - self.clock) / (TIMED - WARM))
        closes = self.step % LOG_EVERY == 0
        if closes:
            self.bar.set_postfix(loss=f"{self.log.close_row():#.4g}", refresh=sys.stderr.isatty())
        if self.device.type == "cpu" or closes:  # a GPU would have to wait for the others' answer at each step
            self.ending = ranks.largest(self.stop.signal_number, self.device)
        if self.ending or self.step % self.config.preview_every == 0 or self.step == self.config.steps:
            self._save()

    @property
    def preview_due(self) -> bool:
        """Whether this process has to make pictures after this step."""
        return self.leads and not self.ending and self.step % self.config.preview_every == 0

    @property
    def pictures(self) -> tuple[tuple, SeededNoise]:
        """What the lesson's `draw` needs to know of pictures: their shape (64, C, H, W), and their noise."""
        seed = self.config.seed
        return (SAMPLES, *self.image_shape), SeededNoise(range(seed, seed + SAMPLES))

    def to_sample(self, network: torch.nn.Module) -> InBatches:
        """The network, in batches and in the precision of the run. It raises Stopped if the run is to stop."""
        return InBatches(network, self.precision, stop=self.stop)

    def show(self, frames: Iterable[Tensor]) -> None:
        """Writes the last of the frames as samples_step_....png; gives up if the run is to stop."""
        with suppress(Stopped):
            images = some_frames(frames)[-1]
            check_finite(images)
            with by_product("preview"):
                save_grid(images, self.folder / f"samples_step_{self.step:06d}.png")

    def last_pictures(self, frames: Iterable[Tensor]) -> list[Tensor]:
        """Writes samples.png and trajectory.gif, and returns the frames. From here on there is only one process."""
        ranks.leave()
        if not self.leads:
            sys.exit(0)
        try:
            kept = some_frames(frames)
        except Stopped:
            self.ending = self.stop.signal_number
            self._exit("the checkpoint is saved, the last pictures are not made")
        check_finite(kept[-1])
        save_grid(kept[-1], self.folder / "samples.png")
        with by_product("trajectory.gif"):
            save_gif(kept, self.folder / "trajectory.gif")
        return kept

    def _save(self):
        """Writes checkpoint.pt, config.json and the log; LessonError, and none of them, if weights are not finite."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        networks = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        if not all(weights.isfinite().all() for network in networks for weights in network.parameters()):
            advice = "an earlier checkpoint is kept; try a lower --learning-rate"
            raise LessonError(f"the weights are not finite after step {self.step}; {advice}")
        if not self.leads:
            return
        config = dataclasses.asdict(self.config)
        states |= {"generator": self.generator.get_state(), "device": self.device.type, "config": config}
        states |= {"image_shape": self.image_shape, "step": self.step, "data": self.data}
        save_checkpoint(self.folder / "checkpoint.pt", self.lesson, **states)
        for path in self.earlier:  # only now: the new run has proved that it can take a step and write it
            path.unlink(missing_ok=True)
        self.earlier = []
        with by_product("config.json"), atomic_write(self.folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
        with by_product("metrics.csv or loss.png"):
            self.log.write(self.folder, self.zero_loss)

    def _restore(self):
        """Puts what `_save` wrote back. LessonError if it is not all there, or does not fit."""
        found = self.checkpoint
        self.step = found["step"]
        try:
            for name, part in self.parts.items():
                part.load_state_dict(found[name])
            if found["device"] == self.device.type:
                self.generator.set_state(found["generator"])
            else:  # another kind of device, whose generators have another state
                self.generator.manual_seed((self.config.seed + 1_000_003 * self.step) % 2**63)
                if self.leads:
                    print(f"the run was on {found['device']}: it goes on with other random numbers, from seed and step")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise LessonError("checkpoint.pt does not fit this version of the lesson: start a new run") from error

    def _announce(self, seconds):
        """Says how long the run will take if a step takes `seconds`; finds the number of steps for --minutes."""
        config, done = self.config, self.step
        previews, last = (calls * SAMPLES / config.batch_size / CALL for calls in self.calls)  # in steps
        each, short = 1 + previews / config.preview_every, False
        if config.minutes:
            left = (60 * config.minutes - (time.perf_counter() - self.began)) / seconds
            steps = ranks.agreed(max(done, done + int((0.97 * left - last) / each)))  # the rest is for files
            short = last > steps - done
            self.config = config = dataclasses.replace(config, steps=steps, minutes=0.0)
            self.bar.total = steps * config.batch_size
        minutes = ((config.steps - done) * each + last) * seconds / 60
        if self.leads:
            text = f"{config.steps} steps of {config.batch_size} images, about {minutes:.1f} minutes with the pictures"
            self.bar.write(text, file=sys.stdout)
            if short:
                self.bar.write("the last pictures take most of that: give it more --minutes", file=sys.stdout)

    def _exit(self, what_happened):
        """Ends the program as a signal would, after a line that says how to go on."""
        if self.leads:
            python = "python" if ranks.world() == 1 else f"torchrun --nproc-per-node {ranks.world()}"
            where = ["--output", self.config.output] if self.config.output != RunConfig.output else []
            script = shlex.join([sys.argv[0], *where, "--resume"])  # the checkpoint knows all other flags
            print(f"{what_happened}; go on with: {python} {script}", flush=True)
        ranks.leave()
        sys.exit(128 + self.ending)


def find_earlier_run(folder: Path, overwrite: bool) -> list[Path]:
    """The files of an earlier run in the folder of a new one, to be deleted when it has replaced that one.

    LessonError if there are any, without `overwrite`, and if the folder cannot be written.
    """
    earlier = [path for path in sorted(folder.glob("*")) if FILES.fullmatch(path.name)]
    if earlier and not overwrite:
        advice = "go on with it (--resume), replace it (--overwrite), or choose another folder (--output)"
        raise LessonError(f"{folder} holds an earlier run: {advice}")
    check_writable(folder / "checkpoint.pt")
    return [path for path in earlier if path.name not in ("checkpoint.pt", "config.json")]  # these are written over


def resume_run(config: RunConfig, named: set[str], lesson: str) -> tuple:
    """The configuration and the checkpoint with which the run in config.output goes on.

    The run keeps the configuration it started with; the fields in `named`, given on the command line, must agree with
    it unless they are free to change; `minutes` became a number of steps early in the run, and that stays.
    LessonError otherwise, and as `load_checkpoint` raises.
    """
    path = Path(config.output) / "checkpoint.pt"
    checkpoint = load_checkpoint(path, lesson, needs=("config", "step", "network", "device", "generator"))
    try:
        saved, step = type(config)(**checkpoint["config"]), int(checkpoint["step"])
        missing = set(dataclasses.asdict(saved)) - set(checkpoint["config"])
    except (TypeError, ValueError) as error:
        raise LessonError(f"{path} is of another version of {lesson}: start a new run") from error
    if missing:
        raise LessonError(f"{path} is of another version of {lesson}, without {min(missing)}: start a new run")
    for name in sorted(named - FREE_TO_CHANGE):
        flag, value = flag_of(name), getattr(saved, name)
        if getattr(config, name) != value:
            raise LessonError(f"{path} was made with {flag} {value}: resume without {flag}, or start a new run")
    changed = named & FREE_TO_CHANGE | {"output"}
    if "minutes" in named:
        changed -= {"minutes", "steps"}
    config = dataclasses.replace(saved, **{name: getattr(config, name) for name in changed})
    if config.steps < step:
        raise LessonError(f"{path} is already at step {step}: ask for more --steps than that")
    if config.steps != saved.steps and config.decay != "constant":
        advice = "resume without --steps, or start a new run (only with --decay constant may it change)"
        raise LessonError(f"{path} is of a run of {saved.steps} steps, at whose end the learning rate is 0: {advice}")
    return config, checkpoint
