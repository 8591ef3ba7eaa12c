"""Who plays which client: greets those who come, gives each a number for the whole run, says who is there."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedsim.checkpoint import write_atomically
from fedsim.deployment.federation import Errand, Patience, Sent, collect, give_up
from fedsim.deployment.jobs import ABOUT, HELLO, JOB, PLACE, SIZES, Job
from fedsim.deployment.link import Link
from fedsim.deployment.members import Member
from fedsim.errors import DataError, FedsimError

log = getLogger("fedsim")
GREETING = 120.0  # seconds a client may take to open its data
DTYPES = ("uint8", "int64", "int32", "float32", "float64")
MOST_ELEMENTS, MOST_CLASSES, MOST_EXAMPLES = 1 << 26, 1 << 17, 1 << 31


def read_about(content: RecordDict) -> dict[str, Any]:
    """What a client says of its data; the server builds a model on it, so it must be what it seems.

    Raises:
        KeyError, TypeError, ValueError: it is not.
    """
    about: dict[str, Any] = dict(content[ABOUT])  # type: ignore[arg-type]
    for key, kind in (("domain", str), ("dtype", str), ("digest", str), ("classes", list), ("shape", list)):
        if not isinstance(about[key], kind):
            raise TypeError(f"'{key}' is {str(about[key])[:50]!r}")
    if about["dtype"] not in DTYPES:
        raise ValueError(f"dtype '{about['dtype'][:50]}', expected {', '.join(DTYPES)}")
    shape, classes = about["shape"], about["classes"]
    if not all(type(n) is int and n > 0 for n in shape) or math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"examples of shape {str(shape)[:50]}")
    if not 0 < len(classes) <= MOST_CLASSES or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"{len(classes)} classes, expected the names of 1 to {MOST_CLASSES}")
    return about


@dataclass(frozen=True)
class Question:
    """A message of the greeting: to whom, when, and the number it gives."""

    member: Member
    kind: str
    number: int
    time: float


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
    _asked: list[Question] = field(default_factory=list)
    _errand: Errand = field(default_factory=Errand)  # numbered as in _asked

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
            if not self._greet(kept):
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

    def _ask(self, member: Member, kind: str, number: int = -1) -> None:
        content = RecordDict({JOB: replace(self.job, client=number).record()})
        id = self.link.send(member, content, kind)
        self._errand.open[len(self._asked)] = Sent(member, id, member.activations)
        self._asked.append(Question(member, kind, number, time.monotonic()))

    def _greet(self, kept: dict[str, int]) -> bool:
        """One look at who came and who answered; nobody waits for anybody else. Returns whether there was anything."""
        busy = False
        for member in self.link.members.all():
            here = self.link.members.present(member, self.patience.silent)
            if here and self._greeted.get(member.name) != member.activations:
                self._greeted[member.name] = member.activations
                self._ask(member, HELLO)
                busy = True
        collect(self.link, self._errand)
        for i, sent in list(self._errand.open.items()):
            gone = not self.link.members.present(sent.member, self.patience.silent)
            if gone or sent.member.activations != sent.activations:
                self.link.forget([self._errand.open.pop(i).id])
                if gone:
                    del self._greeted[sent.member.name]  # greeted anew when it is heard of again
            elif time.monotonic() - self._asked[i].time > GREETING:
                give_up(self.link, self._errand, i, f"no answer within {GREETING:g} s")
        for i, message in list(self._errand.answers.items()):
            del self._errand.answers[i]
            reason = self._heard(self._asked[i], message.content, kept)
            if reason is not None:
                self._errand.failed[i] = reason
            busy = True
        for i in list(self._errand.failed):
            log.warning("client '%s' is left out: %s", self._asked[i].member.name, self._errand.failed.pop(i))
        return busy

    def _heard(self, question: Question, content: RecordDict, kept: dict[str, int]) -> str | None:
        """Take an answer in; returns why it cannot be."""
        if question.kind == HELLO:
            try:
                about = read_about(content)
            except (KeyError, ValueError, TypeError) as error:
                return f"what it says of its data cannot be read: {type(error).__name__}: {error}"
            number, reason = self._place(question.member, about, kept)
            if reason is None:
                self.members[number], self.about[number] = question.member, about
                write_atomically(self.path, json.dumps(kept, indent=1).encode())
                self._ask(question.member, PLACE, number)
            return reason
        try:
            sizes: Any = dict(content[SIZES])  # type: ignore[arg-type]
            counts = tuple(int(sizes[k]) for k in ("train", "validation", "test"))
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            return f"sizes cannot be read: {type(error).__name__}"
        if counts[0] < 1 or counts[2] < 1 or counts[1] < 0 or max(counts) > MOST_EXAMPLES:
            return f"it holds {counts[0]} training and {counts[2]} test examples"
        self.sizes[question.number] = (counts[0], counts[1], counts[2])
        return None

    def _place(self, member: Member, about: dict[str, Any], kept: dict[str, int]) -> tuple[int, str | None]:
        """(number, or why there is none). A key keeps its number as long as the run lasts."""
        domain = about["domain"]
        if domain not in self.domains:
            return -1, f"its domain is {domain!r}, expected {', '.join(self.domains)}"
        for other in self.about.values():
            for key in ("classes", "shape", "dtype"):
                if about[key] != other[key]:
                    return -1, f"its {key} are {about[key]!r}, those of '{other['domain']}' are {other[key]!r}"
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
