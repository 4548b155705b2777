"""Several processes: two of them, on CPU cores, make the run that one makes; signals and deaths end all of them."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from common import ranks
from tests.running import ENVIRONMENT, FEW_SCALES, ROOT, hashes, quick, read_checkpoint, run_here, some_images
from tests.test_train import files_of_a_run, wait_until

FLAGS = ("--smoke", "--device", "cpu", "--precision", "float32", "--optimizer", "adam", "--preview-every", 50)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Flags for a few digits in a folder: the processes start sooner."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, image in enumerate(some_images("mnist")[:20, 0]):
        Image.fromarray(image.numpy()).save(folder / f"{k}.png")
    return "--images", folder, "--image-size", 28, "--channels", 1


def torchrun(lesson, *flags, processes=2):
    """What subprocess needs to run a lesson's train_mnist.py in two processes; torchrun is this module's command."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    arguments = [sys.executable, *launcher, "train_mnist.py", *flags]
    return {"args": list(map(str, arguments)), "cwd": ROOT / lesson, "env": ENVIRONMENT, "text": True}


def lines_of_ours(text):
    return [line for line in text.splitlines() if line.startswith(("error:", "Traceback")) and "elastic" not in line]


@pytest.fixture(scope="module")
def two(lesson, pictures, tmp_path_factory):
    """(folder, what was printed) of four steps in two processes."""
    folder = tmp_path_factory.mktemp(lesson.name)
    flags = (*FLAGS, *FEW_SCALES[lesson.name], *pictures, "--steps", 4, "--output", folder)
    done = subprocess.run(**torchrun(lesson.name, *flags), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, done


def difference(a, b):
    """How far two checkpoints are apart in each weight, after a look at the rest."""
    assert a.keys() == b.keys() and a["step"] == b["step"] and torch.equal(a["generator"], b["generator"])
    for (step, losses), (other, theirs) in zip(a["log"]["recent"], b["log"]["recent"], strict=True):
        assert step == other
        torch.testing.assert_close(losses, theirs, rtol=1e-2, atol=0)  # of all images, in the same order
    names = [name for name in ("network", "ema") if name in a]
    weights = [torch.cat([w.flatten() for name in names for w in each[name].values()]) for each in (a, b)]
    return (weights[0] - weights[1]).abs()


def assert_same_run(a, b):
    """What was learned differs by less than a hundredth of a step of Adam on average, and 999 of 1000 weights by 1e-5.

    Not all: Adam divides by the size of a gradient, and where that is nearly zero, the order of a sum decides which way
    the weight goes. On the machine that this was written on the largest difference is 4e-5.
    """
    apart = difference(a, b)
    assert float(apart.mean()) < 1e-2 * a["config"]["learning_rate"] < 1e-4
    assert float(apart.kthvalue(int(0.999 * len(apart))).values) < 1e-5


def test_two_processes_make_the_run_of_one(lesson, two, pictures, tmp_path):
    """Up to the order of sums; the log has the losses of all images, in the order of one process."""
    flags = (*FLAGS, *FEW_SCALES[lesson.name], *pictures)
    assert run_here(lesson.name, *flags, "--steps", 4, "--output", tmp_path).status == 0
    assert_same_run(read_checkpoint(two[0]), read_checkpoint(tmp_path))


def test_only_the_first_process_prints_and_writes(lesson, two):
    folder, done = two
    assert set(hashes(folder)) == files_of_a_run(lesson)
    assert done.stdout.count("\nprocesses   2\n") == done.stdout.count("done: look at ") == 1
    assert len(re.findall("^device ", done.stdout, re.MULTILINE)) == 1
    assert done.stderr.count("20 pictures from ") == 1
    assert lines_of_ours(done.stderr) == []


def test_one_process_goes_on_with_the_run_of_two(lesson, two, pictures, tmp_path):
    flags = (*FLAGS, *FEW_SCALES[lesson.name], *pictures)
    assert run_here(lesson.name, *flags, "--steps", 6, "--output", tmp_path).status == 0
    resumed = run_here(lesson.name, "--resume", "--steps", 6, "--output", two[0])
    assert resumed.status == 0, resumed.stderr
    assert read_checkpoint(two[0])["step"] == 6
    assert_same_run(read_checkpoint(two[0]), read_checkpoint(tmp_path))


def test_a_mistake_is_one_line_of_one_process(tmp_path):
    """--batch-size 16 in three parts; the run that was there stays."""
    assert quick("lesson_03_ncsn", "--output", tmp_path).status == 0
    before = hashes(tmp_path)
    how = torchrun("lesson_03_ncsn", *FLAGS, "--overwrite", "--output", tmp_path, processes=3)
    done = subprocess.run(**how, capture_output=True, timeout=120)
    assert done.returncode != 0 and hashes(tmp_path) == before
    assert [line for line in lines_of_ours(done.stderr) if line.startswith("error")] == [
        "error: --batch-size 16 must be a multiple of the 3 processes"
    ]


def started(folder, printed, pictures):
    """A long run in two processes, and the process ids of both, when some steps are done."""
    how = torchrun("lesson_04_ncsnv2", *FLAGS, *pictures, "--steps", 10**6, "--output", folder)
    stderr = open(printed, "w")
    process = subprocess.Popen(**how, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
    wait_until((folder / "checkpoint.pt").exists, process)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    workers = [int(word) for word in found.split()]
    assert len(workers) == 2
    return process, {rank_of(pid): pid for pid in workers}


def rank_of(pid):
    with open(f"/proc/{pid}/environ") as file:
        return int(re.search(r"\0RANK=(\d)\0", file.read())[1])


pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="the tests find processes in /proc")


@pytest.mark.parametrize("who", ["all", "one"])
def test_ctrl_c_stops_all_processes_after_the_same_step(pictures, tmp_path, who):
    """As a terminal sends it: to torchrun and both processes at once, and torchrun passes it on, a second time. Or to
    one process only, with which the other has to agree.
    """
    printed = tmp_path / "stderr"
    process, workers = started(tmp_path / "run", printed, pictures)
    try:
        if who == "all":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(workers[1], signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    line = re.search(r"^stopped and saved after step (\d+); go on with: (.*)$", stdout, re.MULTILINE)
    assert line and line[2].startswith("torchrun --nproc-per-node 2 train_mnist.py ") and line[2].endswith(" --resume")
    assert read_checkpoint(tmp_path / "run")["step"] == int(line[1])
    assert "error: " not in printed.read_text()


def test_a_process_that_dies_ends_the_other_with_one_line(pictures, tmp_path):
    printed = tmp_path / "stderr"
    process, workers = started(tmp_path / "run", printed, pictures)
    try:
        os.kill(workers[1], signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode != 0
    ours = [line for line in printed.read_text().splitlines() if "error: " in line]
    assert len(ours) == 1 and "error: another process of this run has ended; go on " in ours[0]
    assert read_checkpoint(tmp_path / "run")["step"] >= 50
    assert not os.path.isdir(f"/proc/{workers[0]}")


# The pieces


def test_shares_are_every_nth_and_gather_puts_them_together(monkeypatch):
    x, i = torch.arange(24).view(12, 2), torch.arange(12)
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "3")
        parts.append(ranks.share(x, i))
        assert torch.equal(parts[-1][1], torch.tensor([0, 3, 6, 9]) + rank)
        assert torch.equal(parts[-1][0], x[parts[-1][1]])

    def all_gather(found, part):
        for k, (whole, _) in enumerate(parts):
            found[k].copy_(whole)

    monkeypatch.setattr(ranks.dist, "all_gather", all_gather)
    assert torch.equal(ranks.gather(parts[1][0]), x)


def test_gradients_become_their_mean_whatever_their_layout(monkeypatch):
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 5), torch.nn.Linear(2, 2))
    network.to(memory_format=torch.channels_last)
    for p in network[:2].parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
    mine = [p.grad.clone() for p in network[:2].parameters()]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda message: message.mul_(5))  # the others' are four times mine
    ranks.average_gradients(network)
    for p, before in zip(network[:2].parameters(), mine, strict=True):
        torch.testing.assert_close(p.grad, 2.5 * before)
        assert p.grad.stride() == before.stride()


def test_one_process_does_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False), monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(ranks, "dist", None)
    x = torch.arange(3)
    assert ranks.share(x)[0].equal(x) and ranks.gather(x) is x
    assert ranks.agreed("word") == "word" and ranks.largest(3, x.device) == 3
    assert ranks.join(torch.device("mps")) == torch.device("mps")
    ranks.average_gradients(torch.nn.Linear(1, 1))


def test_devices_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match="several processes run on cuda or cpu, not on mps: add --device cpu"):
        ranks.join(torch.device("mps"))
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, timeout: chosen.append(backend))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local, gpus, index, backend in ((1, 2, 1, "nccl"), (1, 1, 0, "gloo"), (0, 8, 0, "nccl")):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert ranks.join(torch.device("cuda")) == torch.device("cuda", index)
        assert chosen[-2:] == [index, backend]
