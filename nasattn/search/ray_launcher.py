"""Workers on a Ray cluster that exists."""

import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nasattn.config import TrainerFile
from nasattn.errors import Stopped, UserError
from nasattn.search.launchers import spawn

ADDRESS = "RAY_ADDRESS"  # Ray's own, HOST:PORT
ANSWERS = 5.0  # seconds in which a cluster must answer
CHUNK = 1 << 20  # bytes of a worker's output that are fetched at once


class Ray:
    """Starts each worker in an actor that holds the trainer's threads and a GPU if it wants one.

    The cluster is that of RAY_ADDRESS (HOST:PORT), else the one that this machine is a node of. Ray
    itself starts nothing twice. When the search dies its actors go, and the workers with them.
    """

    def __init__(self, trainer: TrainerFile, note: Callable[[str], None]) -> None:
        self.trainer, self.ray = trainer, _connect_ray()
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        has_gpus = any(node.get("GPU") for node in nodes)
        wanted = trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and has_gpus)
        self.needs = {"CPU": trainer.threads, "GPU": int(wanted)}
        if not any(all(node.get(k, 0) >= n for k, n in self.needs.items()) for node in nodes):
            needs = " and ".join(f"{n} {k}" for k, n in self.needs.items() if n)
            note(f"no node of the Ray cluster has {needs} now: the workers wait until one has")

    def start(
        self, command: Sequence[str], index: int, log: Path, env: Mapping[str, str]
    ) -> "RayProcess":
        try:
            _reach(self.ray.get_runtime_context().gcs_address)  # else Ray waits for a minute
        except OSError as error:
            raise Stopped(f"the Ray cluster does not answer: {error}") from error
        kind = self.ray.remote(
            num_cpus=self.needs["CPU"],
            num_gpus=self.needs["GPU"],
            max_restarts=0,
            max_task_retries=0,
        )(Host)
        actor = kind.remote()
        # Not an argument of the actor's creation, which Ray keeps: the password is in `env`.
        begun = actor.begin.remote(list(command), dict(env), self.trainer.threads, os.getcwd())
        return RayProcess(self.ray, actor, begun, log)


def _connect_ray() -> Any:
    """The module, connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "--launcher ray: Ray is not installed; pip install 'nasattn[cluster]'"
        ) from None
    address, handler = os.environ.get(ADDRESS) or "auto", signal.getsignal(signal.SIGTERM)
    if address != "auto":  # Ray itself would try for minutes, and then end the process
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"{ADDRESS}: got '{address}'; allowed: HOST:PORT, or auto")
        try:
            _reach(address)
        except (OSError, OverflowError) as error:
            raise UserError(f"{ADDRESS}: no Ray cluster answers at {address}: {error}") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--launcher ray: no Ray cluster can be used: {' '.join(str(error).split())} "
            f"(`ray start` begins one, {ADDRESS}=HOST:PORT names one, and one with a token needs "
            "RAY_AUTH_MODE=token)"
        ) from None
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    return ray


def _reach(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), ANSWERS).close()


class Host:
    """The actor: runs one command on a node. No call of it waits."""

    def begin(self, command: list[str], env: dict[str, str], threads: int, folder: str) -> str:
        """Start it; where that is."""
        self.output, self.read = tempfile.TemporaryFile(), 0
        self.process = spawn(command, self.output, env, threads, folder)
        return f"{socket.gethostname()}:{self.process.pid}"

    def look(self) -> tuple[int | None, bytes]:
        """Its exit code, once there is one and all has been read, and what it has printed since the
        last look."""
        code = self.process.poll()
        text = os.pread(self.output.fileno(), CHUNK, self.read)
        self.read += len(text)
        return (None if len(text) == CHUNK else code), text

    def send(self, number: int) -> None:
        self.process.send_signal(number)


class RayProcess:
    """An actor's command, seen from the search. An actor that died, or its node, was killed."""

    def __init__(self, ray: Any, actor: Any, begun: Any, log: Path) -> None:
        self.ray, self.actor, self.log = ray, actor, log
        self.where, self.code = "Ray, not begun", None  # type: tuple[str, int | None]
        self._begun, self._look = begun, None  # type: tuple[Any, Any]

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        waited = self._begun or self._look
        if not self.ray.wait([waited], timeout=0)[0]:
            return None
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        try:
            found = self.ray.get(waited)
        except ActorUnavailableError:  # the network, for a moment
            if self._begun:  # whether the command was started, nobody can tell any more
                return self._end(-signal.SIGKILL)
            found = (None, b"")
        except RayActorError:
            return self._end(-signal.SIGKILL)
        except RayTaskError as error:
            self._write(f"{error.cause}\n".encode())
            return self._end(1)
        if self._begun:
            self.where, self._begun = found, None
        else:
            code, text = found
            self._write(text)
            if code is not None:
                return self._end(code)
        self._look = self.actor.look.remote()
        return None

    def terminate(self) -> None:
        if self.poll() is not None:
            return
        if self._begun:  # it still waits for a place
            self._end(-signal.SIGTERM)
        else:
            self.actor.send.remote(int(signal.SIGTERM))

    def kill(self) -> None:
        self._end(-signal.SIGKILL)

    def _end(self, code: int) -> int:
        """Give the place free; Ray ends what still runs there."""
        self.ray.kill(self.actor)
        self.code = code
        return code

    def _write(self, text: bytes) -> None:
        if text:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as file:
                file.write(text)
