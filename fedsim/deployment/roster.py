"""Who plays which client: greets those who come, gives each a number for the whole run, says who is there."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedsim.checkpoint import write_atomically
from fedsim.deployment.federation import Errand, Patience, exchange
from fedsim.deployment.jobs import ABOUT, HELLO, JOB, PLACE, SIZES, Job
from fedsim.deployment.link import Link
from fedsim.deployment.members import Member
from fedsim.errors import DataError, FedsimError

log = getLogger("fedsim")
GREETING = 120.0  # seconds a client may take to open its data


@dataclass
class Roster:
    """
    Args:
        path: file that keeps the numbers over restarts.
        domains: of the federation, ``each`` clients of every one.

    Attributes:
        about: what the clients said of their data; the same classes, shape and dtype for all.
        sizes: (training, validation, test) examples of each client.
    """

    link: Link
    path: Path
    job: Job
    domains: list[str]
    each: int
    patience: Patience
    members: dict[int, Member] = field(default_factory=dict)
    about: dict[int, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    _greeted: dict[str, int] = field(default_factory=dict)  # name -> activation that was greeted

    def gather(self) -> None:
        """Wait until every client of the configuration is there.

        Raises:
            FedsimError: not all of them came within ``patience.absent``.
        """
        kept = self._numbers()
        until, said = time.monotonic() + self.patience.absent, ""
        while True:
            said = self._say(said)
            if len(self.sizes) == self.each * len(self.domains):
                return
            if time.monotonic() > until:
                raise FedsimError(f"gave up after {self.patience.absent:g} s: {said}")
            come = [
                m
                for m in self.link.members.all()
                if self.link.members.present(m, self.patience.silent) and self._greeted.get(m.name) != m.activations
            ]
            if come:
                self._greet(come, kept)
            else:
                self.link.wait(0.1)

    def known(self) -> list[Member]:
        """The registered clients that have a number in this run."""
        kept = self._numbers()
        return [m for m in self.link.members.all() if hashlib.sha256(m.key).hexdigest() in kept]

    def _say(self, before: str) -> str:
        here = [f"{self.about[c]['domain']} ({self.members[c].name})" for c in sorted(self.sizes)]
        missing = [
            domain
            for number, domain in enumerate(self.domains)
            for c in range(number * self.each, (number + 1) * self.each)
            if c not in self.sizes
        ]
        text = f"{len(here)} of {len(here) + len(missing)} clients: {', '.join(here) or 'nobody yet'}"
        text += f"; waiting for {', '.join(missing)}" if missing else ""
        if text != before:
            log.info(text)
        return text

    def _ask(self, members: dict[int, Member], kind: str, numbered: bool) -> Errand:
        def content(place: int) -> RecordDict:
            return RecordDict({JOB: replace(self.job, client=place if numbered else -1).record()})

        return exchange(self.link, members, content, kind, replace(self.patience, order=GREETING, absent=GREETING))

    def _greet(self, come: list[Member], kept: dict[str, int]) -> None:
        for member in come:
            self._greeted[member.name] = member.activations
        said = self._ask(dict(enumerate(come)), HELLO, numbered=False)
        placed: dict[int, Member] = {}
        for i, member in enumerate(come):
            reason = said.failed.get(i)
            if reason is None:
                about: dict[str, Any] = dict(said.answers[i].content.config_records.get(ABOUT, {}))
                number, reason = self._place(member, about, kept)
                if reason is None:
                    placed[number], self.members[number], self.about[number] = member, member, about
            if reason is not None:
                log.warning("client '%s' is left out: %s", member.name, reason)
        if not placed:
            return
        write_atomically(self.path, json.dumps(kept, indent=1).encode())
        held = self._ask(placed, PLACE, numbered=True)
        for number, member in placed.items():
            reason = held.failed.get(number)
            try:
                sizes: Any = dict(held.answers[number].content[SIZES]) if reason is None else {}
                counts = tuple(int(sizes[k]) for k in ("train", "validation", "test")) if reason is None else ()
            except (KeyError, ValueError, TypeError) as error:
                reason = f"sizes cannot be read: {type(error).__name__}"
            if reason is None and (counts[0] < 1 or counts[2] < 1 or counts[1] < 0 or max(counts) > 2**40):
                reason = f"it holds {counts[0]} training and {counts[2]} test examples"
            if reason is not None:
                log.warning("client '%s' is left out: %s", member.name, reason)
                continue
            self.sizes[number] = (counts[0], counts[1], counts[2])

    def _place(self, member: Member, about: dict[str, Any], kept: dict[str, int]) -> tuple[int, str | None]:
        """(number, or why there is none). A key keeps its number as long as the run lasts."""
        domain = about.get("domain")
        if domain not in self.domains:
            return -1, f"its domain is {domain!r}, expected {', '.join(self.domains)}"
        shape = about.get("shape")
        if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**20 for n in shape):
            return -1, f"the shape of its examples is {shape!r}"
        for other in self.about.values():
            for key in ("classes", "shape", "dtype"):
                if about.get(key) != other[key]:
                    return -1, f"its {key} are {about.get(key)!r}, those of '{other['domain']}' are {other[key]!r}"
        start = self.domains.index(domain) * self.each
        fingerprint = hashlib.sha256(member.key).hexdigest()
        registered = {hashlib.sha256(m.key).hexdigest() for m in self.link.members.all()}
        taken = {n for k, n in kept.items() if k != fingerprint and k in registered}
        free = [n for n in range(start, start + self.each) if n not in taken]
        if kept.get(fingerprint) not in free:
            if not free:
                return -1, f"all {self.each} places of '{domain}' are taken"
            kept[fingerprint] = free[0]
        return kept[fingerprint], None

    def _numbers(self) -> dict[str, int]:
        if not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text())
            return {str(k): int(v) for k, v in found.items()}
        except (ValueError, AttributeError) as error:
            raise DataError(f"{self.path}: damaged ({error}); restore it: clients are known by it") from None
