"""Make a lesson's pretrained.pt from the checkpoint of its lesson run, small enough to come with the repository.

    cd lesson_04_ncsnv2 && python train_mnist.py
    cd .. && python docs/pretrained.py lesson_04_ncsnv2

It keeps the weights that samples come from, matrices rounded to float16, and the configuration; what only a training
needs, the optimiser and its like, is left out.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds common/

from common.checkpoint import load_checkpoint, save_checkpoint
from common.cli import run
from common.errors import LessonError


def main() -> None:
    """Reads the lesson's output/checkpoint.pt, and writes its pretrained.pt."""
    if len(sys.argv) != 2:
        raise LessonError("name the lesson's folder: python docs/pretrained.py lesson_04_ncsnv2")
    folder = Path(sys.argv[1])
    found = load_checkpoint(folder / "output" / "checkpoint.pt", folder.name)
    config, network = found["config"], "ema" if "ema" in found else "network"
    config = {**config, "output": "output"}
    made = f"python train_mnist.py --seed {config['seed']}, {found['step']} steps, PyTorch {torch.__version__}"
    kept = {"image_shape": found["image_shape"], "step": found["step"], "config": config, "made": made}
    path = folder / "pretrained.pt"
    weights = {name: w.half() if w.ndim > 1 else w for name, w in found[network].items()}  # noise scales stay exact
    save_checkpoint(path, folder.name, **kept, **{network: weights})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
