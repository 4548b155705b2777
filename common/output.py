"""The output folder of a run: never overwritten by accident, and enough in it to go on after any kind of end."""

import dataclasses
import json
import platform
from pathlib import Path

import torch

from common.checkpoint import load_checkpoint, load_weights, save_checkpoint
from common.errors import LessonError
from common.files import atomic_write

# What a resumed run may change; anything else would make it a different run.
FREE_TO_CHANGE = {"steps", "preview_every", "device", "precision", "output"}


def open_output(folder: str | Path, overwrite: bool) -> None:
    """Makes room for a new run. LessonError if the folder holds an earlier one and `overwrite` is not set."""
    folder = Path(folder)
    try:
        earlier = [path for path in sorted(folder.glob("*")) if _written_by_a_run(path)]
        if earlier and not overwrite:
            raise LessonError(
                f"{folder} holds an earlier run: go on with it (--resume), replace it (--overwrite), "
                "or choose another folder (--output)"
            )
        for path in earlier:
            path.unlink()
    except OSError as error:
        raise LessonError(f"cannot use {folder} for output: {error.strerror or error}") from error


def _written_by_a_run(path):
    names = ("checkpoint.pt", "config.json", "metrics.csv", "loss.png", "trajectory.gif")
    return path.name in names or (path.name.startswith("samples") and path.suffix == ".png")


def resume_run(config, named: set[str], lesson: str) -> tuple:
    """The configuration and the checkpoint with which the run in config.output goes on.

    The run keeps the configuration it started with; the fields in `named`, given on the command line, must agree with
    it unless they are free to change; `minutes` became a number of steps when the run began, and that stays.
    LessonError otherwise, and as `load_checkpoint` raises.
    """
    path = Path(config.output) / "checkpoint.pt"
    checkpoint = load_checkpoint(path, lesson)
    try:
        saved, step = dataclasses.replace(config, **checkpoint["config"]), checkpoint["step"]
    except (KeyError, TypeError) as error:
        raise LessonError(f"{path} is of another version of {lesson}: start a new run") from error
    for name in sorted(named - FREE_TO_CHANGE - {"minutes"}):
        if getattr(config, name) != getattr(saved, name):
            flag, value = "--" + name.replace("_", "-"), getattr(saved, name)
            raise LessonError(f"{path} was made with {flag} {value}: resume without {flag}, or start a new run")
    changed = named & FREE_TO_CHANGE | {"output"}
    if "minutes" in named:
        changed.discard("steps")
    config = dataclasses.replace(saved, **{name: getattr(config, name) for name in changed})
    if config.steps < step:
        raise LessonError(f"{path} is already at step {step}: ask for more --steps than that")
    return config, checkpoint


def start_output(config, network: torch.nn.Module, device: torch.device, seconds: float) -> None:
    """Writes config.json, and prints what is about to happen; `seconds` is how long the steps will take."""
    folder = Path(config.output)
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"device      {device} ({chip}, {torch.get_num_threads()} threads), PyTorch {torch.__version__}")
    print(f"precision   {config.precision}")
    print(f"parameters  {sum(p.numel() for p in network.parameters()):,}")
    sigmas = network.sigmas.tolist()
    print(f"noise       {len(sigmas)} scales from {sigmas[0]:.4f} to {sigmas[-1]:.4f}")
    for name, value in dataclasses.asdict(config).items():
        print(f"  {name:<16}{value}")
    print(f"{config.steps} steps of {config.batch_size} images, about {seconds / 60:.1f} minutes and the pictures")
    print(f"writes to {folder.resolve()}; Ctrl-C saves and stops", flush=True)


def save_run(config, lesson: str, step: int, image_shape: tuple, parts: dict, generator: torch.Generator) -> None:
    """Writes checkpoint.pt. image_shape: (C, H, W); parts: {name: network or what else has a state_dict}.

    LessonError, and the last checkpoint stays, if a network holds a weight that is not finite.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    networks = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    if not all(weights.isfinite().all() for network in networks for weights in network.parameters()):
        raise LessonError(
            f"the weights are not finite after step {step}; the last checkpoint is kept; try a lower --learning-rate"
        )
    states |= {"generator": generator.get_state(), "config": dataclasses.asdict(config)}
    states |= {"image_shape": tuple(image_shape), "step": step}
    save_checkpoint(Path(config.output) / "checkpoint.pt", lesson, **states)


def restore_run(checkpoint: dict, parts: dict, generator: torch.Generator) -> int:
    """Puts what `save_run` wrote back into `parts` and `generator`, and returns the step. LessonError if it is not all
    there, or does not fit.
    """
    try:
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                load_weights(part, checkpoint[name], "checkpoint.pt")
            else:
                part.load_state_dict(checkpoint[name])
        generator.set_state(checkpoint["generator"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise LessonError("checkpoint.pt does not fit this version of the lesson: start a new run") from error
    return checkpoint["step"]
