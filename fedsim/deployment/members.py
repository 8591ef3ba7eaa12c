"""Who may take part and who is there: the registered keys, when each client was last heard of, and its traffic."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from fedsim.deployment.fleet import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from fedsim.deployment.keys import registered
from fedsim.errors import DataError

log = getLogger("fedsim")
REFRESH = 1.0  # seconds between looks at the folder of keys


@dataclass
class Member:
    """A registered client. ``sent`` and ``received`` are bytes of serialized messages, seen from the server."""

    name: str
    key: bytes
    node: int
    seen: float = -math.inf
    activations: int = 0
    sent: int = 0
    received: int = 0
    pushed: int = 0  # bytes of objects since its last order, against a client that never stops sending


class Members:
    """The folder of public keys, followed while the server runs, as nodes of Flower's link state.

    Raises:
        DataError: the folder is missing, or a file in it is no key.
    """

    def __init__(self, folder: Path, state: Any):
        self.folder, self.state = folder, state
        self.lock = threading.Lock()
        self.members: dict[bytes, Member] = {}
        self.nodes: dict[bytes, int] = {}  # a key keeps its node for the life of the process
        self._looked = -math.inf
        self._update(registered(folder))

    def _update(self, keys: dict[str, bytes]) -> None:
        for name, key in keys.items():
            if key not in self.nodes:
                self.nodes[key] = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
            if key not in self.members:
                self.members[key] = Member(name, key, self.nodes[key])
        for key in set(self.members) - set(keys.values()):
            log.warning("client '%s' is revoked", self.members.pop(key).name)

    def by_key(self, key: bytes) -> Member | None:
        """The member of a public key, or None if it is not registered (any more)."""
        with self.lock:
            if time.monotonic() - self._looked > REFRESH:
                self._looked = time.monotonic()
                try:
                    self._update(registered(self.folder))
                except DataError as error:
                    log.warning("the known clients stay as they were: %s", error)
            return self.members.get(key)

    def all(self) -> list[Member]:
        """Members by name."""
        with self.lock:
            return sorted(self.members.values(), key=lambda m: m.name)

    def present(self, member: Member, patience: float) -> bool:
        """Connected, heard of within ``patience`` seconds, and still registered. One that is about to connect has been
        heard of, but the link state takes no message for it yet."""
        known = self.by_key(member.key) is member and member.activations > 0
        return known and time.monotonic() - member.seen < patience
