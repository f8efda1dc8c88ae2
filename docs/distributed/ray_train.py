"""Training on a Ray cluster.

    python ray_train.py --workers 16 -- --data /shared/my.jsonl --out /shared/runs/my-run

Ray places the workers, one a GPU. Each of them runs the command as one process of the run.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

import ray.train
import torch.distributed as dist
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train(settings: dict[str, list[str]]) -> None:
    """Run the command in a process of its own, as Ray has formed a process group in this one."""
    context = ray.train.get_context()
    ports = [free_port()]
    dist.broadcast_object_list(ports)
    environment = {
        "WORLD_SIZE": context.get_world_size(),
        "RANK": context.get_world_rank(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
        "MASTER_ADDR": os.environ["MASTER_ADDR"],
        "MASTER_PORT": ports[0],
    }
    command = [sys.executable, "-m", "hymba_tune.cli", "sft", *settings["words"]]
    subprocess.run(command, check=True, env=os.environ | {name: str(value) for name, value in environment.items()})


def free_port() -> int:
    """Return a port that is free on this machine."""
    with socket.socket() as opened:
        opened.bind(("", 0))
        number: int = opened.getsockname()[1]
    return number


def main() -> None:
    """Start the workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, required=True, help="processes in all")
    parser.add_argument("--cpu", action="store_true", help="without GPUs")
    parser.add_argument("words", nargs="+", help="the flags of hymba-tune sft, after --")
    options = parser.parse_args()
    TorchTrainer(
        train,
        train_loop_config={"words": options.words},
        torch_config=TorchConfig(backend="gloo"),  # so that Ray's own processes leave the GPUs alone
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
    ).fit()


if __name__ == "__main__":
    main()
