"""Ray for the length of a study: started on this machine, or a cluster that is there already.

It sends no usage statistics, has no dashboard and prints nothing.
"""

import importlib.util
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import torch

from fedmira.errors import ConfigError

HINT = "federation.engine: ray needs Ray, which is not installed; pip install 'fedmira[ray]'"
LOOPBACK = "127.0.0.1"  # what is started here listens to this machine alone
ANSWER_S = 10  # within which a cluster answers
SHORT = 40  # letters of a folder for temporary files: the path of a Unix socket below it has at most 107
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}


def check_installed() -> None:
    """Raise ConfigError if Ray is not there."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError([HINT])


def count_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def opened(address: str | None, *, cpus: int = 0) -> Iterator[Mapping[str, float]]:
    """Yield what there is to compute with, resource -> amount; what was started for it ends with the block.

    address: of a cluster; None = start Ray here, with at least so many CPUs. Raises ConfigError if no cluster answers.
    """
    check_installed()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():  # by whoever calls us from Python, or by us around this
        yield ray.cluster_resources()
        return
    log = logging.getLogger("ray")
    log.setLevel(logging.CRITICAL)
    folder = None
    if address is None:
        there = tempfile.gettempdir()
        folder = tempfile.mkdtemp(prefix="fm-", dir=there if len(there) <= SHORT else "/tmp")
    try:
        with _signals_kept():
            _start(ray, address, folder, max(cpus, count_cores()))
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _start(ray: Any, address: str | None, folder: str | None, cpus: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
    if folder is not None:
        # not a cluster of someone else on this machine, and not one that RAY_ADDRESS names
        here = {"address": "local", "num_cpus": cpus, "num_gpus": torch.cuda.device_count()}
        inner = f"{folder}/ray"  # Ray opens its folder to everybody
        ray.init(**here, include_dashboard=False, _node_ip_address=LOOPBACK, _temp_dir=inner, **quiet)
        return
    try:
        _reach(ray, str(address))
        ray.init(address=address, **quiet)
    except Exception as error:  # of several kinds, by the form of the address
        raise ConfigError(
            [
                f"federation.address: no Ray cluster answers at '{address}' ({type(error).__name__}: {error}); start "
                "one with 'ray start --head' and give its address, or auto on a machine of the cluster; null starts "
                "Ray here"
            ]
        ) from error


def _reach(ray: Any, address: str) -> None:
    """Raise OSError or ValueError if nobody listens at an address: Ray itself would try for more than ten minutes.

    For Ray the loopback is this machine's own address: a cluster that listens to the loopback alone has none.
    """
    if address == "auto":
        return
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname is None or place.port is None:
        raise ValueError("an address is auto, host:port or ray://host:port")
    local = place.hostname in ("localhost", LOOPBACK, "::1")
    host = ray.util.get_node_ip_address() if local and place.scheme != "ray" else place.hostname
    socket.create_connection((host, place.port), timeout=ANSWER_S).close()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore what signals do: Ray replaces it when it starts, and a run that is terminated says how to go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
