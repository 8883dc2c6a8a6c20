"""Which sites are present, and which process speaks for each of them.

A site's process draws a session id when it starts. Two processes under one name would train and upload in each other's
place, so the second to come is refused; a restarted process must not be mistaken for a second one. The difference is
that a process that was killed does not answer:

    present A, hello from B   ->  probe A, again and again; B waits
    A says hello              ->  B is refused, rule duplicate-site
    A is silent for probe_s and B has said hello again,
    or the broker says A left ->  B is welcome; A is superseded
    B killed, hellos from C   ->  C waits in B's place
    hello from a superseded   ->  refused: it went on after another had taken its place

One probe may be lost, and one hello may be the late word of a process that is gone: together they must not put out a
process that lives. Hence the repetitions; whoever waits for a welcome repeats its hello.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from coordinator.decisions import Instant
from shared.config import FederationConfig
from shared.messages import Hello, Status
from shared.plan import SealedPlan

LAST_WORDS = frozenset({"done", "stopped", "failed"})
"""Phases of a site that leaves of its own will."""

PROBES = 4
"""How often a session is asked whether it lives before its silence is believed."""

REMEMBERED_SESSIONS = 8
"""Superseded sessions remembered per site; more than anyone restarts within the life of a stray process."""


class Claim(Enum):
    """What to answer to a hello."""

    WELCOME = auto()
    PROBE = auto()
    """Ask the present session whether it lives; answer the newcomer later."""
    WAIT = auto()
    """The probe is under way."""
    REFUSE = auto()


@dataclass(slots=True)
class Site:
    """What is known of one site now; nothing of this is journaled."""

    session: str | None = None
    """The process that speaks for the site; None when it is away."""
    challenger: str | None = None
    challenged_at: float = 0.0
    """Monotonic seconds."""
    probes: int = 0
    insists: bool = False
    """The challenger has said hello more than once."""
    newcomers: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED_SESSIONS))
    """Sessions that said hello since the present one was challenged."""
    superseded: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED_SESSIONS))
    status: Status | None = None
    seen_at: float = 0.0
    """Unix seconds of the last message, for people."""
    heard_at: float = 0.0
    """Monotonic seconds of the last message."""
    asked_at: float | None = None
    """Monotonic seconds since when it is asked whether it is still here; None when it has spoken since."""
    left_at: float | None = None
    """Monotonic seconds at which the broker said that its process is gone; None when it never did."""


class Sites:
    """All sites that were ever heard of since this process started; grows with sites, not with updates."""

    def __init__(self, *, probe_s: float) -> None:
        self.probe_s = probe_s
        self.present: frozenset[str] = frozenset()
        """Sites with a process that speaks for them."""
        self._sites: dict[str, Site] = {}
        self._slow: set[str] = set()

    def __getitem__(self, name: str) -> Site:
        return self._sites.setdefault(name, Site())

    def items(self) -> list[tuple[str, Site]]:
        """Names and sites, by name."""
        return sorted(self._sites.items())

    @property
    def awaited(self) -> frozenset[str]:
        """Those present that a round waits for."""
        return self.present - self._slow

    def punctual(self, in_time: frozenset[str], late: frozenset[str]) -> None:
        """Remember who answered a round in time, and whom it waited for in vain."""
        self._slow = self._slow - in_time | late

    def hello(self, name: str, session: str, now: float) -> tuple[Claim, str | None]:
        """A process claims the name.

        Returns what to do, and the session that it concerns besides the speaker: the one to probe, or the challenger
        that is to be refused because the present one lives.
        """
        site = self[name]
        if session in site.superseded:
            return Claim.REFUSE, None
        if site.session in {None, session}:
            loser, site.challenger = site.challenger, None
            self._speaks(name, session)
            return Claim.WELCOME, loser
        if site.challenger is not None:
            if session in site.newcomers:
                # Whoever repeats itself lives; the challenger may have been killed in its turn.
                site.challenger, site.insists = session, True
            else:
                site.newcomers.append(session)
            return Claim.WAIT, None
        site.challenger, site.challenged_at, site.probes, site.insists = session, now, 1, False
        site.newcomers.clear()
        site.newcomers.append(session)
        return Claim.PROBE, site.session

    def left(self, name: str, session: str, now: float) -> str | None:
        """The broker says that a session is gone; returns a challenger that is welcome now."""
        site = self[name]
        if site.session != session:
            if site.challenger == session:
                site.challenger = None
            return None
        site.left_at = now
        return self._promote(name)

    def heard(self, name: str, now: Instant) -> Site:
        """It has said something."""
        site = self[name]
        site.seen_at, site.heard_at, site.asked_at = now.wall, now.mono, None
        return site

    def quiet(self, now: float, *, for_s: float) -> list[tuple[str, str]]:
        """(name, session) of present ones that said nothing `for_s` long, to be asked until they speak.

        A broker that may drop messages may drop the word that a process is gone.
        """
        quiet = []
        for name, site in self._sites.items():
            if site.session is not None and now - site.heard_at >= for_s:
                site.asked_at = now if site.asked_at is None else site.asked_at
                quiet.append((name, site.session))
        return quiet

    def expected(self, now: float, *, back_within_s: float) -> bool:
        """Whether anybody is here, or broke off in mid-work less than `back_within_s` ago and may come back.

        Who has not answered for probe_s is not here.
        """

        def is_here(site: Site) -> bool:
            return site.session is not None and (site.asked_at is None or now - site.asked_at < self.probe_s)

        def returns(site: Site) -> bool:
            said_farewell = site.status is not None and site.status.phase in LAST_WORDS
            return site.left_at is not None and not said_farewell and now - site.left_at < back_within_s

        return any(is_here(site) or returns(site) for site in self._sites.values())

    def unanswered(self, now: float) -> list[tuple[str, str]]:
        """(name, session) of present ones that are to be probed once more."""
        due = []
        for name, site in self._sites.items():
            waited_s = now - site.challenged_at
            if site.challenger is None or site.session is None or site.probes >= PROBES:
                continue
            if waited_s >= site.probes * self.probe_s / PROBES:
                site.probes += 1
                due.append((name, site.session))
        return due

    def silent(self, now: float) -> list[tuple[str, str]]:
        """(name, session) of challengers whose rival did not answer the probes in time: they are welcome now."""
        promoted = []
        for name, site in self._sites.items():
            if site.challenger is not None and site.insists and now - site.challenged_at >= self.probe_s:
                if site.session is not None:
                    site.superseded.append(site.session)
                session = self._promote(name)
                if session is not None:
                    promoted.append((name, session))
        return promoted

    def _promote(self, name: str) -> str | None:
        challenger, self[name].challenger = self[name].challenger, None
        self._speaks(name, challenger)
        return challenger

    def _speaks(self, name: str, session: str | None) -> None:
        self[name].session = session
        self.present = self.present - {name} if session is None else self.present | {name}


def stranger(name: str, hello: Hello, plan: SealedPlan, federation: FederationConfig) -> tuple[str, str] | None:
    """Return rule and detail why a hello is turned away; None for one that says what the federation agreed on."""
    roster = federation.federation.sites
    if roster and name not in roster:
        return "unknown-site", f"{name} is not in [federation] sites"
    if hello.fingerprint == plan.fingerprint:
        return None
    if hello.config_sha256 != plan.config_sha256:
        return "other-config", "federation.toml differs from the coordinator's"
    if hello.frozen_sha256 != plan.frozen_sha256:
        return "other-weights", (
            f"the frozen weights of the base model differ: {hello.frozen_sha256[:12]} at the site, "
            f"{plan.frozen_sha256[:12]} in the federation"
        )
    return "other-plan", "the resolved layer plan or the tokenizer differs from the coordinator's"
