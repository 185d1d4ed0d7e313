"""Ray: a private one that leaves nothing behind, or an existing one to join; and calls whose errors can be read."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rlalign.actors.process import environment
from rlalign.config import ClusterConfig

ActorDied = RayActorError
# so small that actors never wait for a CPU: they take turns, and their thread counts are fixed anyway
_CPUS_PER_ACTOR = 0.05
_START_SECONDS = 300.0  # importing torch on a busy machine takes minutes
_CONNECT_SECONDS = 5.0
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # no idle workers, as many as there are CPUs, that start beside the actors
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[None]:
    """A Ray to start actors in. One that this process is connected to already is used, and left as it is."""
    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    folder = tempfile.mkdtemp(prefix="rlalign-")  # short: Ray's sockets live in it
    options: dict[str, Any] = {"namespace": f"rlalign-{uuid.uuid4().hex}", "logging_level": "ERROR"}
    if config.address is None:
        # "local", since Ray would follow RAY_ADDRESS where nothing is said
        options |= {"address": "local", "include_dashboard": False, "_temp_dir": folder}
        options |= {"_node_ip_address": "127.0.0.1"}
    else:
        _check_address(config.address)
        options |= {"address": config.address}
    try:
        try:
            ray.init(log_to_driver=False, **options)
        except (ConnectionError, OSError, ray.exceptions.RayError) as error:
            hint = "; a Ray with token authentication wants RAY_AUTH_MODE=token here too"
            raise ValueError(f"cluster.address={config.address}: {_first_line(error)}{hint}") from error
        with _sigterm_exits():
            yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _check_address(address: str) -> None:
    """Raises ValueError if nobody listens at host:port; Ray itself would go on trying for many minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto" or not port.isdigit():
        return
    # Ray itself reads a loopback address as this machine's own
    hosts = [host, ray.util.get_node_ip_address()] if host in ("localhost", "127.0.0.1") else [host]
    for candidate in hosts:
        try:
            socket.create_connection((candidate, int(port)), timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            reason = error
    raise ValueError(f"cluster.address={address}: nobody answers there ({reason})")


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM unwinds the stack and so stops the actors. Ray's own handler, just installed, would leave them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def start_actor(cls: type, config: ClusterConfig, *args: Any, num_gpus: float = 0.0) -> Any:
    """A new actor's handle; the process starts in the background. ``cls`` stays a plain class, as tests like it."""
    remote = ray.remote(cls).options(
        num_cpus=_CPUS_PER_ACTOR,
        num_gpus=num_gpus,
        max_restarts=0,
        runtime_env={"env_vars": environment(config.threads)},
    )
    return remote.remote(*args)


def stop_actor(handle: Any) -> None:
    """Kill an actor, whatever it is doing."""
    ray.kill(handle, no_restart=True)


def fetch(reference: Any) -> Any:
    """The result of a call. What the actor raised is raised here as itself; its traceback hangs on it as a note."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, Exception):
            raise
        cause.add_note(str(error))
        raise cause from None


def wait_started(actors: Mapping[str, Any]) -> None:
    """Return when the process of every actor (name to handle) is up or gone; their next call tells which.

    Raises ValueError naming those that did not start in time. Loading a model is no part of it: it takes what it takes.
    """
    references = {handle.__ray_ready__.remote(): name for name, handle in actors.items()}
    _, waiting = ray.wait(list(references), num_returns=len(references), timeout=_START_SECONDS)
    if waiting:
        names = ", ".join(references[reference] for reference in waiting)
        raise ValueError(
            f"did not start within {_START_SECONDS:g} s: {names}. Has the cluster room for {len(references)} actors?"
        )


def fetch_named(reference: Any, name: str) -> Any:
    """The result of a call on the actor ``name``. Raises RuntimeError naming it if its process is gone."""
    try:
        return fetch(reference)
    except ActorDied as error:
        raise RuntimeError(f"{name} died: {_first_line(error)}") from error


class Remote:
    """An actor whose methods are called as if it were here: ``Remote(handle).method(...)`` waits and returns.

    Raises RuntimeError naming the actor if its process is gone.
    """

    def __init__(self, handle: Any, name: str) -> None:
        self._handle, self._name = handle, name

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.wait_for(getattr(self._handle, method).remote(*args, **kwargs))

        return call

    def wait_for(self, reference: Any) -> Any:
        """The result of a call that was made on the handle."""
        return fetch_named(reference, self._name)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
