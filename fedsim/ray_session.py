"""Ray's own processes, started while the caller goes on. Of fedsim only the modules ``ray_*`` import Ray.

Starting them takes seconds in which this process has nothing to do for it: time to import torch and to read data.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU workers keep CUDA_VISIBLE_DEVICES as it is
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import _raylet
from ray._private import services
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._raylet import (  # type: ignore[attr-defined]
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)
from ray.exceptions import RayError

from fedsim.errors import ConfigError, FedsimError
from fedsim.watchdog import Watchdog

logging.getLogger("ray").setLevel(logging.ERROR)  # it would warn that it leaves SIGTERM to the main thread

SYSTEM = {
    "free_objects_period_milliseconds": 100,  # Ray's is a second, in which a round's models pile up in its store
    "worker_niceness": 0,  # Ray's default is 15, but here the workers are the work
    "preload_python_modules": ["fedsim.ray_pool"],  # and with it torch: while the driver reads data
}


# Where a node's agents listen: files that they write and the raylet waits for. -1, as Ray's agent writes for a service
# that it lacks: nowhere.
PORTS = (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
)


class _Head(Node):
    """A head node without the Python processes that a simulation never talks to: dashboard, autoscaler, log monitor,
    and the agents for dashboard and runtime environments, whose start takes a second and which hold 60 MB each."""

    def __init__(self, cpus: int):
        options: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False, "_system_config": SYSTEM}
        super().__init__(RayParams(num_cpus=cpus, **options), head=True, shutdown_at_exit=False, spawn_reaper=True)

    def start_raylet(self, *arguments: Any, **options: Any) -> None:
        """With processes that wait in the agents' place: the raylet wants both, and ends with either."""
        for name in PORTS:
            persist_port(self._session_dir, self._node_id, name, -1)
        start = services.start_ray_process

        def start_without_agents(command: list[str], *rest: Any, **named: Any) -> Any:
            command = [re.sub("^(--[a-z_]+_agent_command)=.*", r"\1=tail -f /dev/null", word) for word in command]
            return start(command, *rest, **named)

        services.start_ray_process = start_without_agents
        try:
            super().start_raylet(*arguments, **options)
        finally:
            services.start_ray_process = start

    def start_api_server(self, **_: Any) -> None:
        """Not started: ``ray.init`` would wait a second for it even with ``include_dashboard=False``."""


class Session:
    """A Ray of ``cpus`` CPUs on this machine, or a cluster that is there. To be closed, whatever ``start`` does."""

    def __init__(self, cpus: int):
        self.error = ""
        self._begun, self._up, self._over = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(cpus,), name="ray", daemon=True)
        self._watchdog: Watchdog | None = None

    def start(self, address: str = "") -> None:
        """Join the cluster at ``address``, or begin to start a Ray here and return at once.

        Raises:
            ConfigError: no cluster answers at ``address``.
        """
        if not address:
            self._watchdog = Watchdog()
            self._thread.start()
            return
        try:
            _answers(address)
            _join(address)
        except (OSError, OverflowError, ValueError, RayError) as error:
            raise ConfigError(
                f"simulation.address = '{address}': no Ray cluster answers there ({error}); expected HOST:PORT of one"
                " ('ray start --head' says which), or no address to start one here"
            ) from None
        self._up.set()

    def _keep(self, cpus: int) -> None:
        # Linux ends Ray's processes with the thread that started them, so this one stays as long as they are needed.
        self._begun.set()
        head, watchdog = None, self._watchdog
        assert watchdog is not None
        try:
            with watchdog.marking():
                head = _Head(cpus)
            _join(head.gcs_address)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        self._up.set()
        self._over.wait()
        if head is not None:
            head.kill_all_processes(check_alive=False, allow_graceful=True)

    def wait(self) -> None:
        """Until this process is connected.

        Raises:
            FedsimError: Ray does not start here.
        """
        self._up.wait()
        if self.error:
            raise FedsimError(f"Ray does not start: {self.error}")

    def close(self) -> None:
        """Leave the cluster; end the Ray that was started here."""
        # An interrupt may have come between the thread's start and its first step.
        started_here = self._watchdog is not None and self._begun.wait(1.0)
        if started_here:
            self._up.wait()
        ray.shutdown()
        self._over.set()
        if started_here:
            self._thread.join()
        if self._watchdog is not None:
            self._watchdog.close()


def _join(address: str) -> None:
    with _signals_kept():
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)


# ray::RayLog::is_failure_signal_handler_installed_
INSTALLED = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """What SIGTERM does is the caller's to say. Ray's Python sets a handler that exits with 15, and its C++, without
    asking Python, one that aborts, unless it has done so already: so it is told that it has. When it ends it resets to
    the system's default what it believes to have set: so it is told then that it has not."""
    before = signal.getsignal(signal.SIGTERM)
    installed = ctypes.c_bool.in_dll(ctypes.CDLL(_raylet.__file__), INSTALLED)
    installed.value = True
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        installed.value = False
        if threading.current_thread() is threading.main_thread():  # nobody else may, nor does Ray then
            signal.signal(signal.SIGTERM, before)


def _answers(address: str) -> None:
    """Raise OSError unless something listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


_sessions: list[Session] = []  # the one that is open, if any: a process has one Ray


def current() -> Session | None:
    return _sessions[0] if _sessions else None


@contextlib.contextmanager
def session(cpus: int, address: str = "") -> Iterator[Session]:
    """Keep one Ray for several pools. Raises as ``Session.start`` does."""
    opened = Session(cpus)
    try:  # around the start too, which may be interrupted at any point
        _sessions.append(opened)
        opened.start(address)
        yield opened
    finally:
        _sessions.clear()
        opened.close()
